//! Dimensions from the metadata of a GGUF file (keys as llama.cpp's `gguf-py/gguf/constants.py` names them).

pub(in crate::model) mod metadata;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use super::config::widest_by_bytes;
use super::gguf::{GgufFile, GgufValue};
use super::{Dimensions, Layer, Mixer, Mlp, Quantization, rotary};
use crate::error::{Error, Result};
use crate::model::config::reader::{LARGEST_DIMENSION, MOST_EXPERTS, MOST_LAYERS, quoted};
use crate::model::gguf_config::metadata::{Metadata, broken, shown};

/// Architectures that read but do not write.
const ENCODERS: &[&str] =
    &["bert", "nomic-bert", "jina-bert-v2", "t5", "t5encoder", "clip", "modern-bert", "neo-bert"];

/// Windowed layers by architecture, as llama.cpp's `llama-model.cpp` sets them: every how manieth layer sees
/// everything. Where neither this nor the file tells, a layer counts as one that sees everything: its cache can
/// then only turn out smaller than planned.
const PATTERNS: &[(&str, u64)] = &[
    ("gemma2", 2),
    ("gemma3", 6),
    ("gemma3n", 5),
    ("cohere2", 4),
    ("gpt-oss", 2),
    ("exaone4", 4),
    ("olmo2", 4),
    ("llama4", 4),
];

/// Windows that llama.cpp keeps in its code: the attention chunks of Llama 4.
const UNWRITTEN: &[(&str, u64)] = &[("llama4", 8192)];

/// Architectures whose every layer, or all but each n-th, is recurrent: name of the recurrence and that n.
const RECURRENT: &[(&str, &str, Option<u64>)] = &[
    ("mamba", "mamba", None),
    ("mamba2", "mamba", None),
    ("rwkv6", "rwkv", None),
    ("rwkv7", "rwkv", None),
    ("qwen3next", "linear_attention", Some(4)),
];

/// Architectures with two mixers in one layer.
const SIDE_BY_SIDE: &[&str] = &["falcon-h1"];

/// The dimensions that the metadata of `gguf` states; `name` is what messages call the file.
///
/// # Errors
/// Missing keys, wrong types, absurd values, dimensions that contradict each other or the tensors.
pub(crate) fn dimensions(gguf: &GgufFile, name: &str) -> Result<Dimensions> {
    let architecture = match gguf.metadata.get("general.architecture") {
        Some(GgufValue::String(text)) if !text.is_empty() => text.as_str(),
        Some(other) => {
            return Err(broken(name, format!("general.architecture is {}, wanted a name", shown(other))));
        }
        None => {
            return Err(broken(
                name,
                "there is no general.architecture; the file was not written for a model",
            ));
        }
    };
    if ENCODERS.contains(&architecture) {
        return Err(Error::NoModel {
            path: PathBuf::from(name),
            found: format!("an encoder (general.architecture \"{architecture}\")"),
            wanted: "a decoder language model (one that generates text)".to_owned(),
        });
    }
    if SIDE_BY_SIDE.contains(&architecture) {
        return Err(Error::NoModel {
            path: PathBuf::from(name),
            found: format!(
                "layers that hold attention and a state-space mixer side by side ({architecture})"
            ),
            wanted: "layers with one mixer each, whose cache can be told; such a model cannot be planned"
                .to_owned(),
        });
    }
    let metadata = Metadata { gguf, name, architecture };
    let hidden = metadata.required("embedding_length", LARGEST_DIMENSION)?;
    let count = metadata.required("block_count", MOST_LAYERS)?;
    let count = usize::try_from(count).map_err(|_| broken(name, "the layers do not fit into memory"))?;
    let attention = Attention::read(&metadata, hidden, count)?;
    let mixers = metadata.mixers(&attention, count)?;
    let mlps = metadata.mlps(count)?;
    let layers: Vec<Layer> = mixers.into_iter().zip(mlps).map(|(mixer, mlp)| Layer { mixer, mlp }).collect();
    let query_heads = attention.query.iter().copied().max().unwrap_or(0);
    let latent = attention.latent.is_some();
    Ok(Dimensions {
        architecture: architecture.to_owned(),
        hidden,
        vocabulary: metadata.vocabulary()?,
        query_heads,
        kv_heads: if latent { query_heads } else { attention.kv.iter().copied().max().unwrap_or(0) },
        head_dim: attention.key_dim,
        intermediate: widest_by_bytes(&layers),
        max_positions: metadata.number("context_length", 1 << 40)?,
        tied_embeddings: !gguf.tensors.iter().any(|tensor| tensor.name == "output.weight"),
        // llama.cpp's cache and activations are float16 unless asked otherwise.
        element_bytes: 2,
        layers,
        quantization: if gguf.tensors.iter().any(|tensor| tensor.block > 1) {
            Quantization::Gguf
        } else {
            Quantization::None
        },
        rotary: rotary::of_gguf(&metadata, attention.key_dim),
    })
}

struct Attention {
    query: Vec<u64>,
    kv: Vec<u64>,
    key_dim: u64,
    value_dim: u64,
    /// Latent and rotary dimensions of multi-head latent attention.
    latent: Option<(u64, u64)>,
}

impl Attention {
    fn read(metadata: &Metadata<'_>, hidden: u64, layers: usize) -> Result<Self> {
        let name = metadata.name;
        let recurrent = RECURRENT.iter().any(|entry| entry.0 == metadata.architecture && entry.2.is_none());
        let query = match metadata.per_layer("attention.head_count", layers, LARGEST_DIMENSION)? {
            Some(query) => query,
            None if recurrent => vec![0; layers],
            None => return Err(metadata.missing("attention.head_count")),
        };
        let kv = metadata
            .per_layer("attention.head_count_kv", layers, LARGEST_DIMENSION)?
            .unwrap_or_else(|| query.clone());
        let most = query.iter().copied().max().unwrap_or(0);
        if most == 0 && !recurrent {
            return Err(broken(name, "attention.head_count is 0, wanted at least one head"));
        }
        let bad = query
            .iter()
            .zip(&kv)
            .enumerate()
            .find(|(_, (query, kv))| query.checked_rem(**kv).unwrap_or(0) != 0);
        if let Some((layer, (query, kv))) = bad {
            return Err(Error::Contradiction {
                source_name: name.to_owned(),
                left: format!("{query} attention heads in layer {layer}"),
                right: format!("{kv} key and value heads, of which they are no multiple"),
                remedy: "convert the model again".to_owned(),
            });
        }
        let key = metadata.number("attention.key_length", LARGEST_DIMENSION)?;
        let value = metadata.number("attention.value_length", LARGEST_DIMENSION)?;
        let derived = match (key, hidden.checked_rem(most)) {
            (Some(key), _) => key,
            (None, Some(0)) => hidden / most.max(1),
            (None, None) => 0,
            (None, Some(_)) => {
                return Err(Error::Contradiction {
                    source_name: name.to_owned(),
                    left: format!("an embedding length of {hidden}"),
                    right: format!("{most} attention heads, which do not divide it"),
                    remedy: "convert the model again, with attention.key_length".to_owned(),
                });
            }
        };
        let latent = metadata.number("attention.kv_lora_rank", LARGEST_DIMENSION)?.filter(|rank| *rank > 0);
        let latent = match latent {
            Some(rank) => Some((rank, metadata.required("rope.dimension_count", LARGEST_DIMENSION)?)),
            None => None,
        };
        // Newer conversions of latent attention state the compressed lengths, and the heads' own beside them.
        let own = metadata.number("attention.key_length_mla", LARGEST_DIMENSION)?;
        let key_dim = if latent.is_some() { own.unwrap_or(derived) } else { derived };
        if most.checked_mul(key_dim.max(1)).is_none_or(|columns| columns > LARGEST_DIMENSION) {
            return Err(broken(
                name,
                format!("{most} heads of {key_dim} elements are more than {LARGEST_DIMENSION} columns"),
            ));
        }
        Ok(Self { query, kv, key_dim, value_dim: value.unwrap_or(key_dim), latent })
    }
}

impl Metadata<'_> {
    fn mixers(&self, attention: &Attention, layers: usize) -> Result<Vec<Mixer>> {
        let window = self.number("attention.sliding_window", LARGEST_DIMENSION)?.filter(|window| *window > 0);
        let window = window
            .or_else(|| UNWRITTEN.iter().find(|entry| entry.0 == self.architecture).map(|entry| entry.1));
        let listed = PATTERNS.iter().find(|entry| entry.0 == self.architecture).map(|entry| entry.1);
        // A number is "every how manieth layer sees everything"; an array says it of each layer.
        let list = self.value("attention.sliding_window_pattern").and_then(|found| found.1.as_numbers());
        let (pattern, each) = match list {
            Some(list) => {
                self.length("attention.sliding_window_pattern", &list, layers)?;
                (None, Some(list))
            }
            None => (self.number("attention.sliding_window_pattern", MOST_LAYERS)?.or(listed), None),
        };
        let windowed = |layer: u64| match (&each, pattern) {
            (Some(each), _) => {
                each.get(usize::try_from(layer).unwrap_or(usize::MAX)).is_some_and(|flag| *flag != 0.0)
            }
            (None, Some(pattern)) => (layer + 1).checked_rem(pattern) != Some(0),
            (None, None) => false,
        };
        let (named, state, recurrent) = self.recurrences(&attention.kv)?;
        let heads = attention.query.iter().zip(&attention.kv).zip(recurrent).zip(0_u64..);
        Ok(heads
            .map(|(((query, kv), recurrent), layer)| match (recurrent, attention.latent) {
                (true, _) => Mixer::Recurrent { name: named.to_owned(), state_elements: state },
                _ if *query == 0 || *kv == 0 => Mixer::None,
                (_, Some((latent_dim, rope_dim))) => {
                    Mixer::Latent { query_heads: *query, latent_dim, rope_dim }
                }
                _ => Mixer::Attention {
                    query_heads: *query,
                    kv_heads: *kv,
                    key_dim: attention.key_dim,
                    value_dim: attention.value_dim,
                    window: window.filter(|_| windowed(layer)),
                },
            })
            .collect())
    }

    /// Name and state of the recurrence, and which layers have it: those with its tensors, else by the metadata.
    fn recurrences(&self, kv: &[u64]) -> Result<(&'static str, u64, Vec<bool>)> {
        let listed = RECURRENT.iter().find(|entry| entry.0 == self.architecture);
        let named = listed.map_or("mamba", |entry| entry.1);
        if listed.is_none() && self.number("ssm.state_size", LARGEST_DIMENSION)?.is_none() {
            return Ok((named, 0, vec![false; kv.len()]));
        }
        let state = self.state_elements()?;
        if let Some(layers) = self.layers_with("ssm_conv1d.weight", kv.len()) {
            return Ok((named, state, layers));
        }
        let interval = match self.number("full_attention_interval", MOST_LAYERS)? {
            Some(interval) if interval > 0 => Some(interval),
            _ => listed.and_then(|entry| entry.2),
        };
        // Hybrids write no KV heads for layers without attention.
        let one = |(kv, layer): (&u64, u64)| match interval {
            Some(interval) => (layer + 1) % interval != 0,
            None => listed.is_some() || *kv == 0,
        };
        Ok((named, state, kv.iter().zip(0_u64..).map(one).collect()))
    }

    /// The recurrence's matrix and its short convolution (llama.cpp's `n_embd_s` and `n_embd_r`).
    fn state_elements(&self) -> Result<u64> {
        let hidden = self.required("embedding_length", LARGEST_DIMENSION)?;
        if self.architecture.starts_with("rwkv") {
            let head = self.required("wkv.head_size", LARGEST_DIMENSION)?;
            return hidden
                .checked_mul(head + 2)
                .ok_or_else(|| broken(self.name, "the state has more than 2^64 elements"));
        }
        let inner = self.required("ssm.inner_size", LARGEST_DIMENSION)?;
        let state = self.required("ssm.state_size", LARGEST_DIMENSION)?;
        let kernel = self.required("ssm.conv_kernel", LARGEST_DIMENSION)?;
        let groups = self.number("ssm.group_count", LARGEST_DIMENSION)?.unwrap_or(0);
        // Below 2^24 each: no sum or product of these reaches 2^64 but the last.
        let convolved =
            (2 * groups * state).checked_add(inner).and_then(|columns| columns.checked_mul(kernel - 1));
        (inner * state)
            .checked_add(convolved.unwrap_or(u64::MAX))
            .ok_or_else(|| broken(self.name, "the state has more than 2^64 elements"))
    }

    fn mlps(&self, layers: usize) -> Result<Vec<Mlp>> {
        let dense = self.per_layer("feed_forward_length", layers, LARGEST_DIMENSION)?;
        let experts = self.number("expert_count", MOST_EXPERTS)?.filter(|count| *count > 1);
        let Some(count) = experts else {
            let bare = RECURRENT.iter().any(|entry| entry.0 == self.architecture);
            return match dense {
                Some(widths) => Ok(widths
                    .into_iter()
                    .map(|width| if width == 0 { Mlp::None } else { Mlp::Dense { width } })
                    .collect()),
                None if bare => Ok(vec![Mlp::None; layers]),
                None => Err(self.missing("feed_forward_length")),
            };
        };
        let active = self.required("expert_used_count", MOST_EXPERTS)?;
        if active > count {
            return Err(Error::Contradiction {
                source_name: self.name.to_owned(),
                left: format!("{active} experts a token"),
                right: format!("{count} experts in all"),
                remedy: "convert the model again".to_owned(),
            });
        }
        let widest = dense.as_ref().and_then(|widths| widths.iter().copied().max());
        let width = match (self.number("expert_feed_forward_length", LARGEST_DIMENSION)?, widest) {
            (Some(width), _) | (None, Some(width)) if width > 0 => width,
            _ => return Err(self.missing("expert_feed_forward_length")),
        };
        // Llama 4 and others say nothing of their shared expert; its tensors do.
        let shared = self.gguf.tensors.iter().find(|tensor| tensor.name.ends_with(".ffn_up_shexp.weight"));
        let shared =
            shared.and_then(|tensor| tensor.shape.first().copied()).filter(|w| *w <= LARGEST_DIMENSION);
        let shared_width =
            match (shared, self.number("expert_shared_feed_forward_length", LARGEST_DIMENSION)?) {
                (Some(width), _) | (None, Some(width)) => width,
                _ => width.saturating_mul(self.number("expert_shared_count", MOST_EXPERTS)?.unwrap_or(0)),
            };
        let first = self.number("leading_dense_block_count", MOST_LAYERS)?.unwrap_or(0);
        let step = self.number("interleave_moe_layer_step", MOST_LAYERS)?.unwrap_or(1).max(1);
        let dense = dense.unwrap_or_else(|| vec![0; layers]);
        // A layer with a router has experts, whatever the metadata leaves out.
        let sparse = self.layers_with("ffn_gate_inp.weight", layers).unwrap_or_else(|| {
            (0_u64..).take(layers).map(|layer| layer >= first && (layer + 1) % step == 0).collect()
        });
        Ok(dense
            .into_iter()
            .zip(sparse)
            .map(|(dense, sparse)| {
                if sparse {
                    Mlp::Experts { count, active, width, shared_width }
                } else if dense == 0 {
                    Mlp::None
                } else {
                    Mlp::Dense { width: dense }
                }
            })
            .collect())
    }

    /// From its own key, else from the tokens, else from the embedding's rows.
    fn vocabulary(&self) -> Result<u64> {
        if let Some(size) = self.number("vocab_size", LARGEST_DIMENSION)?.filter(|size| *size > 0) {
            return Ok(size);
        }
        // The embedding may be padded beyond the tokens; its rows are what is split.
        let rows = self.gguf.tensors.iter().find(|tensor| tensor.name == "token_embd.weight");
        let tokens = match self.gguf.metadata.get("tokenizer.ggml.tokens") {
            Some(GgufValue::Array(words)) => Some(words.length),
            _ => None,
        };
        let size = rows.and_then(|tensor| tensor.shape.first().copied()).or(tokens);
        size.filter(|size| (1..=LARGEST_DIMENSION).contains(size)).ok_or_else(|| {
            broken(
                self.name,
                format!(
                    "the vocabulary's size is missing: looked for {}, the tensor token_embd.weight and \
                     tokenizer.ggml.tokens, found {size:?}; convert the model again",
                    quoted(&[&self.key("vocab_size")])
                ),
            )
        })
    }
}
