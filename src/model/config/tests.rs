use proptest::prelude::*;
use serde_json::{Value, json};

use crate::error::Error;
use crate::model::inventory::tests::published;
use crate::model::{Mixer, Mlp, Quantization};
use crate::model::{config, inventory};

fn read(config: &Value) -> crate::Result<super::Dimensions> {
    config::dimensions(config, "here")
}

/// Llama-3-8B with some keys changed; null removes one.
fn llama(changes: &Value) -> Value {
    let mut config = published("llama-3-8b");
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => config.as_object_mut().unwrap().remove(key),
            other => config.as_object_mut().unwrap().insert(key.clone(), other.clone()),
        };
    }
    config
}

#[test]
fn a_configuration_that_cannot_be_used_says_why_and_what_to_do() {
    let cases = [
        (json!([1, 2]), &["a JSON object", "a list of 2"][..]),
        (json!({}), &["model_type", "no keys at all"]),
        (json!({"model_type": 5}), &["model_type is 5"]),
        (llama(&json!({"hidden_size": null})), &["hidden size is missing", "\"hidden_size\", \"n_embd\""]),
        (llama(&json!({"num_attention_heads": null})), &["\"num_attention_heads\"", "\"n_head\""]),
        (llama(&json!({"intermediate_size": null})), &["MLP's width is missing", "\"intermediate_size\""]),
        (llama(&json!({"vocab_size": null})), &["vocabulary", "\"vocab_size\""]),
        (llama(&json!({"hidden_size": "4096"})), &["hidden_size is \"4096\"", "whole number"]),
        (llama(&json!({"hidden_size": -1})), &["hidden_size is -1"]),
        (llama(&json!({"hidden_size": 4096.5})), &["hidden_size is 4096.5"]),
        (llama(&json!({"hidden_size": 0})), &["hidden_size is 0"]),
        (llama(&json!({"hidden_size": 1_u64 << 25})), &["hidden_size is 33554432", "16777216"]),
        (llama(&json!({"num_hidden_layers": 4097})), &["4097 layers", "4096"]),
        (llama(&json!({"num_attention_heads": 0})), &["heads is 0"]),
        (llama(&json!({"num_key_value_heads": 0})), &["0 key and value heads"]),
        (llama(&json!({"vocab_size": 1e30})), &["vocab_size is 1e"]),
        (llama(&json!({"tie_word_embeddings": "yes"})), &["tie_word_embeddings is \"yes\"", "true or false"]),
        (llama(&json!({"torch_dtype": "int3"})), &["torch_dtype is \"int3\"", "bfloat16"]),
        (llama(&json!({"quantization_config": "gptq"})), &["quantization_config is \"gptq\""]),
        (llama(&json!({"quantization_config": {"bits": 4}})), &["quant_method"]),
        (llama(&json!({"quantization_config": {"quant_method": "gptq", "bits": 5}})), &["bits", "5"]),
        (
            llama(&json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}})),
            &["weight_block_size is 0"],
        ),
        (llama(&json!({"layer_types": ["full_attention", 3]})), &["layer_types", "list of texts"]),
        (llama(&json!({"layer_types": vec!["strange"; 32]})), &["\"strange\"", "\"sliding_attention\""]),
        (llama(&json!({"layer_types": vec!["sliding_attention"; 32]})), &["\"sliding_window\""]),
        (llama(&json!({"num_local_experts": 8})), &["\"num_experts_per_tok\""]),
        (llama(&json!({"num_local_experts": 70_000})), &["num_local_experts is 70000", "65536"]),
        (llama(&json!({"head_dim": 1 << 20})), &["32 heads of 1048576"]),
    ];
    for (config, wanted) in cases {
        let error = read(&config).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::BrokenHeader { .. } | Error::Contradiction { .. }), "{text}");
        assert!(text.starts_with("here: "), "{text}");
        for part in wanted {
            assert!(text.contains(part), "{text}: nothing of {part}");
        }
    }
}

#[test]
fn dimensions_that_contradict_each_other_show_both() {
    let cases = [
        (llama(&json!({"num_key_value_heads": 7})), "32 attention heads in layer 0 contradicts 7 key"),
        (llama(&json!({"hidden_size": 4097})), "a hidden size of 4097 contradicts 32 attention heads"),
        (
            llama(&json!({"layer_types": ["full_attention"]})),
            "layer_types with 1 entries contradicts 32 layers",
        ),
        (
            llama(&json!({"num_local_experts": 8, "num_experts_per_tok": 9})),
            "9 experts a token contradicts 8 experts",
        ),
    ];
    for (config, wanted) in cases {
        let error = read(&config).unwrap_err();
        assert!(matches!(error, Error::Contradiction { .. }), "{error}");
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

#[test]
fn what_is_no_decoder_or_has_an_unknown_cache_is_named() {
    let mut indexed = published("deepseek-v3");
    indexed["index_head_dim"] = json!(128);
    let cases = [
        (
            json!({"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 768,
                   "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 30522}),
            "BertForMaskedLM",
        ),
        (
            json!({"model_type": "vit", "hidden_size": 768, "image_size": 224, "num_hidden_layers": 12}),
            "image_size 224",
        ),
        (
            json!({"model_type": "t5", "is_encoder_decoder": true, "d_model": 512, "vocab_size": 32128}),
            "\"t5\"",
        ),
        (
            json!({"model_type": "falcon_h1", "hidden_size": 3072, "num_hidden_layers": 44, "vocab_size": 130_048}),
            "side by side",
        ),
        (indexed, "index_head_dim 128"),
        (
            json!({"model_type": "clip", "text_config": {"model_type": "clip_text_model", "vocab_size": 49408,
                   "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}}),
            "\"clip_text_model\"",
        ),
        (
            llama(&json!({"model_type": "new_bert", "architectures": ["NewBertForMaskedLM"]})),
            "NewBertForMaskedLM",
        ),
    ];
    for (config, wanted) in cases {
        let error = read(&config).unwrap_err();
        assert!(matches!(error, Error::NoModel { .. }) && error.to_string().contains(wanted), "{error}");
    }
}

#[test]
fn an_unknown_type_with_the_usual_keys_is_read() {
    let dimensions = read(&llama(&json!({"model_type": "never_seen"}))).unwrap();
    assert_eq!((dimensions.hidden, dimensions.kv_heads, dimensions.head_dim), (4096, 8, 128));
}

#[test]
fn a_window_counts_only_where_its_rule_is_known() {
    let windows = |config: &Value| -> Vec<Option<u64>> {
        let layers = read(config).unwrap().layers;
        let window = |layer: &crate::model::Layer| match layer.mixer {
            Mixer::Attention { window, .. } => window,
            _ => panic!("{layer:?}"),
        };
        layers.iter().map(window).collect()
    };
    let four = |model_type: &str| {
        llama(&json!({"model_type": model_type, "num_hidden_layers": 4, "sliding_window": 64}))
    };
    // A plan that takes a window for granted could run out of memory.
    assert_eq!(windows(&four("never_seen")), [None; 4]);
    assert_eq!(windows(&four("mistral")), [Some(64); 4]);
    assert_eq!(windows(&four("gemma2")), [Some(64), None, Some(64), None]);
    let mut config = four("never_seen");
    config["sliding_window_pattern"] = json!("LLG");
    assert_eq!(windows(&config), [Some(64), Some(64), None, Some(64)]);
    config["layer_types"] =
        json!(["full_attention", "sliding_attention", "full_attention", "full_attention"]);
    assert_eq!(windows(&config), [None, Some(64), None, None]);
}

#[test]
fn heads_follow_the_ways_of_writing_them() {
    let heads = |config: &Value| {
        let dimensions = read(config).unwrap();
        (dimensions.query_heads, dimensions.kv_heads, dimensions.head_dim)
    };
    assert_eq!(heads(&llama(&json!({"num_key_value_heads": null}))), (32, 32, 128));
    assert_eq!(heads(&llama(&json!({"head_dim": 64, "hidden_size": 4097}))), (32, 8, 64));
    assert_eq!(heads(&published("falcon-7b")), (71, 1, 64));
    assert_eq!(heads(&published("falcon-40b")), (128, 8, 64));
    assert_eq!(heads(&published("gpt2")), (12, 12, 64));
    // Both keys missing: Gemma 3's class has 8 heads, 4 KV heads of 256.
    assert_eq!(heads(&published("gemma-3-4b")), (8, 4, 256));
    assert_eq!(heads(&published("mamba-2.8b")), (0, 0, 0));
}

#[test]
fn ties_dtypes_and_widths_take_the_defaults_of_their_class() {
    let read = |name: &str| read(&published(name)).unwrap();
    assert!(read("gemma-7b").tied_embeddings && read("command-r-35b").tied_embeddings);
    assert!(!read("llama-3-8b").tied_embeddings);
    assert_eq!((read("gemma-2-9b").element_bytes, read("phi-2").element_bytes), (4, 2));
    assert_eq!(read("gpt2").intermediate, 4 * 768);
    assert_eq!(read("llama-4-scout").intermediate, 8192);
    assert_eq!(read("deepseek-v3").intermediate, 2048);
    assert_eq!(read("qwen3-moe-mixed").intermediate, 1536);
    assert_eq!(read("llama-4-scout").max_positions, Some(10_485_760));
}

#[test]
fn recurrent_states_have_the_sizes_of_their_caches() {
    let state = |name: &str, layer: usize| match read(&published(name)).unwrap().layers[layer].mixer.clone() {
        Mixer::Recurrent { name, state_elements } => (name, state_elements),
        other => panic!("{other:?}"),
    };
    // 32 value heads of 128 by 128, and 4 inputs of (2 x 16 + 32) x 128 convolved columns.
    assert_eq!(state("qwen3-next-80b", 0), ("linear_attention".to_owned(), 32 * 128 * 128 + 4 * 8192));
    assert_eq!(state("jamba-mini", 0), ("mamba".to_owned(), 8192 * (16 + 4)));
    assert_eq!(state("mamba-2.8b", 63), ("mamba".to_owned(), 5120 * (16 + 4)));
}

#[test]
fn quantisation_is_read_where_wrappers_keep_it() {
    let mut config = published("gemma-3-4b");
    config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4, "group_size": -1});
    let quantization = read(&config).unwrap().quantization;
    assert_eq!(quantization, Quantization::Gptq { bits: 4, group_size: 0, act_order: false });
    config["quantization_config"] = json!({"load_in_8bit": true});
    assert_eq!(read(&config).unwrap().quantization, Quantization::Other { name: "bitsandbytes".to_owned() });
}

#[test]
fn experts_stand_in_the_layers_that_the_keys_name() {
    let sparse = |name: &str| -> Vec<usize> {
        let layers = read(&published(name)).unwrap().layers;
        let experts = layers.iter().enumerate().filter(|(_, layer)| matches!(layer.mlp, Mlp::Experts { .. }));
        experts.map(|(index, _)| index).collect()
    };
    // Every second layer, the fourth left out.
    assert_eq!(sparse("qwen3-moe-mixed"), [1, 5, 7]);
    assert_eq!(sparse("deepseek-v3"), (3..61).collect::<Vec<_>>());
    assert_eq!(sparse("jamba-mini"), (0..16).map(|i| 2 * i + 1).collect::<Vec<_>>());
}

/// Any JSON, more often than not with keys and values that mean something here.
fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0_u64..9).prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(vec![
            "sliding_attention",
            "mamba",
            "gptq",
            "mxfp4",
            "LG",
            "torch.float16",
            "auto"
        ])
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,8}", inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}

const NAMES: [&str; 12] = [
    "llama-3-8b",
    "gemma-3-4b",
    "deepseek-v2-lite",
    "qwen3-moe-mixed",
    "gpt-oss-20b",
    "falcon-40b",
    "qwen3-next-80b",
    "jamba-mini",
    "mamba-2.8b",
    "llama-4-scout",
    "stablelm-2-12b",
    "granite-3.1-1b-a400m",
];

/// Keys that some rule reads, beside those that the configuration has.
const KEYS: [&str; 20] = [
    "layer_types",
    "sliding_window",
    "sliding_window_pattern",
    "head_dim",
    "num_key_value_heads",
    "kv_lora_rank",
    "quantization_config",
    "mlp_only_layers",
    "moe_layer_freq",
    "no_rope_layers",
    "text_config",
    "torch_dtype",
    "mamba_d_head",
    "block_types",
    "hybrid_override_pattern",
    "mlp_layer_types",
    "moe_layer_end_index",
    "expand",
    "attn_layer_indices",
    "full_attention_interval",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Real configurations with some keys replaced by anything: an answer or an error, and answers that hold.
    #[test]
    fn no_configuration_brings_the_reader_down(
        name in prop::sample::select(NAMES.to_vec()),
        changes in prop::collection::vec((any::<prop::sample::Index>(), anything()), 1..4),
        nested in any::<bool>(),
    ) {
        let mut config = published(name);
        for (index, value) in changes {
            let map = match config.get_mut("text_config").filter(|_| nested) {
                Some(inner) if inner.is_object() => inner.as_object_mut().unwrap(),
                _ => config.as_object_mut().unwrap(),
            };
            let mut keys: Vec<String> = map.keys().cloned().collect();
            keys.extend(KEYS.map(str::to_owned));
            let key = index.get(&keys).clone();
            map.insert(key, value);
        }
        let Ok(dimensions) = config::dimensions(&config, "any") else { return Ok(()) };
        prop_assert!((1..=4096).contains(&dimensions.layers.len()));
        for layer in &dimensions.layers {
            if let Mixer::Attention { query_heads, kv_heads, key_dim, .. } = layer.mixer {
                prop_assert_eq!(query_heads % kv_heads, 0);
                prop_assert!(key_dim > 0);
            }
        }
        if let Ok(tensors) = inventory::tensors(&config, &dimensions, "any") {
            let names: std::collections::BTreeSet<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
            prop_assert_eq!(names.len(), tensors.len());
        }
    }
}
