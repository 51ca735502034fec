//! [`ModelShape`]: everything that a plan must know of a model.

use serde::{Deserialize, Serialize};

use super::Tensor;

/// Where a [`ModelShape`] was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A configuration alone: tensors are those that the architecture is known to have.
    Config,
    /// Headers of safetensors files, with or without a configuration.
    Safetensors,
    /// Metadata and tensor infos of a GGUF file.
    Gguf,
    /// The attributes of an ExLlamaV2-like configuration object.
    ExLlamaV2,
}

/// How a layer mixes tokens, which decides how it is split and what it must remember of the past.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Mixer {
    /// Softmax attention (MHA, GQA or MQA) with a key and a value a token and KV head.
    Attention {
        /// Query heads.
        query_heads: u64,
        /// Key and value heads.
        kv_heads: u64,
        /// Elements of a query or key head.
        key_dim: u64,
        /// Elements of a value head.
        value_dim: u64,
        /// Tokens that the layer looks back on, its own included; `None` for all of them.
        window: Option<u64>,
    },
    /// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one latent and one shared rotary key a token,
    /// whatever the number of heads.
    Latent {
        /// Query heads, each with a key and a value of its own once the latent is expanded.
        query_heads: u64,
        /// Elements of the compressed key and value (`kv_lora_rank`).
        latent_dim: u64,
        /// Elements of the shared rotary key (`qk_rope_head_dim`).
        rope_dim: u64,
    },
    /// Linear attention, a state-space model or another recurrence: a state of fixed size a sequence.
    Recurrent {
        /// Its name: `"linear_attention"`, `"mamba"`, ...
        name: String,
        /// Elements of the state of one sequence, held whole by every rank.
        state_elements: u64,
    },
    /// No mixing at all (layers that are an MLP only).
    None,
}

/// The feed-forward part of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Mlp {
    /// One MLP.
    Dense {
        /// Columns of its intermediate.
        width: u64,
    },
    /// Routed experts.
    Experts {
        /// How many.
        count: u64,
        /// How many of them a token uses.
        active: u64,
        /// Columns of one expert.
        width: u64,
        /// Columns of all shared experts together, 0 for none.
        shared_width: u64,
    },
    /// No feed-forward part.
    None,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// How it mixes tokens.
    pub mixer: Mixer,
    /// Its feed-forward part.
    pub mlp: Mlp,
}

/// The dimensions of a model, from a configuration or from GGUF metadata: all that is known without tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dimensions {
    /// `model_type` of a configuration or `general.architecture` of a GGUF file.
    pub architecture: String,
    /// Columns of the residual stream.
    pub hidden: u64,
    /// Vocabulary rows.
    pub vocabulary: u64,
    /// Query heads of the layers that have the most.
    pub query_heads: u64,
    /// KV heads of the layers that have the most (for latent attention: the query heads).
    pub kv_heads: u64,
    /// Elements of a head.
    pub head_dim: u64,
    /// Columns of the widest MLP that holds most of the MLP's bytes: what the `id` split divides.
    pub intermediate: u64,
    /// Positions that the model was made for.
    pub max_positions: Option<u64>,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// Bytes of an element of activations and of an unquantised cache (2 for float16 and bfloat16).
    pub element_bytes: u64,
    /// Layers, first to last.
    pub layers: Vec<Layer>,
    /// How weights are quantised, if they are.
    pub quantization: Quantization,
}

/// How the weights of a checkpoint are quantised, as far as it decides where they may be cut.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "method")]
pub enum Quantization {
    /// Plain elements.
    None,
    /// GPTQ (arXiv 2210.17323): `32 / bits` elements packed along the input, a scale a group of inputs, zeros packed
    /// along the output.
    Gptq {
        /// Bits an element.
        bits: u64,
        /// Inputs that share a scale; 0 for one scale a column.
        group_size: u64,
        /// Whether inputs were reordered (`desc_act`), which forbids contiguous cuts of the input.
        act_order: bool,
    },
    /// AWQ (arXiv 2306.00978): `32 / bits` elements packed along the output, a scale a group of inputs.
    Awq {
        /// Bits an element.
        bits: u64,
        /// Inputs that share a scale; 0 for one scale a column.
        group_size: u64,
    },
    /// Block-scaled float8: a scale for each block of `rows` outputs by `columns` inputs.
    Fp8Block {
        /// Outputs of a block.
        rows: u64,
        /// Inputs of a block.
        columns: u64,
    },
    /// Blocks along the input, as GGUF's tensor types say for each tensor.
    Gguf,
    /// EXL2: groups of inputs with bits of their own; outputs in groups of 32 columns.
    Exl2,
    /// A method that is known by name only: linear layers are held whole.
    Other {
        /// Its name as the configuration writes it.
        name: String,
    },
}

/// Something that cannot be split, by name, with the reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsplittable {
    /// What: a tensor, a layer or a part of the model.
    pub what: String,
    /// Why.
    pub reason: String,
    /// Bytes that every rank holds for it.
    pub bytes: u64,
}

/// Everything that a plan must know of a model: its dimensions and the exact bytes of every tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Where it was read from: a path, or a name for what has none.
    pub name: String,
    /// What kind of source that was.
    pub source: Source,
    /// Dimensions.
    pub dimensions: Dimensions,
    /// Every tensor, with its role and how it may be cut.
    pub tensors: Vec<Tensor>,
    /// What cannot be split, with reasons.
    pub unsplittable: Vec<Unsplittable>,
}
