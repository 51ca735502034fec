//! Dimensions from a transformers `config.json`, by general rules; what architectures do differently is in
//! tables (`config_defaults.rs`, `config_layers.rs`), and no checkpoint is named anywhere.

pub(in crate::model) mod decoder;
pub(in crate::model) mod defaults;
pub(in crate::model) mod layers;
pub(in crate::model) mod mlp;
pub(in crate::model) mod quantization;
pub(in crate::model) mod reader;
#[cfg(test)]
mod tests;

use serde_json::Value;

use super::{Dimensions, Layer, Mixer, Mlp, rotary};
use crate::error::{Error, Result};
use crate::model::config::decoder::decoder;
use crate::model::config::layers::{Kind, kinds};
use crate::model::config::mlp::mlps;
use crate::model::config::quantization::quantization;
use crate::model::config::reader::{Config, LARGEST_DIMENSION, MOST_LAYERS, short};

const HIDDEN: &[&str] = &["hidden_size", "n_embd", "d_model", "n_embed", "model_dim"];
const LAYERS: &[&str] = &["num_hidden_layers", "n_layer", "n_layers", "num_layers"];
const QUERY_HEADS: &[&str] = &["num_attention_heads", "n_head", "n_heads", "num_heads"];
const KV_HEADS: &[&str] =
    &["num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "num_query_groups"];
const HEAD_DIM: &[&str] = &["head_dim", "kv_channels", "attention_head_dim", "head_size"];
pub(super) const VOCABULARY: &[&str] = &["vocab_size", "padded_vocab_size", "n_vocab"];
const POSITIONS: &[&str] = &[
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
    "model_max_length",
];

/// The dimensions of the language model that `config`, a transformers `config.json`, describes.
///
/// `name` is what messages call it. Keys that a published configuration leaves out get the value that the
/// architecture's class gives them; an unknown `model_type` is no error as long as the usual keys are there.
/// Where no dtype is written, elements are taken to be of 2 bytes.
///
/// # Errors
/// Missing keys, wrong types, absurd values, dimensions that contradict each other, and configurations of models
/// that are not decoders.
pub(crate) fn dimensions(config: &Value, name: &str) -> Result<Dimensions> {
    let config = Config::open(config, name)?;
    decoder(&config)?;
    let hidden = config.required(HIDDEN, "the hidden size")?;
    let layers = layer_count(&config)?;
    let vocabulary = config.required(VOCABULARY, "the vocabulary's size")?;
    let kinds = kinds(&config, layers)?;
    let attends = kinds.iter().any(|kind| matches!(kind, Kind::Full | Kind::Window(_)));
    let attention = attends.then(|| Attention::read(&config, hidden, layers)).transpose()?;
    let mixers = kinds.iter().enumerate().map(|(layer, kind)| mixer(kind, layer, attention.as_ref()));
    let layers: Vec<Layer> = {
        let mixers = mixers.collect::<Result<Vec<_>>>()?;
        let mlps = mlps(&config, hidden, &mixers)?;
        mixers.into_iter().zip(mlps).map(|(mixer, mlp)| Layer { mixer, mlp }).collect()
    };
    let (query_heads, kv_heads, head_dim) = attention.as_ref().map_or((0, 0, 0), Attention::largest);
    Ok(Dimensions {
        architecture: config.architecture().to_owned(),
        hidden,
        vocabulary,
        query_heads,
        kv_heads,
        head_dim,
        intermediate: widest_by_bytes(&layers),
        max_positions: config.positions(POSITIONS)?,
        // What transformers assumed for every class that does not say otherwise, and did not write down.
        tied_embeddings: config.flag_anywhere(&["tie_word_embeddings"])?.unwrap_or(true),
        element_bytes: element_bytes(&config)?,
        layers,
        quantization: quantization(&config)?,
        rotary: rotary::of_config(&config),
    })
}

fn layer_count(config: &Config<'_>) -> Result<usize> {
    let layers = match config.size(LAYERS)? {
        Some(layers) => layers,
        // Nemotron-H says it with the list alone.
        None => match config.texts(&["layer_types", "layers_block_type"])? {
            Some((_, list)) if !list.is_empty() => list.len() as u64,
            _ => return Err(config.missing(LAYERS, "the number of layers")),
        },
    };
    usize::try_from(layers).ok().filter(|_| layers <= MOST_LAYERS).ok_or_else(|| {
        config.broken(format!("{layers} layers, wanted 1 to {MOST_LAYERS}; correct the number of layers"))
    })
}

/// What the attention layers have in common.
enum Attention {
    /// One entry a layer.
    Heads { query: Vec<u64>, kv: Vec<u64>, head_dim: u64, full_head_dim: u64, value_dim: Option<u64> },
    /// Multi-head latent attention.
    Latent { query: u64, latent: u64, rope: u64, head_dim: u64 },
}

impl Attention {
    fn read(config: &Config<'_>, hidden: u64, layers: usize) -> Result<Self> {
        let query = config
            .per_layer(QUERY_HEADS, layers, LARGEST_DIMENSION)?
            .ok_or_else(|| config.missing(QUERY_HEADS, "the number of attention heads"))?;
        let most = query.iter().copied().max().unwrap_or(0);
        if most == 0 {
            return Err(
                config.broken(format!("the number of attention heads is 0, wanted 1 to {LARGEST_DIMENSION}"))
            );
        }
        if let Some(latent) = config.size(&["kv_lora_rank"])? {
            let rope = config.required(&["qk_rope_head_dim"], "the dimension of the rotary key")?;
            let plain = config.required(&["qk_nope_head_dim"], "the dimension of the plain key")?;
            config.required(&["v_head_dim"], "the dimension of a value head")?;
            if let Some((key, value)) = config.get(&["index_head_dim"]) {
                return Err(Error::NoModel {
                    path: config.name().into(),
                    found: format!(
                        "sparse attention whose indexer caches keys of its own ({key} {})",
                        short(value)
                    ),
                    wanted: "attention whose cache can be told; such a model cannot be planned".to_owned(),
                });
            }
            return Ok(Self::Latent { query: most, latent, rope, head_dim: plain + rope });
        }
        let kv = kv_heads(config, &query)?;
        let head_dim = match config.size(HEAD_DIM)? {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(most) => hidden / most,
            None => {
                return Err(config.contradiction(
                    format!("a hidden size of {hidden}"),
                    format!("{most} attention heads, which do not divide it"),
                    "give \"head_dim\", or correct one of the two",
                ));
            }
        };
        // Gemma 4 widens the heads of its global layers.
        let full_head_dim = config.size(&["global_head_dim"])?.unwrap_or(head_dim);
        if most.checked_mul(head_dim.max(full_head_dim)).is_none_or(|columns| columns > LARGEST_DIMENSION) {
            return Err(config.broken(format!(
                "{most} heads of {} elements are more than {LARGEST_DIMENSION} columns; correct one of the two",
                head_dim.max(full_head_dim)
            )));
        }
        let value_dim = config.size(&["v_head_dim"])?;
        Ok(Self::Heads { query, kv, head_dim, full_head_dim, value_dim })
    }

    /// Query heads, KV heads and head dimension of the layers that have the most.
    fn largest(&self) -> (u64, u64, u64) {
        match self {
            Self::Heads { query, kv, head_dim, .. } => {
                (query.iter().copied().max().unwrap_or(0), kv.iter().copied().max().unwrap_or(0), *head_dim)
            }
            Self::Latent { query, head_dim, .. } => (*query, *query, *head_dim),
        }
    }
}

/// KV heads of each layer.
fn kv_heads(config: &Config<'_>, queries: &[u64]) -> Result<Vec<u64>> {
    // Falcon and StarCoder 1 write MQA as a flag; Falcon's newer layout has groups beside it.
    let grouped = config.flag(&["new_decoder_architecture"])?.unwrap_or(false);
    let single = config.flag(&["multi_query"])?.unwrap_or(false) && !grouped;
    let ungrouped = config.flag(&["multi_query_attention"])? == Some(false);
    if single {
        return Ok(vec![1; queries.len()]);
    }
    if ungrouped {
        return Ok(queries.to_vec());
    }
    let written = config.get(KV_HEADS).is_some();
    let Some(kv) = config.per_layer(KV_HEADS, queries.len(), LARGEST_DIMENSION)? else {
        return Ok(queries.to_vec());
    };
    for (layer, (query, kv)) in queries.iter().zip(&kv).enumerate() {
        let divides = (*kv == 0 && *query == 0) || query.checked_rem(*kv) == Some(0);
        if !divides && !written {
            // The class default is made for other numbers of heads.
            return Ok(queries.to_vec());
        }
        if !divides {
            return Err(config.contradiction(
                format!("{query} attention heads in layer {layer}"),
                format!("{kv} key and value heads, of which they are no multiple"),
                "correct one of the two",
            ));
        }
    }
    Ok(kv)
}

fn mixer(kind: &Kind, layer: usize, attention: Option<&Attention>) -> Result<Mixer> {
    let window = match kind {
        Kind::None => return Ok(Mixer::None),
        Kind::Recurrent { name, state_elements } => {
            return Ok(Mixer::Recurrent { name: (*name).to_owned(), state_elements: *state_elements });
        }
        Kind::Full => None,
        Kind::Window(window) => Some(*window),
    };
    Ok(match attention {
        Some(Attention::Latent { query, latent, rope, .. }) => {
            Mixer::Latent { query_heads: *query, latent_dim: *latent, rope_dim: *rope }
        }
        Some(Attention::Heads { query, kv, head_dim, full_head_dim, value_dim }) => {
            let dim = if window.is_none() { *full_head_dim } else { *head_dim };
            let query_heads = query.get(layer).copied().unwrap_or(0);
            if query_heads == 0 {
                return Ok(Mixer::None);
            }
            let kv_heads = kv.get(layer).copied().unwrap_or(0);
            Mixer::Attention {
                query_heads,
                kv_heads,
                key_dim: dim,
                value_dim: value_dim.unwrap_or(dim),
                window,
            }
        }
        None => Mixer::None,
    })
}

/// The width whose MLPs hold the most bytes over all layers; 0 where there are none.
pub(super) fn widest_by_bytes(layers: &[Layer]) -> u64 {
    let mut columns: Vec<(u64, u64)> = Vec::new();
    let mut add = |width: u64, all: u64| match columns.iter_mut().find(|entry| entry.0 == width) {
        Some(entry) => entry.1 = entry.1.saturating_add(all),
        None => columns.push((width, all)),
    };
    for layer in layers {
        match layer.mlp {
            Mlp::Dense { width } => add(width, width),
            Mlp::Experts { count, width, shared_width, .. } => {
                add(width, count.saturating_mul(width));
                add(shared_width, shared_width);
            }
            Mlp::None => {}
        }
    }
    columns.into_iter().max_by_key(|(width, all)| (*all, *width)).map_or(0, |entry| entry.0)
}

/// The dtype that the configuration names, as safetensors writes it, and its bytes an element.
pub(super) fn dtype(config: &Config<'_>) -> Result<(&'static str, u64)> {
    let Some((key, value)) = config.get_anywhere(&["torch_dtype", "dtype"]) else { return Ok(("BF16", 2)) };
    // A wrapper may write one dtype a part, the rest under "".
    let value =
        value.as_object().and_then(|map| map.get("text_config").or_else(|| map.get(""))).unwrap_or(value);
    let text = value.as_str().unwrap_or_default();
    match text.trim_start_matches("torch.") {
        // Activations of float8 checkpoints are of 2 bytes.
        "bfloat16" | "auto" | "float8_e4m3fn" | "float8_e5m2" => Ok(("BF16", 2)),
        "float16" | "half" => Ok(("F16", 2)),
        "float32" | "float" => Ok(("F32", 4)),
        "float64" | "double" => Ok(("F64", 8)),
        _ => Err(config.broken(format!(
            "{key} is {}, wanted \"bfloat16\", \"float16\", \"float32\" or \"float64\"",
            short(value)
        ))),
    }
}

fn element_bytes(config: &Config<'_>) -> Result<u64> {
    dtype(config).map(|dtype| dtype.1)
}
