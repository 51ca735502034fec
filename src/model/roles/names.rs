//! What the name of a tensor says: its layer, its module, and which of the module's tensors it is.
//!
//! Names are read by their leaf (`q_proj`, `ffn_down`, ...) and by the module that holds it, never by a model's
//! name. The prefix (`model.`, `model.language_model.`, `transformer.`, ...) does not matter.

use crate::model::roles::gguf_names;

/// What a module does, as far as its name tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Module {
    /// Query projection.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// Query, key and value in one; `interleaved` where the rows alternate between them head by head.
    Qkv {
        /// Whether the three alternate head by head (or group by group).
        interleaved: bool,
    },
    /// Projection out of the heads.
    Output,
    /// Norm of the queries.
    QueryNorm,
    /// Norm of the keys.
    KeyNorm,
    /// One logit a query head that softmax gets in addition.
    Sinks,
    /// Projections into the latent of MLA, and their norms.
    LatentDown,
    /// Projections out of the latent, into the heads.
    LatentUp,
    /// The same as a stack of one matrix a head.
    LatentUpStack,
    /// Gate of an MLP.
    Gate,
    /// Up of an MLP; GGUF and `ChatGLM` put the gate into the same tensor.
    Up,
    /// Gate and up in one.
    GateUp,
    /// Down of an MLP.
    Down,
    /// Token embedding.
    Embedding,
    /// Output head.
    Head,
    /// The last norm before the head.
    FinalNorm,
    /// Known to be held whole: norms, routers, positions.
    Small,
    /// A name that no rule knows.
    Unknown,
}

/// Which MLP of a layer a module belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Scope {
    /// The layer's own, or not in an MLP at all.
    Layer,
    /// The shared experts.
    Shared,
    /// One routed expert.
    Expert(u64),
    /// All routed experts, stacked along the outermost dimension.
    Stacked,
}

/// Which tensor of its module this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leaf {
    /// The weight itself, plain or in GGUF blocks.
    Weight,
    /// The bias.
    Bias,
    /// Packed weight of GPTQ and AWQ.
    PackedWeight,
    /// Packed zero points of GPTQ and AWQ.
    PackedZeros,
    /// Scales of GPTQ and AWQ groups; of mxfp4 under the name `..._scales`.
    Scales,
    /// Group of each input (GPTQ).
    GroupIndex,
    /// Scales of float8 blocks.
    BlockScales,
    /// Blocks of mxfp4.
    Blocks,
    /// Packed weight of EXL2.
    ExlWeight,
    /// Scales of EXL2, eight columns a word.
    ExlScale,
    /// What EXL2 keeps for all columns: groups and the order of inputs.
    ExlWhole,
    /// Anything else.
    Other,
}

/// Parts of a model that are held whole whatever their tensors are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Region {
    /// The language model.
    Text,
    /// Vision or audio tower, or the projector behind it.
    Tower,
    /// Layers that predict further tokens.
    Prediction,
    /// Attention over another model's states.
    CrossAttention,
    /// The indexer of sparse attention.
    Indexer,
}

/// A tensor's name, read.
#[derive(Debug, Clone)]
pub(crate) struct Name {
    /// The name without the leaf: the same for every tensor of one module.
    pub(crate) prefix: String,
    /// `prefix` with every number replaced by `*`.
    pub(crate) pattern: String,
    /// The layer's index.
    pub(crate) layer: Option<u64>,
    /// What its module does.
    pub(crate) module: Module,
    /// Which MLP it belongs to.
    pub(crate) scope: Scope,
    /// Which tensor of the module it is.
    pub(crate) leaf: Leaf,
    /// The part of the model it belongs to.
    pub(crate) region: Region,
    /// Whether the module's weight may be written inputs first, as GPT-2's `Conv1D` does.
    pub(crate) may_be_transposed: bool,
    /// A module between the layer and this one that names a mixer with a recurrent state.
    pub(crate) recurrent: bool,
}

const LAYER_LISTS: [&str; 6] = ["layers", "h", "blk", "blocks", "block", "layer"];

/// Reads a name. Never fails: what is not known is [`Module::Unknown`].
pub(crate) fn read(name: &str) -> Name {
    let mut segments: Vec<&str> = name.split('.').collect();
    let mut leaf = Leaf::Weight;
    // bitsandbytes hangs its state below the weight: `q_proj.weight.quant_state.bitsandbytes__nf4`.
    if let Some(at) = segments.iter().position(|s| *s == "weight")
        && at > 0
        && at + 1 < segments.len()
    {
        segments.truncate(at);
        leaf = Leaf::Other;
    } else if segments.len() > 1
        && let Some(found) = segments.last().and_then(|last| leaf_of(last))
    {
        leaf = found;
        segments.pop();
    }
    let last = segments.last().copied().unwrap_or_default();
    let (stem, suffix) = split_suffix(last);
    if let Some(suffix) = suffix {
        leaf = suffix;
    }
    if let Some(last) = segments.last_mut() {
        *last = stem;
    }
    let prefix = segments.join(".");
    let pattern = segments.iter().map(|s| if is_number(s) { "*" } else { s }).collect::<Vec<_>>().join(".");
    let (layer, in_layer) = layer_of(&segments);
    let expert = numbered(&segments, &["experts", "expert"]);
    let parent = segments.len().checked_sub(2).and_then(|i| segments.get(i)).copied().unwrap_or_default();

    let mut region = region_of(&segments);
    let (module, mut scope);
    if let Some((found, found_scope)) = gguf_names::module(&segments) {
        (module, scope) = (found, found_scope);
    } else {
        module = module_of(stem, parent, layer.is_some());
        scope = match expert {
            Some(index) => Scope::Expert(index),
            None if in_layer.contains(&"experts") => Scope::Stacked,
            None if is_stack_of_experts(stem, parent) => Scope::Stacked,
            None => Scope::Layer,
        };
        if in_layer.iter().any(|s| s.starts_with("shared_expert") || s.starts_with("shared_mlp")) {
            scope = Scope::Shared;
        }
    }
    if name.contains("nextn") {
        region = Region::Prediction;
    }
    Name {
        may_be_transposed: matches!(stem, "c_attn" | "c_proj" | "c_fc") || scope == Scope::Stacked,
        recurrent: in_layer.iter().any(|s| is_recurrent(s)),
        prefix,
        pattern,
        layer,
        module,
        scope,
        leaf,
        region,
    }
}

/// Lengths of a module: `(outputs, inputs)` where one of its tensors tells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Size {
    /// Outputs.
    pub(crate) outputs: Option<u64>,
    /// Inputs.
    pub(crate) inputs: Option<u64>,
}

fn leaf_of(segment: &str) -> Option<Leaf> {
    Some(match segment {
        "weight" => Leaf::Weight,
        "bias" => Leaf::Bias,
        "qweight" => Leaf::PackedWeight,
        "qzeros" => Leaf::PackedZeros,
        "scales" => Leaf::Scales,
        "g_idx" => Leaf::GroupIndex,
        "weight_scale_inv" => Leaf::BlockScales,
        "q_weight" => Leaf::ExlWeight,
        "q_scale" => Leaf::ExlScale,
        "q_invperm" | "q_perm" | "q_scale_max" | "q_groups" | "q_group_map" => Leaf::ExlWhole,
        "weight_scale"
        | "weight_zero_point"
        | "weight_shape"
        | "weight_packed"
        | "weight_g_idx"
        | "weight_global_scale"
        | "input_scale"
        | "input_global_scale"
        | "activation_scale"
        | "absmax"
        | "quant_map"
        | "SCB"
        | "e_score_correction_bias"
        | "inv_freq"
        | "masked_bias" => Leaf::Other,
        _ => return None,
    })
}

/// Parameters of stacked experts carry what others have as a leaf in their own name: `gate_up_proj_bias`.
fn split_suffix(segment: &str) -> (&str, Option<Leaf>) {
    for (suffix, leaf) in [
        ("_bias", Leaf::Bias),
        ("_blocks", Leaf::Blocks),
        ("_scales", Leaf::Scales),
        ("_scale_inv", Leaf::BlockScales),
    ] {
        if let Some(stem) = segment.strip_suffix(suffix)
            && stem.ends_with("_proj")
        {
            return (stem, Some(leaf));
        }
    }
    (segment, None)
}

fn is_number(segment: &str) -> bool {
    !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_digit())
}

/// The layer's index, and the segments behind it.
fn layer_of<'a>(segments: &'a [&'a str]) -> (Option<u64>, &'a [&'a str]) {
    for (i, pair) in segments.windows(2).enumerate() {
        if let [list, number] = pair
            && LAYER_LISTS.contains(list)
            && is_number(number)
        {
            return (number.parse().ok(), segments.get(i + 2..).unwrap_or_default());
        }
    }
    (None, segments)
}

fn numbered(segments: &[&str], lists: &[&str]) -> Option<u64> {
    segments.windows(2).find_map(|pair| match pair {
        [list, number] if lists.contains(list) && is_number(number) => number.parse().ok(),
        _ => None,
    })
}

fn region_of(segments: &[&str]) -> Region {
    for segment in segments {
        let starts = |prefixes: &[&str]| prefixes.iter().any(|p| segment.starts_with(p));
        if starts(&["vision", "visual", "audio", "image_", "speech", "img_", "embed_vision", "embed_audio"])
            || segment.contains("projector")
            || matches!(*segment, "v" | "mm" | "a" | "vpm" | "resampler" | "connector" | "aligner" | "merger")
        {
            return Region::Tower;
        }
        if starts(&["mtp", "nextn"]) {
            return Region::Prediction;
        }
        if starts(&["cross_attn", "cross_attention", "encoder_attn"]) {
            return Region::CrossAttention;
        }
        if *segment == "indexer" || segment.starts_with("indexer_") {
            return Region::Indexer;
        }
    }
    Region::Text
}

fn is_recurrent(segment: &str) -> bool {
    [
        "linear_attn",
        "mamba",
        "ssm",
        "short_conv",
        "shortconv",
        "time_mix",
        "temporal_block",
        "rglru",
        "recurrent",
    ]
    .iter()
    .any(|p| segment.starts_with(p))
        || segment == "conv"
}

fn is_attention(parent: &str) -> bool {
    parent.ends_with("attn") || parent.ends_with("attention") || parent == "mixer"
}

fn is_stack_of_experts(stem: &str, parent: &str) -> bool {
    parent == "block_sparse_moe" && matches!(stem, "input_linear" | "output_linear")
}

fn module_of(stem: &str, parent: &str, in_layer: bool) -> Module {
    if !in_layer {
        return match stem {
            "embed_tokens" | "wte" | "embed_in" | "word_embeddings" | "tok_embeddings" => Module::Embedding,
            // Mamba calls its token embedding `embeddings`; BERT-like models put three tables under that name.
            "embeddings" if parent == "backbone" => Module::Embedding,
            "lm_head" | "embed_out" | "output" | "output_layer" => Module::Head,
            "norm" | "ln_f" | "norm_f" | "final_layer_norm" | "final_layernorm" => Module::FinalNorm,
            "wpe" | "embed_positions" | "position_embeddings" => Module::Small,
            _ if stem.contains("norm") || stem.starts_with("rotary") => Module::Small,
            _ => Module::Unknown,
        };
    }
    match stem {
        "q_proj" | "wq" => Module::Query,
        "k_proj" | "wk" => Module::Key,
        "v_proj" | "wv" => Module::Value,
        "qkv_proj" | "c_attn" | "qkv" | "Wqkv" | "W_pack" => Module::Qkv { interleaved: false },
        "query_key_value" | "wqkv" => Module::Qkv { interleaved: true },
        "o_proj" | "wo" => Module::Output,
        "out_proj" | "dense" | "c_proj" if is_attention(parent) => Module::Output,
        "q_norm" | "q_layernorm" | "q_ln" | "query_norm" | "query_layernorm" => Module::QueryNorm,
        "k_norm" | "k_layernorm" | "k_ln" | "key_norm" | "key_layernorm" => Module::KeyNorm,
        "sinks" => Module::Sinks,
        "q_a_proj" | "kv_a_proj_with_mqa" | "q_a_layernorm" | "kv_a_layernorm" => Module::LatentDown,
        "q_b_proj" | "kv_b_proj" => Module::LatentUp,
        "gate_proj" | "w1" => Module::Gate,
        "up_proj" | "w3" | "fc1" | "fc_in" | "c_fc" | "dense_h_to_4h" => Module::Up,
        "gate_up_proj" | "input_linear" => Module::GateUp,
        "down_proj" | "c_proj" | "w2" | "fc2" | "fc_out" | "dense_4h_to_h" | "output_linear" => Module::Down,
        "gate" | "router" | "shared_expert_gate" | "bias" | "rotary_emb" => Module::Small,
        _ if parent == "router" || parent == "gate" || parent == "rotary_emb" => Module::Small,
        _ if stem.contains("norm") || stem.starts_with("ln_") => Module::Small,
        _ => Module::Unknown,
    }
}
