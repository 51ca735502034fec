use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::error::Kind;
use crate::model::ModelShape;

fn attributes() -> Value {
    json!({
        "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128_256, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_key_value_groups": 4, "head_dim": 128, "num_hidden_layers": 32,
        "max_seq_len": 8192, "max_batch_size": 1, "max_input_len": 2048, "max_output_len": null,
        "arch_string": "LlamaForCausalLM",
    })
}

#[test]
fn llama_3_8b_has_its_published_number_of_parameters() {
    let shape = ModelShape::from_exllamav2(&attributes(), "llama").unwrap();
    // 8,030,261,248 parameters by the model card's own safetensors index.
    assert_eq!(shape.total_bytes(), 2 * 8_030_261_248);
    assert_eq!(shape.dimensions.max_positions, Some(8192));
    assert_eq!(shape.dimensions.architecture, "LlamaForCausalLM");
    assert!(shape.unsplittable.is_empty());
    assert!(shape.name.contains("float16"), "{}", shape.name);
}

#[test]
fn attributes_that_cannot_be_are_refused_by_name() {
    for key in
        ["hidden_size", "vocab_size", "head_dim", "num_hidden_layers", "num_key_value_heads", "max_seq_len"]
    {
        for bad in [json!(0), json!(-1), json!(1.5), json!("8"), json!(u64::MAX)] {
            let mut attributes = attributes();
            attributes[key] = bad;
            let error = ModelShape::from_exllamav2(&attributes, "llama").unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput);
            assert!(error.to_string().starts_with(key), "{error}");
        }
    }
    let mut wrong = attributes();
    wrong["num_key_value_groups"] = json!(8);
    let error = ModelShape::from_exllamav2(&wrong, "llama").unwrap_err().to_string();
    assert!(
        error.contains("num_attention_heads 32") && error.contains("8 x num_key_value_groups 8"),
        "{error}"
    );
    let mut without = attributes();
    without["num_key_value_groups"] = Value::Null;
    without["num_key_value_heads"] = json!(5);
    assert!(ModelShape::from_exllamav2(&without, "llama").is_err());
    without["num_key_value_heads"] = json!(8);
    ModelShape::from_exllamav2(&without, "llama").unwrap();
    assert!(ModelShape::from_exllamav2(&Value::Null, "llama").is_err());
}

#[test]
fn a_folder_that_disagrees_is_named() {
    let ours = dimensions(&attributes(), "llama").unwrap();
    let theirs = Dimensions { hidden: 5120, ..ours.clone() };
    agree(&ours, &ours, "llama").unwrap();
    let error = agree(&ours, &theirs, "llama").unwrap_err().to_string();
    assert!(error.contains("hidden_size 4096") && error.contains("5120"), "{error}");
}

proptest! {
    #[test]
    fn any_attributes_give_a_shape_or_an_error(values in prop::collection::vec(0_u64..=1 << 41, 7), layers in 0_u64..99) {
        let mut attributes = attributes();
        let keys = ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_seq_len"];
        for (key, value) in keys.iter().zip(&values) {
            attributes[*key] = json!(value);
        }
        attributes["num_key_value_groups"] = Value::Null;
        attributes["num_hidden_layers"] = json!(layers);
        let _ = ModelShape::from_exllamav2(&attributes, "llama");
    }
}
