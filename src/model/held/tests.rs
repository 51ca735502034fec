use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::model::samples::{bf16, raw};
use crate::model::{Part, Source};

fn config(quantization: Option<Value>) -> Value {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 128, "vocab_size": 1000,
        "max_position_embeddings": 256, "torch_dtype": "float16", "tie_word_embeddings": false,
    });
    if let Some(settings) = quantization {
        config["quantization_config"] = settings;
    }
    config
}

/// What a plan reads of a tensor, by its name.
fn by_name(shape: &ModelShape) -> BTreeMap<String, (String, Vec<u64>, u64, Vec<Part>)> {
    let entry = |t: &Tensor| (t.name.clone(), (t.dtype.clone(), t.shape.clone(), t.bytes, t.parts.clone()));
    shape.tensors.iter().map(entry).collect()
}

#[test]
fn decoded_tensors_are_those_of_the_model_that_was_never_quantised() {
    let plain = ModelShape::from_config(&config(None), "plain").unwrap();
    for settings in [
        json!({"quant_method": "gptq", "bits": 4, "group_size": 128}),
        json!({"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": true}),
        json!({"quant_method": "awq", "bits": 4, "group_size": 64}),
        json!({"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}),
    ] {
        let packed = ModelShape::from_config(&config(Some(settings.clone())), "packed").unwrap();
        assert_ne!(packed.total_bytes(), plain.total_bytes());
        for (dtype, bytes) in [(WeightType::Float16, 2), (WeightType::Float32, 4)] {
            let decoded = packed.held_as(dtype).unwrap();
            assert_eq!(decoded.dimensions.element_bytes, bytes, "{settings}");
            assert_eq!(decoded.dimensions.quantization, Quantization::None);
            assert!(decoded.unsplittable.is_empty(), "{settings}: {:?}", decoded.unsplittable);
            assert_eq!(by_name(&decoded), by_name(&plain.held_as(dtype).unwrap()), "{settings}");
        }
        assert_eq!(by_name(&packed.held_as(WeightType::Float16).unwrap()), by_name(&plain), "{settings}");
    }
}

#[test]
fn blocks_of_gguf_and_scales_of_one_number_are_gone() {
    let mut shape = ModelShape::from_config(&config(None), "a file").unwrap();
    let plain = by_name(&shape);
    shape.dimensions.quantization = Quantization::Gguf;
    for tensor in shape.tensors.iter_mut().filter(|t| t.shape.len() == 2) {
        tensor.dtype = "Q8_0".to_owned();
        tensor.bytes = tensor.bytes / 2 * 34 / 32;
    }
    assert_eq!(by_name(&shape.held_as(WeightType::Float16).unwrap()), plain);

    let dimensions = shape.dimensions.clone();
    let tensors = vec![
        raw("model.layers.0.self_attn.q_proj.weight", "F8_E4M3", &[768, 768], 1),
        raw("model.layers.0.self_attn.q_proj.weight_scale_inv", "F32", &[], 4),
        raw("model.layers.0.self_attn.q_proj.activation_scale", "F32", &[], 4),
        bf16("model.layers.0.self_attn.q_proj.bias", &[768]),
        raw("model.layers.0.counter", "I64", &[3], 8),
    ];
    let (tensors, unsplittable) = roles::classify(tensors, &dimensions);
    let dimensions = crate::model::Dimensions {
        quantization: Quantization::Other { name: "fp8".to_owned() },
        ..dimensions
    };
    let shape =
        ModelShape { name: String::new(), source: Source::Safetensors, dimensions, tensors, unsplittable };
    let held: Vec<(String, String, u64)> = shape
        .held_as(WeightType::Bfloat16)
        .unwrap()
        .tensors
        .into_iter()
        .map(|t| (t.name.rsplit('.').next().unwrap_or_default().to_owned(), t.dtype, t.bytes))
        .collect();
    let expected = [("weight", "BF16", 768 * 768 * 2), ("bias", "BF16", 1536), ("counter", "I64", 24)];
    assert_eq!(held, expected.map(|(name, dtype, bytes)| (name.to_owned(), dtype.to_owned(), bytes)));
}

#[test]
fn what_cannot_be_decoded_is_refused_by_name() {
    let mut shape = ModelShape::from_config(&config(None), "a file").unwrap();
    shape.dimensions.quantization = Quantization::Exl2;
    let message = shape.held_as(WeightType::Float32).unwrap_err().to_string();
    assert!(message.contains("weights: got float32 for weights quantised by EXL2"), "{message}");
    shape.dimensions.quantization = Quantization::Other { name: "mxfp4".to_owned() };
    let message = shape.held_as(WeightType::Float16).unwrap_err().to_string();
    assert!(message.contains("float16 for weights quantised by mxfp4"), "{message}");

    shape.dimensions.quantization = Quantization::None;
    shape.tensors[0].shape = vec![u64::MAX, 2];
    assert!(shape.held_as(WeightType::Float32).is_err());
    assert!("torch.float32".parse::<WeightType>().is_err());
}
