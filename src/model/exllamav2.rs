//! Dimensions from the attributes of an ExLlamaV2-like configuration object.

use serde_json::Value;

use super::{Dimensions, Layer, Mixer, Mlp, Quantization, RawTensor};
use crate::error::{Error, Result};

/// The largest value that is believed of any attribute.
const LARGEST: u64 = 1 << 40;
/// The most layers that are believed.
const MOST_LAYERS: u64 = 1 << 16;

/// Dimensions as `ExLlamaV2Config` writes them (`exllamav2/config.py`): every layer alike, softmax attention, one
/// gated MLP. `max_seq_len` counts as the positions that the model was made for.
///
/// # Errors
/// [`Error::InvalidArgument`] for a missing, zero or negative attribute, [`Error::Contradiction`] where heads and
/// groups disagree.
pub(crate) fn dimensions(attributes: &Value, name: &str) -> Result<Dimensions> {
    let hidden = number(attributes, "hidden_size")?;
    let intermediate = number(attributes, "intermediate_size")?;
    let vocabulary = number(attributes, "vocab_size")?;
    let query_heads = number(attributes, "num_attention_heads")?;
    let kv_heads = number(attributes, "num_key_value_heads")?;
    let head_dim = number(attributes, "head_dim")?;
    let layers = number(attributes, "num_hidden_layers")?;
    if layers > MOST_LAYERS {
        return Err(Error::invalid("num_hidden_layers", layers, format!("at most {MOST_LAYERS}")));
    }
    if attributes.get("num_key_value_groups").is_some_and(|groups| !groups.is_null()) {
        let groups = number(attributes, "num_key_value_groups")?;
        if kv_heads.checked_mul(groups) != Some(query_heads) {
            return Err(Error::Contradiction {
                source_name: name.to_owned(),
                left: format!("num_attention_heads {query_heads}"),
                right: format!("num_key_value_heads {kv_heads} x num_key_value_groups {groups}"),
                remedy: "correct the attribute that is wrong".to_owned(),
            });
        }
    } else if query_heads % kv_heads != 0 {
        return Err(Error::Contradiction {
            source_name: name.to_owned(),
            left: format!("num_attention_heads {query_heads}"),
            right: format!("num_key_value_heads {kv_heads}, which does not divide it"),
            remedy: "correct the attribute that is wrong".to_owned(),
        });
    }
    let max_positions = match attributes.get("max_seq_len") {
        None | Some(Value::Null) => None,
        Some(_) => Some(number(attributes, "max_seq_len")?),
    };
    let layer = Layer {
        mixer: Mixer::Attention {
            query_heads,
            kv_heads,
            key_dim: head_dim,
            value_dim: head_dim,
            window: None,
        },
        mlp: Mlp::Dense { width: intermediate },
    };
    let layers = usize::try_from(layers).unwrap_or(0);
    Ok(Dimensions {
        architecture: attributes.get("arch_string").and_then(Value::as_str).unwrap_or("unknown").to_owned(),
        hidden,
        vocabulary,
        query_heads,
        kv_heads,
        head_dim,
        intermediate,
        max_positions,
        tied_embeddings: false,
        element_bytes: 2,
        layers: vec![layer; layers],
        quantization: Quantization::None,
        rotary: None,
    })
}

/// Says where the attributes and the configuration in the model's folder disagree.
///
/// # Errors
/// [`Error::Contradiction`] with both values.
pub(crate) fn agree(attributes: &Dimensions, folder: &Dimensions, name: &str) -> Result<()> {
    let pairs = [
        ("hidden_size", attributes.hidden, folder.hidden),
        ("num_attention_heads", attributes.query_heads, folder.query_heads),
        ("num_key_value_heads", attributes.kv_heads, folder.kv_heads),
        ("head_dim", attributes.head_dim, folder.head_dim),
        ("num_hidden_layers", attributes.layers.len() as u64, folder.layers.len() as u64),
    ];
    match pairs.into_iter().find(|(_, left, right)| left != right) {
        None => Ok(()),
        Some((key, left, right)) => Err(Error::Contradiction {
            source_name: name.to_owned(),
            left: format!("{key} {left} of the attributes"),
            right: format!("{right} of the model's folder"),
            remedy: "give the model_dir that the attributes were read from".to_owned(),
        }),
    }
}

/// The tensors of a Llama model of these dimensions, in float16.
///
/// # Errors
/// [`Error::InvalidArgument`] where the bytes do not fit 64 bits.
pub(crate) fn llama_tensors(dimensions: &Dimensions) -> Result<Vec<RawTensor>> {
    let Dimensions { hidden, vocabulary, query_heads, kv_heads, head_dim, intermediate, .. } = *dimensions;
    let mut tensors = Vec::new();
    let mut total = 0_u64;
    let mut add = |name: String, shape: &[u64]| {
        let bytes = shape.iter().try_fold(2_u64, |product, &n| product.checked_mul(n));
        let sum = bytes.and_then(|bytes| total.checked_add(bytes));
        let (Some(bytes), Some(sum)) = (bytes, sum) else {
            return Err(Error::invalid(
                name,
                format!("shape {shape:?}"),
                "dimensions whose bytes fit 64 bits",
            ));
        };
        total = sum;
        tensors.push(RawTensor { name, dtype: "F16".to_owned(), shape: shape.to_vec(), bytes, block: 1 });
        Ok(())
    };
    let (query, key) = (query_heads.saturating_mul(head_dim), kv_heads.saturating_mul(head_dim));
    add("model.embed_tokens.weight".to_owned(), &[vocabulary, hidden])?;
    for layer in 0..dimensions.layers.len() {
        for (module, shape) in [
            ("input_layernorm", [hidden].as_slice()),
            ("self_attn.q_proj", &[query, hidden]),
            ("self_attn.k_proj", &[key, hidden]),
            ("self_attn.v_proj", &[key, hidden]),
            ("self_attn.o_proj", &[hidden, query]),
            ("post_attention_layernorm", &[hidden]),
            ("mlp.gate_proj", &[intermediate, hidden]),
            ("mlp.up_proj", &[intermediate, hidden]),
            ("mlp.down_proj", &[hidden, intermediate]),
        ] {
            add(format!("model.layers.{layer}.{module}.weight"), shape)?;
        }
    }
    add("model.norm.weight".to_owned(), &[hidden])?;
    add("lm_head.weight".to_owned(), &[vocabulary, hidden])?;
    Ok(tensors)
}

fn number(attributes: &Value, key: &str) -> Result<u64> {
    let value = attributes.get(key);
    let number = value.and_then(Value::as_u64).filter(|&n| n > 0 && n <= LARGEST);
    number.ok_or_else(|| {
        let got = value.map_or_else(|| "nothing".to_owned(), Value::to_string);
        Error::invalid(key, got, format!("a whole number from 1 to {LARGEST}"))
    })
}

#[cfg(test)]
mod tests;
