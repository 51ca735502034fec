//! The parameters of rotary position embeddings (arXiv 2104.09864), in the words of a transformers configuration.
//!
//! They are passed on as they are written: what makes tables of them checks them.

use serde_json::{Map, Value, json};

use crate::model::config::reader::Config;
use crate::model::gguf_config::metadata::Metadata;

/// Keys of which any says that positions are rotated.
const ROTATED: [&str; 4] = ["rope_theta", "rope_scaling", "rope_parameters", "rotary_emb_base"];
/// Keys that say of what else frequencies are made: how many columns of a head rotate, over how many positions.
const BESIDE: [&str; 13] = [
    "model_type",
    "rope_local_base_freq",
    "rotary_dim",
    "rotary_pct",
    "partial_rotary_factor",
    "qk_rope_head_dim",
    "head_dim",
    "num_attention_heads",
    "n_head",
    "hidden_size",
    "n_embd",
    "max_position_embeddings",
    "original_max_position_embeddings",
];

/// Architectures whose windowed layers rotate by a base that llama.cpp keeps in its code.
const WINDOWED_BASE: &[(&str, f64)] = &[("gemma3", 1e4), ("gemma3n", 1e4)];
/// What llama.cpp takes where the file says only that there are rotated columns.
const DEFAULT_BASE: f64 = 1e4;

/// The fields of `config` that are about rotation; `None` where it has none.
pub(in crate::model) fn of_config(config: &Config<'_>) -> Option<Map<String, Value>> {
    config.get(&ROTATED)?;
    let fields = ROTATED.iter().chain(&BESIDE).filter_map(|key| config.get(&[*key]));
    Some(fields.map(|(key, value)| (key.to_owned(), value.clone())).collect())
}

/// What the metadata says of rotation, with the keys of `config.json`.
///
/// `None` where the header alone does not tell the frequencies: where it names no rotation, where a tensor holds
/// factors for them (Llama 3.1's, `LongRoPE`'s), and for scalings beside `linear` and plain `yarn`.
pub(in crate::model) fn of_gguf(metadata: &Metadata<'_>, head_dim: u64) -> Option<Map<String, Value>> {
    let factors = |name: &str| name.contains("rope_freqs") || name.contains("rope_factors");
    if metadata.gguf.tensors.iter().any(|tensor| factors(&tensor.name)) {
        return None;
    }
    let number = |key: &str| metadata.value(key).and_then(|(_, value)| value.as_f64());
    let columns = number("rope.dimension_count");
    let base = number("rope.freq_base");
    if columns.is_none() && base.is_none() {
        return None;
    }
    // Windowed layers that rotate other columns than the rest have no words in a configuration.
    if number("rope.dimension_count_swa").is_some_and(|windowed| Some(windowed) != columns) {
        return None;
    }
    let mut fields = Map::new();
    let mut set = |key: &str, value: Value| fields.insert(key.to_owned(), value);
    set("rope_theta", json!(base.unwrap_or(DEFAULT_BASE)));
    // Of a head only the columns that rotate matter here.
    set("head_dim", columns.map_or_else(|| json!(head_dim), whole));
    if let Some(positions) = number("context_length") {
        set("max_position_embeddings", whole(positions));
    }
    let windowed = WINDOWED_BASE.iter().find(|entry| entry.0 == metadata.architecture).map(|entry| entry.1);
    if let Some(local) = number("rope.freq_base_swa").or(windowed) {
        set("rope_local_base_freq", json!(local));
    }
    if let Some(scaling) = scaling(metadata)? {
        set("rope_scaling", scaling);
    }
    Some(fields)
}

/// The scaling, if there is one. The outer `None` is for one that has no words here.
#[allow(clippy::option_option)]
fn scaling(metadata: &Metadata<'_>) -> Option<Option<Value>> {
    let number = |key: &str| metadata.value(key).and_then(|(_, value)| value.as_f64());
    // The second is the key of files from before there were kinds.
    let factor = number("rope.scaling.factor").or_else(|| number("rope.scale_linear")).unwrap_or(1.0);
    let kind = metadata.value("rope.scaling.type").and_then(|(_, value)| value.as_str());
    match kind.unwrap_or("linear") {
        "none" => Some(None),
        // A factor of 0 is how some converters write that there is none.
        "linear" if factor == 0.0 || (factor - 1.0).abs() < f64::EPSILON => Some(None),
        "linear" => Some(Some(json!({"rope_type": "linear", "factor": factor}))),
        "yarn" => yarn(&number, factor).map(Some),
        _ => None,
    }
}

/// `YaRN` (arXiv 2309.00071), unless it says what transformers has other words for.
fn yarn(number: &dyn Fn(&str) -> Option<f64>, factor: f64) -> Option<Value> {
    let plain = [
        ("rope.scaling.yarn_log_multiplier", 0.0),
        ("rope.scaling.yarn_ext_factor", 1.0),
        ("rope.scaling.yarn_attn_factor", 1.0),
        ("rope.scaling.attn_factor", 1.0),
    ];
    let differs = |(key, usual): &(&str, f64)| number(key).is_some_and(|value| (value - usual).abs() > 1e-6);
    if plain.iter().any(differs) {
        return None;
    }
    let mut scaling = Map::new();
    scaling.insert("rope_type".to_owned(), json!("yarn"));
    scaling.insert("factor".to_owned(), json!(factor));
    let others = [
        ("rope.scaling.original_context_length", "original_max_position_embeddings"),
        ("rope.scaling.yarn_beta_fast", "beta_fast"),
        ("rope.scaling.yarn_beta_slow", "beta_slow"),
    ];
    for (key, name) in others {
        if let Some(value) = number(key) {
            scaling.insert(name.to_owned(), whole(value));
        }
    }
    Some(Value::Object(scaling))
}

/// A number of a header as JSON: without a point where it is a whole one, since transformers tells them apart.
#[allow(clippy::cast_possible_truncation)]
fn whole(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

#[cfg(test)]
mod tests;
