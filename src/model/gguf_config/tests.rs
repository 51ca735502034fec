use std::collections::BTreeMap;

use crate::error::Error;
use crate::model::gguf::{GgufArray, GgufFile, GgufType, GgufValue};
use crate::model::gguf_config::dimensions;
use crate::model::inventory::tests::published;
use crate::model::{Mixer, Mlp, Quantization};
use crate::model::{RawTensor, config};

/// Metadata under an architecture, as `llama.cpp` converts it.
fn file(architecture: &str, numbers: &[(&str, u64)]) -> GgufFile {
    let mut metadata: BTreeMap<String, GgufValue> = numbers
        .iter()
        .map(|(key, value)| (format!("{architecture}.{key}"), GgufValue::Unsigned(*value)))
        .collect();
    metadata.insert("general.architecture".to_owned(), GgufValue::String(architecture.to_owned()));
    GgufFile { version: 3, metadata, ..GgufFile::default() }
}

fn list(values: Vec<f64>) -> GgufValue {
    let length = values.len() as u64;
    let values = Some(values.into_iter().map(GgufValue::Float).collect());
    GgufValue::Array(GgufArray { element: GgufType::F64, length, values })
}

fn words(length: u64) -> GgufValue {
    GgufValue::Array(GgufArray { element: GgufType::String, length, values: None })
}

fn tensor(name: &str, shape: &[u64], block: u64) -> RawTensor {
    RawTensor { name: name.to_owned(), dtype: "Q8_0".to_owned(), shape: shape.to_vec(), bytes: 0, block }
}

fn smollm() -> GgufFile {
    // What the file of SmolLM2-135M-Instruct says.
    let mut file = file(
        "llama",
        &[
            ("block_count", 30),
            ("embedding_length", 576),
            ("feed_forward_length", 1536),
            ("attention.head_count", 9),
            ("attention.head_count_kv", 3),
            ("context_length", 8192),
            ("vocab_size", 49152),
            ("rope.dimension_count", 64),
        ],
    );
    file.tensors.push(tensor("token_embd.weight", &[49152, 576], 32));
    file
}

#[test]
fn gguf_and_configuration_of_one_model_agree() {
    let got = dimensions(&smollm(), "smollm2.gguf").unwrap();
    let mut wanted = config::dimensions(&published("smollm2-135m"), "smollm2").unwrap();
    wanted.quantization = Quantization::Gguf;
    // The same rotation in other words.
    wanted.rotary.clone_from(&got.rotary);
    assert_eq!(got, wanted);
}

#[test]
fn an_output_tensor_unties_and_the_embedding_gives_the_vocabulary() {
    let mut file = smollm();
    file.metadata.remove("llama.vocab_size");
    file.metadata.insert("tokenizer.ggml.tokens".to_owned(), words(49_000));
    file.tensors.push(tensor("output.weight", &[49152, 576], 1));
    let got = dimensions(&file, "untied.gguf").unwrap();
    assert!(!got.tied_embeddings);
    assert_eq!(got.vocabulary, 49152);
    file.tensors.clear();
    assert_eq!(dimensions(&file, "tokens.gguf").unwrap().vocabulary, 49_000);
}

#[test]
fn latent_attention_reads_alike_from_both_conventions() {
    let common = [
        ("block_count", 27),
        ("embedding_length", 2048),
        ("feed_forward_length", 10944),
        ("expert_feed_forward_length", 1408),
        ("expert_count", 64),
        ("expert_used_count", 6),
        ("expert_shared_count", 2),
        ("leading_dense_block_count", 1),
        ("attention.head_count", 16),
        ("attention.kv_lora_rank", 512),
        ("rope.dimension_count", 64),
        ("context_length", 163_840),
        ("vocab_size", 102_400),
    ];
    let older =
        [("attention.head_count_kv", 16), ("attention.key_length", 192), ("attention.value_length", 128)];
    let newer = [
        ("attention.head_count_kv", 1),
        ("attention.key_length", 576),
        ("attention.value_length", 512),
        ("attention.key_length_mla", 192),
        ("attention.value_length_mla", 128),
    ];
    let mut wanted = config::dimensions(&published("deepseek-v2-lite"), "v2").unwrap();
    wanted.architecture = "deepseek2".to_owned();
    wanted.tied_embeddings = true;
    for extra in [older.as_slice(), newer.as_slice()] {
        let got = dimensions(&file("deepseek2", &[&common, extra].concat()), "v2.gguf").unwrap();
        wanted.rotary.clone_from(&got.rotary);
        assert_eq!(got, wanted);
    }
}

#[test]
fn windows_follow_the_architecture_or_the_file() {
    let numbers = [
        ("block_count", 26),
        ("embedding_length", 1152),
        ("feed_forward_length", 6912),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 256),
        ("attention.value_length", 256),
        ("attention.sliding_window", 512),
        ("context_length", 32768),
        ("vocab_size", 262_144),
    ];
    let mut file = file("gemma3", &numbers);
    let wanted = config::dimensions(&published("gemma-3-1b"), "gemma").unwrap();
    assert_eq!(dimensions(&file, "gemma.gguf").unwrap().layers, wanted.layers);
    // The same as an array, which then decides.
    let flags = (1..=26).map(|layer| f64::from(u8::from(layer % 6 != 0))).collect();
    let key = "gemma3.attention.sliding_window_pattern".to_owned();
    file.metadata.insert(key.clone(), list(flags));
    assert_eq!(dimensions(&file, "gemma.gguf").unwrap().layers, wanted.layers);
    file.metadata.insert(key, list(vec![1.0; 3]));
    let error = dimensions(&file, "gemma.gguf").unwrap_err();
    assert!(
        matches!(error, Error::Contradiction { .. }) && error.to_string().contains("3 entries"),
        "{error}"
    );
}

#[test]
fn layers_differ_where_their_tensors_or_arrays_say_so() {
    let mut file = file(
        "jamba",
        &[
            ("block_count", 4),
            ("embedding_length", 4096),
            ("attention.head_count", 32),
            ("expert_count", 16),
            ("expert_used_count", 2),
            ("ssm.state_size", 16),
            ("ssm.inner_size", 8192),
            ("ssm.conv_kernel", 4),
            ("ssm.time_step_rank", 256),
            ("vocab_size", 65536),
        ],
    );
    file.metadata.insert("jamba.attention.head_count_kv".into(), list(vec![0.0, 8.0, 0.0, 0.0]));
    file.metadata.insert("jamba.feed_forward_length".into(), list(vec![14336.0; 4]));
    file.tensors
        .extend([1, 3].map(|layer| tensor(&format!("blk.{layer}.ffn_gate_inp.weight"), &[16, 4096], 1)));
    let got = dimensions(&file, "jamba.gguf").unwrap();
    // The recurrence's 8192 by 16 matrix and the three past inputs of its convolution.
    let mamba = Mixer::Recurrent { name: "mamba".to_owned(), state_elements: 8192 * 16 + 8192 * 3 };
    assert_eq!(got.layers[0].mixer, mamba);
    let attention =
        Mixer::Attention { query_heads: 32, kv_heads: 8, key_dim: 128, value_dim: 128, window: None };
    assert_eq!(got.layers[1].mixer, attention);
    assert_eq!(got.layers[2].mlp, Mlp::Dense { width: 14336 });
    assert_eq!(got.layers[3].mlp, Mlp::Experts { count: 16, active: 2, width: 14336, shared_width: 0 });
    assert_eq!(got.kv_heads, 8);
}

#[test]
fn broken_metadata_names_the_key_and_the_value() {
    let cases: [(&str, GgufValue, &str); 6] = [
        ("llama.block_count", GgufValue::Unsigned(0), "llama.block_count is 0"),
        ("llama.block_count", GgufValue::Unsigned(1 << 40), "1099511627776"),
        ("llama.embedding_length", GgufValue::Signed(-5), "-5"),
        ("llama.feed_forward_length", GgufValue::String("wide".to_owned()), "\"wide\""),
        ("llama.attention.head_count_kv", GgufValue::Unsigned(2), "9 attention heads in layer 0"),
        ("llama.attention.head_count", list(vec![9.0; 29]), "29 entries"),
    ];
    for (key, value, wanted) in cases {
        let mut file = smollm();
        file.metadata.insert(key.to_owned(), value);
        let error = dimensions(&file, "bad.gguf").unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains("bad.gguf"), "{key}: {error}");
    }
    for key in ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"] {
        let mut file = smollm();
        file.metadata.remove(&format!("llama.{key}"));
        let error = dimensions(&file, "bad.gguf").unwrap_err().to_string();
        assert!(error.contains(&format!("\"llama.{key}\" is missing")), "{error}");
    }
    let error = dimensions(&file("bert", &[]), "bert.gguf").unwrap_err();
    assert!(matches!(error, Error::NoModel { .. }), "{error}");
}
