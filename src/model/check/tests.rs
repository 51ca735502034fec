use proptest::prelude::*;

use super::*;
use crate::model::samples::{bf16, raw, tiny, tiny_names};

/// A change of the configuration, and what the message must then hold.
type Change = (fn(&mut Dimensions), &'static [&'static str]);

fn run(raw: Vec<RawTensor>, mut dimensions: Dimensions) -> Result<(Vec<RawTensor>, Dimensions)> {
    let (mut raw, tied) = (raw, dimensions.tied_embeddings);
    against(&mut raw, &mut dimensions, tied, "config.json").map(|()| (raw, dimensions))
}

fn message(raw: Vec<RawTensor>, dimensions: Dimensions) -> String {
    let error = run(raw, dimensions).unwrap_err();
    assert!(matches!(error, Error::Contradiction { .. }), "{error:?}");
    error.to_string()
}

#[test]
fn every_recorded_model_agrees_with_its_own_configuration() {
    for name in tiny_names() {
        let (raw, dimensions, _) = tiny(&name);
        let (kept, settled) = run(raw.clone(), dimensions.clone()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((kept, settled), (raw, dimensions), "{name}");
    }
}

#[test]
fn each_dimension_that_disagrees_is_named_with_both_values() {
    let (raw, right, _) = tiny("llama");
    let changes: [Change; 6] = [
        (|d| d.hidden = 64, &["hidden_size 64", "[199, 60]"]),
        (|d| d.vocabulary = 200, &["vocab_size 200", "[199, 60]"]),
        (|d| d.layers.truncate(2), &["num_hidden_layers 2", "layer 2"]),
        (|d| d.layers.push(d.layers[0].clone()), &["num_hidden_layers 4", "last layer is 2"]),
        (|d| d.layers[1].mlp = Mlp::Dense { width: 128 }, &["intermediate_size 128", "132", "layers.1.mlp"]),
        (
            |d| {
                if let Mixer::Attention { kv_heads, .. } = &mut d.layers[2].mixer {
                    *kv_heads = 6;
                }
            },
            &["num_key_value_heads 6 x head_dim 14 = 84", "[42, 60]", "layers.2.self_attn.k_proj"],
        ),
    ];
    for (change, wanted) in changes {
        let mut dimensions = right.clone();
        change(&mut dimensions);
        let got = message(raw.clone(), dimensions);
        assert!(wanted.iter().all(|part| got.contains(part)), "{got} lacks one of {wanted:?}");
    }
}

#[test]
fn a_padded_vocabulary_is_split_by_the_rows_of_the_tensor() {
    let (mut raw, dimensions, _) = tiny("llama");
    for tensor in raw.iter_mut().filter(|t| t.name.contains("embed") || t.name.contains("lm_head")) {
        tensor.shape[0] = 256;
    }
    let (_, settled) = run(raw, dimensions).unwrap();
    assert_eq!(settled.vocabulary, 256);
}

#[test]
fn a_copy_of_a_tied_embedding_is_counted_once_and_another_head_is_kept() {
    let (mut raw, dimensions, _) = tiny("gemma2");
    assert!(dimensions.tied_embeddings);
    let tensors = raw.len();
    raw.push(bf16("lm_head.weight", &[199, 60]));
    let (kept, settled) = run(raw.clone(), dimensions.clone()).unwrap();
    assert_eq!((kept.len(), settled.tied_embeddings), (tensors, true));

    // The class's default says tied, the configuration does not: the head counts.
    let (mut kept, mut settled) = (raw.clone(), dimensions.clone());
    against(&mut kept, &mut settled, false, "config.json").unwrap();
    assert_eq!((kept.len(), settled.tied_embeddings), (tensors + 1, false));

    *raw.last_mut().unwrap() = super::super::samples::raw("lm_head.weight", "F32", &[199, 60], 4);
    let (kept, settled) = run(raw, dimensions).unwrap();
    assert_eq!((kept.len(), settled.tied_embeddings), (tensors + 1, false));
}

#[test]
fn an_untied_model_needs_a_head_and_every_model_an_embedding() {
    let (raw, dimensions, _) = tiny("llama");
    let without = |part: &str| raw.iter().filter(|t| !t.name.contains(part)).cloned().collect();
    assert!(message(without("lm_head"), dimensions.clone()).contains("lm_head.weight"));
    assert!(message(without("embed_tokens"), dimensions.clone()).contains("embed_tokens"));
    assert!(message(without("layers.1."), dimensions).contains("layer 1"));
}

#[test]
fn layers_behind_the_last_are_accepted_if_they_predict_tokens() {
    let (mut raw, dimensions, _) = tiny("llama");
    raw.push(bf16("model.layers.3.self_attn.q_proj.weight", &[84, 60]));
    assert!(message(raw.clone(), dimensions.clone()).contains("num_hidden_layers 3"));
    raw.push(bf16("model.layers.3.eh_proj.weight", &[60, 120]));
    run(raw, dimensions).unwrap();
}

#[test]
fn a_missing_expert_is_named() {
    let (tensors, dimensions, _) = tiny("mixtral");
    let mut tensors: Vec<_> = tensors.into_iter().filter(|t| !t.name.contains("experts")).collect();
    for layer in 0..3 {
        for expert in 0..5 {
            let at = format!("model.layers.{layer}.block_sparse_moe.experts.{expert}");
            tensors.push(bf16(&format!("{at}.w1.weight"), &[22, 60]));
            tensors.push(bf16(&format!("{at}.w2.weight"), &[60, 22]));
            tensors.push(bf16(&format!("{at}.w3.weight"), &[22, 60]));
        }
    }
    run(tensors.clone(), dimensions.clone()).unwrap();
    let lost = "model.layers.1.block_sparse_moe.experts.3.w2";
    tensors.retain(|t| !t.name.starts_with(lost));
    let got = message(tensors, dimensions);
    assert!(got.contains(lost), "{got}");
}

#[test]
fn packed_weights_are_measured_in_elements() {
    let (tensors, mut dimensions, _) = tiny("llama");
    dimensions.quantization = Quantization::Gptq { bits: 4, group_size: 32, act_order: false };
    let swap = |inputs: u64| {
        let mut tensors = tensors.clone();
        tensors.retain(|t| t.name != "model.layers.0.mlp.up_proj.weight");
        tensors.push(raw("model.layers.0.mlp.up_proj.qweight", "I32", &[8, inputs], 4));
        tensors
    };
    run(swap(132), dimensions.clone()).unwrap();
    assert!(message(swap(128), dimensions).contains("intermediate_size 132"));
}

proptest! {
    #[test]
    fn a_lost_projection_is_named(model in 0_usize..20, pick: prop::sample::Index) {
        let name = &tiny_names()[model];
        let (mut raw, dimensions, _) = tiny(name);
        let wanted: Vec<usize> = (0..raw.len())
            .filter(|&i| {
                let tensor = &raw[i];
                let projections = ["_proj", "query_key_value", "dense", "c_attn", "c_fc", "shared_expert.", "experts."];
                tensor.shape.len() > 1
                    && projections.iter().any(|part| tensor.name.contains(part))
                    && !["linear_attn", "layers.3.self_attn.v_proj", "bias"].iter().any(|part| tensor.name.contains(part))
            })
            .collect();
        prop_assume!(!wanted.is_empty());
        let lost = raw.remove(wanted[pick.index(wanted.len())]);
        let pattern = |name: &str| names::read(name).pattern;
        let raw_patterns: Vec<String> = raw.iter().map(|t| pattern(&t.name)).collect();
        // A layer that is the only one of its kind has no sibling whose names could be borrowed, and an MLP without a
        // gate is as good as one that has lost it.
        let alone = !raw_patterns.contains(&pattern(&lost.name));
        prop_assume!(!alone || !["gate_proj", "up_proj"].iter().any(|part| lost.name.contains(part)));
        let error = run(raw, dimensions).expect_err(&lost.name).to_string();
        let wanted = if alone { "of layer" } else { lost.name.as_str() };
        prop_assert!(error.contains(wanted), "{name}: {} is not in {error}", lost.name);
    }

    #[test]
    fn no_name_or_shape_brings_it_down(
        names in prop::collection::vec("(model\\.|blk\\.)(layers\\.|)[0-9]{1,20}\\.(mlp|self_attn|experts\\.[0-9]{1,20})\\.(q_proj|k_proj|o_proj|up_proj|down_proj|w1|kv_b_proj)\\.(weight|qweight|q_weight)", 1..6),
        shape in prop::collection::vec(prop_oneof![Just(u64::MAX), 0_u64..100], 0..4), model in 0_usize..20, method in 0..3,
    ) {
        let (mut raw, mut dimensions, _) = tiny(&tiny_names()[model]);
        dimensions.quantization = match method {
            0 => Quantization::None,
            1 => Quantization::Gptq { bits: 4, group_size: 32, act_order: false },
            _ => Quantization::Exl2,
        };
        raw.extend(names.into_iter().map(|name| RawTensor { name, dtype: "I32".to_owned(), shape: shape.clone(), bytes: 1, block: 1 }));
        let _ = run(raw.clone(), dimensions.clone());
        let _ = crate::model::from_headers::dimensions(&raw, "headers");
    }
}
