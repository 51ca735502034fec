//! Dimensions from the tensors themselves, where there is no configuration.

use std::collections::BTreeMap;

use super::{Dimensions, Layer, Mixer, Mlp, Quantization, RawTensor};
use crate::error::{Error, Result};
use crate::model::roles::names::{self, Leaf, Module, Region, Scope};

#[derive(Default)]
struct Seen {
    query: Option<u64>,
    key: Option<u64>,
    query_norm: Option<u64>,
    key_norm: Option<u64>,
    width: Option<u64>,
}

/// Dimensions of a plain transformer from its tensors: hidden size and vocabulary from the embedding, layers from
/// the names, widths from the gate, heads from the length of a per-head query or key norm.
///
/// # Errors
/// [`Error::NoModel`] where the tensors leave something open, above all the size of a head, naming what
/// `config.json` would say.
pub(crate) fn dimensions(raw: &[RawTensor], name: &str) -> Result<Dimensions> {
    let needs = |found: &str, wanted: &str| Error::NoModel {
        path: name.into(),
        found: format!("tensor headers without a configuration; {found}"),
        wanted: format!("config.json, for {wanted}; download it into the same folder"),
    };
    let mut embedding = None;
    let mut head = false;
    let mut layers: BTreeMap<u64, Seen> = BTreeMap::new();
    for tensor in raw {
        let read = names::read(&tensor.name);
        if read.region != Region::Text {
            continue;
        }
        if !matches!(read.leaf, Leaf::Weight | Leaf::Bias) {
            return Err(needs(&format!("{} is quantised", tensor.name), "how the weights are quantised"));
        }
        if read.leaf == Leaf::Bias {
            continue;
        }
        if read.recurrent
            || matches!(read.module, Module::LatentDown | Module::LatentUp | Module::LatentUpStack)
        {
            return Err(needs(
                &format!("{} is not of plain attention", tensor.name),
                "what kind of attention each layer has",
            ));
        }
        if matches!(read.scope, Scope::Expert(_) | Scope::Stacked | Scope::Shared) {
            return Err(needs(
                &format!("{} belongs to experts", tensor.name),
                "the experts that a token uses (num_experts_per_tok)",
            ));
        }
        let (first, last) = (tensor.shape.first().copied(), tensor.shape.last().copied());
        head |= read.module == Module::Head;
        if let (Module::Embedding, [rows, columns]) = (read.module, tensor.shape.as_slice()) {
            embedding = Some((*rows, *columns, element_bytes(&tensor.dtype)));
        }
        let Some(layer) = read.layer else { continue };
        let seen = layers.entry(layer).or_default();
        match read.module {
            Module::Query => seen.query = first,
            Module::Key => seen.key = first,
            Module::QueryNorm => seen.query_norm = last,
            Module::KeyNorm => seen.key_norm = last,
            Module::Gate => seen.width = first,
            Module::Up if seen.width.is_none() => seen.width = first,
            Module::GateUp => seen.width = first.map(|n| n / 2),
            _ => {}
        }
    }
    let (vocabulary, hidden, element_bytes) =
        embedding.ok_or_else(|| needs("there is no token embedding", "every dimension"))?;
    let layers = layers
        .iter()
        .zip(0_u64..)
        .map(|((&index, seen), wanted)| {
            if index != wanted {
                return Err(needs(&format!("layer {wanted} is missing"), "the number of layers"));
            }
            layer(seen).ok_or_else(|| {
                needs(
                    &format!(
                        "layer {index} has no norm over single heads that would tell the size of a head"
                    ),
                    "the head size (head_dim or num_attention_heads)",
                )
            })
        })
        .collect::<Result<Vec<Layer>>>()?;
    let Some(Layer {
        mixer: Mixer::Attention { query_heads, kv_heads, key_dim, .. },
        mlp: Mlp::Dense { width },
    }) = layers.first().cloned()
    else {
        return Err(needs("they have no layers", "every dimension"));
    };
    Ok(Dimensions {
        architecture: "unknown".to_owned(),
        hidden,
        vocabulary,
        query_heads,
        kv_heads,
        head_dim: key_dim,
        intermediate: width,
        max_positions: None,
        tied_embeddings: !head,
        element_bytes,
        layers,
        quantization: Quantization::None,
        rotary: None,
    })
}

/// A layer, if its norms tell the size of a head: a norm over all heads is as long as the projection.
fn layer(seen: &Seen) -> Option<Layer> {
    let (query, key) = (seen.query?, seen.key?);
    let head = seen.query_norm.or(seen.key_norm)?;
    let per_head = head > 0 && query % head == 0 && key % head == 0 && head < query;
    let width = seen.width?;
    per_head.then_some(Layer {
        mixer: Mixer::Attention {
            query_heads: query / head,
            kv_heads: key / head,
            key_dim: head,
            value_dim: head,
            window: None,
        },
        mlp: Mlp::Dense { width },
    })
}

fn element_bytes(dtype: &str) -> u64 {
    match dtype {
        "F64" => 8,
        "F32" => 4,
        _ => 2,
    }
}

#[cfg(test)]
mod tests;
