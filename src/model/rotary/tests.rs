use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::model::config::reader::Config;
use crate::model::gguf::{GgufFile, GgufValue};
use crate::model::gguf_config::metadata::Metadata;
use crate::model::samples::bf16;

fn of_config(config: &Value) -> Option<Value> {
    super::of_config(&Config::open(config, "test").unwrap()).map(Value::Object)
}

fn of_gguf(architecture: &str, entries: &[(&str, GgufValue)], tensors: &[&str]) -> Option<Value> {
    let entries = entries.iter().map(|(key, value)| (format!("{architecture}.{key}"), value.clone()));
    let metadata: BTreeMap<String, GgufValue> = entries.collect();
    let tensors = tensors.iter().map(|name| bf16(name, &[32])).collect();
    let gguf = GgufFile { version: 3, metadata, tensors, ..GgufFile::default() };
    super::of_gguf(&Metadata { gguf: &gguf, name: "test", architecture }, 64).map(Value::Object)
}

fn number(value: f64) -> GgufValue {
    GgufValue::Float(value)
}

fn text(value: &str) -> GgufValue {
    GgufValue::String(value.to_owned())
}

#[test]
fn a_configuration_gives_the_fields_about_rotation_from_where_they_are() {
    let inner = json!({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 7,
        "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": null});
    let wanted = json!({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2, "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0}});
    assert_eq!(of_config(&inner), Some(wanted.clone()));
    assert_eq!(
        of_config(&json!({"model_type": "vlm", "rope_theta": 1.0, "text_config": inner})),
        Some(wanted)
    );
    assert_eq!(of_config(&json!({"model_type": "gpt2", "n_embd": 64, "n_head": 2})), None);
}

#[test]
fn metadata_is_told_in_the_words_of_a_configuration() {
    let columns = ("rope.dimension_count", GgufValue::Unsigned(32));
    let base = ("rope.freq_base", number(5e5));
    let told = |more: &[(&str, GgufValue)]| {
        of_gguf("llama", &[&[columns.clone(), base.clone()], more].concat(), &["token_embd.weight"])
    };
    let plain = json!({"rope_theta": 5e5, "head_dim": 32});
    let with = |scaling: Value| {
        let mut fields = plain.clone();
        fields["rope_scaling"] = scaling;
        Some(fields)
    };
    assert_eq!(told(&[]), Some(plain.clone()));
    assert_eq!(
        told(&[("rope.scaling.type", text("none")), ("rope.scaling.factor", number(4.0))]),
        Some(plain.clone())
    );
    assert_eq!(
        told(&[("rope.scaling.type", text("linear")), ("rope.scaling.factor", number(0.0))]),
        Some(plain.clone())
    );
    let linear = json!({"rope_type": "linear", "factor": 4.0});
    assert_eq!(told(&[("rope.scaling.factor", number(4.0))]), with(linear.clone()));
    assert_eq!(told(&[("rope.scale_linear", number(4.0))]), with(linear));
    let yarn = [
        ("rope.scaling.type", text("yarn")),
        ("rope.scaling.factor", number(8.0)),
        ("rope.scaling.original_context_length", GgufValue::Unsigned(4096)),
        ("rope.scaling.yarn_beta_fast", number(16.0)),
    ];
    let wanted = json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096,
        "beta_fast": 16});
    assert_eq!(told(&yarn), with(wanted));
    for unknown in [
        &[&yarn[..], &[("rope.scaling.yarn_log_multiplier", number(0.1))]].concat()[..],
        &[("rope.scaling.type", text("longrope"))],
        &[("rope.dimension_count_swa", GgufValue::Unsigned(16))],
    ] {
        assert_eq!(told(unknown), None, "{unknown:?}");
    }
    // llama.cpp's own base where the file has none; nothing where it speaks of no rotation.
    assert_eq!(
        of_gguf("llama", std::slice::from_ref(&columns), &[]),
        Some(json!({"rope_theta": 1e4, "head_dim": 32}))
    );
    assert_eq!(
        of_gguf("llama", std::slice::from_ref(&base), &[]),
        Some(json!({"rope_theta": 5e5, "head_dim": 64}))
    );
    assert_eq!(of_gguf("gpt2", &[], &[]), None);
    assert_eq!(of_gguf("llama", &[columns, base.clone()], &["rope_freqs.weight"]), None);
    let two = json!({"rope_theta": 5e5, "head_dim": 64, "rope_local_base_freq": 1e4});
    assert_eq!(of_gguf("gemma3", &[base], &[]), Some(two));
}
