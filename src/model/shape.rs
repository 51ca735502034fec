//! [`ModelShape`]: everything that a plan must know of a model.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    RawTensor, Role, Tensor, check, checkpoint, config, exllamav2, from_headers, gguf_config, inventory,
    roles,
};
use crate::error::{Error, Result};
use crate::model::roles::names::{self, Leaf};

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
    /// How positions are rotated, as the fields of a transformers `config.json` say it; `None` where the model does
    /// not rotate them, or what was read does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotary: Option<Map<String, Value>>,
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

impl ModelShape {
    /// Reads the model at `path`: a folder with `config.json` and safetensors files, a GGUF file, or a part of those.
    ///
    /// Only headers and configurations are read, never weights. Headers give the exact bytes of every tensor;
    /// without them the tensors are those that the architecture is known to have, without a configuration the
    /// dimensions are taken from the headers as far as they go.
    ///
    /// # Errors
    /// [`Error::File`] for what cannot be read, [`Error::NoModel`] for a path that holds no model,
    /// [`Error::BrokenHeader`] and [`Error::MissingShard`] for broken files, [`Error::UnknownArchitecture`] for a lone
    /// configuration of an unknown architecture, [`Error::Contradiction`] where configuration and headers disagree
    /// or tensors are missing.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_checkpoint(checkpoint::find(path.as_ref())?)
    }

    /// The shape of a transformers configuration (the object in `config.json`), without any checkpoint.
    ///
    /// # Errors
    /// [`Error::BrokenHeader`] or [`Error::Contradiction`] for values that cannot be, [`Error::UnknownArchitecture`]
    /// for a `model_type` whose tensors are not known.
    pub fn from_config(config: &Value, name: &str) -> Result<Self> {
        let dimensions = config::dimensions(config, name)?;
        let tensors = inventory::tensors(config, &dimensions, name)?;
        Ok(Self::classified(name.to_owned(), Source::Config, tensors, dimensions))
    }

    /// The shape of an ExLlamaV2-like configuration object, given as a JSON object of its attributes.
    ///
    /// Wanted are `hidden_size`, `intermediate_size`, `vocab_size`, `num_attention_heads`, `num_key_value_heads`,
    /// `head_dim` and `num_hidden_layers`; `num_key_value_groups`, `max_seq_len` and `arch_string` are used if they are
    /// there. With `model_dir` the headers in that folder give the exact bytes. Without it the weights are taken to
    /// be those of a Llama in float16, and the name says so: how many bits EXL2 gives a weight is in no attribute.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for attributes that are missing, zero or not whole numbers,
    /// [`Error::Contradiction`] where they disagree with each other or with `model_dir`, and those of
    /// [`ModelShape::open`] for `model_dir`.
    pub fn from_exllamav2(attributes: &Value, name: &str) -> Result<Self> {
        let dimensions = exllamav2::dimensions(attributes, name)?;
        let folder = match attributes.get("model_dir") {
            None | Some(Value::Null) => None,
            Some(Value::String(folder)) => Some(folder),
            Some(other) => return Err(Error::invalid("model_dir", other, "a path, or nothing")),
        };
        let Some(folder) = folder else {
            let tensors = exllamav2::llama_tensors(&dimensions)?;
            let name = format!("{name} (no model_dir: weights of a Llama in float16)");
            return Ok(Self::classified(name, Source::ExLlamaV2, tensors, dimensions));
        };
        let found = checkpoint::find(Path::new(folder))?;
        let max_positions = dimensions.max_positions;
        let mut shape = match (&found.config, found.tensors) {
            (None, Some(tensors)) => {
                Self::assemble(name.to_owned(), Source::ExLlamaV2, tensors, dimensions, false)?
            }
            (config, tensors) => {
                let config = config.clone();
                let shape = Self::from_checkpoint(checkpoint::Checkpoint { config, tensors, ..found })?;
                exllamav2::agree(&dimensions, &shape.dimensions, name)?;
                Self { name: name.to_owned(), source: Source::ExLlamaV2, ..shape }
            }
        };
        shape.dimensions.max_positions = max_positions.or(shape.dimensions.max_positions);
        Ok(shape)
    }

    /// Bytes of all tensors, each once.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.tensors.iter().fold(0, |sum, tensor| sum.saturating_add(tensor.bytes))
    }

    /// The tensor of this name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// The tensors of one role, in the order of the checkpoint.
    pub fn with_role(&self, role: Role) -> impl Iterator<Item = &Tensor> {
        self.tensors.iter().filter(move |tensor| tensor.role == role)
    }

    fn from_checkpoint(found: checkpoint::Checkpoint) -> Result<Self> {
        let name = found.name;
        if let Some(gguf) = found.gguf {
            let dimensions = gguf_config::dimensions(&gguf, &name)?;
            return Self::assemble(name, Source::Gguf, gguf.tensors, dimensions, false);
        }
        match (found.config, found.tensors) {
            (Some(config), None) => {
                Self::from_config(&with_quantization(config, found.quantize_config), &name)
            }
            (Some(config), Some(tensors)) => {
                let config = with_quantization(config, found.quantize_config);
                let dimensions = config::dimensions(&config, &name)?;
                Self::assemble(name, Source::Safetensors, tensors, dimensions, says_tied(&config))
            }
            (None, Some(tensors)) => {
                let dimensions = from_headers::dimensions(&tensors, &name)?;
                Self::assemble(name, Source::Safetensors, tensors, dimensions, false)
            }
            (None, None) => Err(Error::NoModel {
                path: name.into(),
                found: "neither a configuration nor tensor headers".to_owned(),
                wanted: "config.json, *.safetensors or *.gguf".to_owned(),
            }),
        }
    }

    /// Checks headers against dimensions, then gives every tensor its role.
    pub(crate) fn assemble(
        name: String,
        source: Source,
        mut tensors: Vec<RawTensor>,
        mut dimensions: Dimensions,
        says_tied: bool,
    ) -> Result<Self> {
        // The name of the packed weight says EXL2 even where the configuration is silent.
        if dimensions.quantization == Quantization::None
            && tensors.iter().any(|tensor| names::read(&tensor.name).leaf == Leaf::ExlWeight)
        {
            dimensions.quantization = Quantization::Exl2;
        }
        check::against(&mut tensors, &mut dimensions, says_tied, &name)?;
        Ok(Self::classified(name, source, tensors, dimensions))
    }

    fn classified(name: String, source: Source, tensors: Vec<RawTensor>, dimensions: Dimensions) -> Self {
        let (tensors, unsplittable) = roles::classify(tensors, &dimensions);
        Self { name, source, dimensions, tensors, unsplittable }
    }
}

/// Whether a configuration says itself that the head is the embedding. A default does not count: a checkpoint of a
/// model whose class has another default may well hold a head of its own.
fn says_tied(config: &Value) -> bool {
    let flag = |config: &Value| config.get("tie_word_embeddings").and_then(Value::as_bool);
    flag(config).or_else(|| config.get("text_config").and_then(flag)).unwrap_or(false)
}

/// The configuration with the settings that `AutoGPTQ` and `AutoAWQ` wrote into a file of their own.
fn with_quantization(mut config: Value, settings: Option<Value>) -> Value {
    let own = config.get("quantization_config").is_some_and(|settings| !settings.is_null());
    if let (false, Some(Value::Object(mut settings)), Some(config)) = (own, settings, config.as_object_mut())
    {
        let awq = settings.contains_key("w_bit") || settings.contains_key("q_group_size");
        settings.entry("quant_method").or_insert_with(|| Value::from(if awq { "awq" } else { "gptq" }));
        config.insert("quantization_config".to_owned(), Value::Object(settings));
    }
    config
}

#[cfg(test)]
mod tests;
