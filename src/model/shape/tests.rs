use serde_json::json;

use super::*;
use crate::model::samples::{data, raw, tiny, tiny_names};

#[test]
fn a_checkpoint_comes_out_whole_and_survives_json() {
    for name in tiny_names() {
        let (tensors, dimensions, _) = tiny(&name);
        let bytes: u64 = tensors.iter().map(|t| t.bytes).sum();
        let tied = dimensions.tied_embeddings;
        let shape =
            ModelShape::assemble(name.clone(), Source::Safetensors, tensors.clone(), dimensions, tied)
                .unwrap();
        assert_eq!(shape.total_bytes(), bytes);
        assert_eq!(shape.tensor(&tensors[0].name).map(|t| t.bytes), Some(tensors[0].bytes));
        assert_eq!(shape.tensor("no such tensor"), None);
        assert_eq!(shape.with_role(Role::Head).next().is_none(), tied);
        let json = serde_json::to_string(&shape).unwrap();
        assert_eq!(serde_json::from_str::<ModelShape>(&json).unwrap(), shape);
    }
}

#[test]
fn exl2_is_told_by_its_tensors() {
    let (mut tensors, dimensions, _) = tiny("llama");
    tensors.retain(|t| t.name != "lm_head.weight");
    tensors.push(raw("lm_head.q_weight", "I32", &[8, 224], 4));
    let shape =
        ModelShape::assemble("exl2".to_owned(), Source::Safetensors, tensors, dimensions, false).unwrap();
    assert_eq!(shape.dimensions.quantization, Quantization::Exl2);
    assert_eq!(shape.tensor("lm_head.q_weight").unwrap().parts[0].grid, 32);
}

#[test]
fn settings_in_a_file_of_their_own_count_unless_the_configuration_has_some() {
    let settings = json!({"bits": 4, "group_size": 128, "desc_act": true});
    let merged = with_quantization(json!({}), Some(settings.clone()));
    assert_eq!(merged["quantization_config"]["quant_method"], "gptq");
    assert_eq!(merged["quantization_config"]["desc_act"], true);
    let awq = with_quantization(json!({}), Some(json!({"w_bit": 4, "q_group_size": 128})));
    assert_eq!(awq["quantization_config"]["quant_method"], "awq");
    let own = json!({"quantization_config": {"quant_method": "fp8"}});
    assert_eq!(with_quantization(own.clone(), Some(settings)), own);
}

#[test]
fn only_a_written_flag_says_that_the_head_is_tied() {
    assert!(says_tied(&json!({"tie_word_embeddings": true})));
    assert!(says_tied(&json!({"text_config": {"tie_word_embeddings": true}})));
    assert!(!says_tied(&json!({"tie_word_embeddings": false, "text_config": {"tie_word_embeddings": true}})));
    assert!(!says_tied(&data("smollm2_135m_gguf.json")));
}
