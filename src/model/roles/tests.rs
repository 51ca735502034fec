use std::collections::BTreeMap;

mod layouts;

use proptest::prelude::*;

use super::*;
use crate::model::samples::{bf16, data, raw, tiny, tiny_names};
use crate::model::{Layer, Mlp, Quantization};

fn kind(along: CutAlong) -> &'static str {
    match along {
        CutAlong::QueryHeads => "query_heads",
        CutAlong::KvHeads => "kv_heads",
        CutAlong::Intermediate { .. } => "intermediate",
        CutAlong::Experts { .. } => "experts",
        CutAlong::Vocabulary => "vocabulary",
        CutAlong::WholeWithAttention => "with_attention",
        CutAlong::Whole => "whole",
    }
}

fn totals(tensors: &[Tensor]) -> BTreeMap<String, u64> {
    let mut totals = BTreeMap::new();
    for part in tensors.iter().flat_map(|t| &t.parts) {
        *totals.entry(kind(part.along).to_owned()).or_insert(0) += part.bytes;
    }
    totals
}

fn assert_parts_add_up(tensors: &[Tensor]) {
    for tensor in tensors {
        assert_eq!(tensor.parts.iter().map(|p| p.bytes).sum::<u64>(), tensor.bytes, "{tensor:?}");
        assert!(tensor.parts.iter().all(|p| p.grid >= 1), "{tensor:?}");
    }
}

/// One tensor's `(kind, bytes, grid)`.
fn parts_of(tensors: &[Tensor], name: &str) -> Vec<(&'static str, u64, u64)> {
    let tensor = tensors.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no {name}"));
    tensor.parts.iter().map(|p| (kind(p.along), p.bytes, p.grid)).collect()
}

#[derive(Debug, Clone, Copy)]
struct Geometry {
    query: u64,
    kv: u64,
    dim: u64,
    hidden: u64,
    width: u64,
    vocabulary: u64,
}

const GEOMETRY: Geometry = Geometry { query: 8, kv: 2, dim: 64, hidden: 384, width: 1024, vocabulary: 1000 };

fn dimensions(g: Geometry, layers: usize, quantization: Quantization) -> Dimensions {
    let mixer = Mixer::Attention {
        query_heads: g.query,
        kv_heads: g.kv,
        key_dim: g.dim,
        value_dim: g.dim,
        window: None,
    };
    Dimensions {
        architecture: "llama".to_owned(),
        hidden: g.hidden,
        vocabulary: g.vocabulary,
        query_heads: g.query,
        kv_heads: g.kv,
        head_dim: g.dim,
        intermediate: g.width,
        max_positions: Some(64),
        tied_embeddings: false,
        element_bytes: 2,
        layers: vec![Layer { mixer, mlp: Mlp::Dense { width: g.width } }; layers],
        quantization,
        rotary: None,
    }
}

#[test]
fn tiny_transformers_models_are_held_as_their_modules_say() {
    let mut seen = 0;
    for name in tiny_names() {
        let (raw, dimensions, record) = tiny(&name);
        let bytes: u64 = raw.iter().map(|t| t.bytes).sum();
        let (tensors, unsplittable) = classify(raw, &dimensions);
        assert_parts_add_up(&tensors);
        let expected: BTreeMap<String, u64> = serde_json::from_value(record["expected"].clone()).unwrap();
        let reasons: Vec<_> = tensors.iter().filter_map(|t| Some((&t.name, t.reason.as_ref()?))).collect();
        assert_eq!(totals(&tensors), expected, "{name}: {reasons:?}");
        assert_eq!(tensors.iter().map(|t| t.bytes).sum::<u64>(), bytes);
        if name == "qwen3_next" {
            let [only] = unsplittable.as_slice() else { panic!("{unsplittable:?}") };
            assert!(only.what.starts_with("linear_attention (3 layers"), "{only:?}");
        } else {
            assert!(unsplittable.is_empty(), "{name}: {unsplittable:?}");
        }
        seen += 1;
    }
    assert_eq!(seen, 20);
}

#[test]
fn gguf_names_of_a_real_file_are_all_known_and_cut_at_its_blocks() {
    let record = data("smollm2_135m_gguf.json");
    let raw: Vec<RawTensor> = record["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| RawTensor {
            name: t[0].as_str().unwrap().to_owned(),
            dtype: t[1].as_str().unwrap().to_owned(),
            shape: serde_json::from_value(t[2].clone()).unwrap(),
            bytes: t[3].as_u64().unwrap(),
            block: t[4].as_u64().unwrap(),
        })
        .collect();
    let g = Geometry { query: 9, kv: 3, dim: 64, hidden: 576, width: 1536, vocabulary: 49152 };
    let (tensors, unsplittable) = classify(raw, &dimensions(g, 30, Quantization::Gguf));
    assert_parts_add_up(&tensors);
    assert!(unsplittable.is_empty(), "{unsplittable:?}");
    // 20 bytes a block of 32 for Q4_1 and 34 for Q8_0.
    let expected: BTreeMap<String, u64> = [
        ("query_heads", 30 * 2 * 576 * 576 / 32 * 20),
        ("kv_heads", 30 * 2 * 192 * 576 / 32 * 20),
        ("intermediate", 30 * 3 * 576 * 1536 / 32 * 20),
        ("vocabulary", 49152 * 576 / 32 * 34),
        ("whole", 61 * 576 * 4),
    ]
    .into_iter()
    .map(|(k, v)| (k.to_owned(), v))
    .collect();
    assert_eq!(totals(&tensors), expected);
    for tensor in &tensors {
        let by_input =
            tensor.name.ends_with("ffn_down.weight") || tensor.name.ends_with("attn_output.weight");
        assert!(tensor.parts.iter().all(|p| p.grid == if by_input { 32 } else { 1 }), "{tensor:?}");
    }
}

#[test]
fn what_is_not_the_language_model_is_held_whole_and_named_once() {
    let mut raw: Vec<_> = (0..24)
        .flat_map(|i| {
            [
                bf16(&format!("model.vision_tower.layers.{i}.attn.q_proj.weight"), &[512, 384]),
                bf16(&format!("model.language_model.layers.{i}.self_attn.q_proj.weight"), &[512, 384]),
            ]
        })
        .collect();
    raw.push(bf16("model.multi_modal_projector.linear_1.weight", &[384, 384]));
    raw.push(bf16("model.language_model.layers.24.mlp.up_proj.weight", &[1024, 384]));
    raw.push(bf16("model.language_model.layers.3.odd_thing.weight", &[3, 384]));
    raw.push(bf16("model.language_model.layers.4.odd_thing.weight", &[3, 384]));
    let (tensors, unsplittable) = classify(raw, &dimensions(GEOMETRY, 24, Quantization::None));
    assert_parts_add_up(&tensors);
    assert_eq!(totals(&tensors)["query_heads"], 24 * 512 * 384 * 2);
    let named: Vec<_> = unsplittable.iter().map(|u| (u.what.as_str(), u.bytes)).collect();
    assert_eq!(
        named,
        [
            ("vision or audio tower (24 layers, 25 tensors)", (24 * 512 + 384) * 384 * 2),
            ("multi-token prediction (1 layer, 1 tensor)", 1024 * 384 * 2),
            ("model.language_model.layers.*.odd_thing (2 layers, 2 tensors)", 2 * 3 * 384 * 2),
        ]
    );
}

fn experts(count: u64, width: u64, shared_width: u64) -> Mlp {
    Mlp::Experts { count, active: 2, width, shared_width }
}

#[test]
fn gguf_names_of_experts_and_latent_attention_are_known() {
    let mut dimensions = dimensions(GEOMETRY, 2, Quantization::Gguf);
    dimensions.layers[1] = Layer {
        mixer: Mixer::Latent { query_heads: 8, latent_dim: 48, rope_dim: 16 },
        mlp: experts(4, 96, 192),
    };
    dimensions.layers[0].mlp = experts(4, 96, 0);
    let expected: [(&str, &[u64], &str); 22] = [
        ("blk.0.attn_q.weight", &[512, 384], "query_heads"),
        ("blk.0.attn_q.bias", &[512], "query_heads"),
        ("blk.0.attn_output.bias", &[384], "whole"),
        ("blk.0.attn_sinks.weight", &[8], "query_heads"),
        ("blk.0.attn_k_norm.weight", &[64], "with_attention"),
        ("blk.0.ffn_gate_exps.weight", &[4, 96, 384], "experts"),
        ("blk.0.ffn_gate_exps.bias", &[4, 96], "experts"),
        ("blk.0.ffn_down_exps.weight", &[4, 384, 96], "experts"),
        ("blk.0.ffn_up.3.weight", &[96, 384], "experts"),
        ("blk.0.ffn_gate_inp.weight", &[4, 384], "whole"),
        ("blk.1.attn_q_a.weight", &[40, 384], "with_attention"),
        ("blk.1.attn_q_b.weight", &[8 * 72, 40], "query_heads"),
        ("blk.1.attn_kv_a_mqa.weight", &[64, 384], "with_attention"),
        ("blk.1.attn_kv_a_norm.weight", &[48], "with_attention"),
        ("blk.1.attn_kv_b.weight", &[8 * 120, 48], "query_heads"),
        ("blk.1.attn_k_b.weight", &[8, 48, 56], "query_heads"),
        ("blk.1.attn_v_b.weight", &[8, 64, 48], "query_heads"),
        ("blk.1.attn_output.weight", &[384, 512], "query_heads"),
        ("blk.1.ffn_up_shexp.weight", &[192, 384], "intermediate"),
        ("blk.1.ffn_down_shexp.weight", &[384, 192], "intermediate"),
        ("blk.1.exp_probs_b.bias", &[4], "whole"),
        ("rope_freqs.weight", &[32], "whole"),
    ];
    let raw = expected.iter().map(|(name, shape, _)| bf16(name, shape)).collect();
    let (tensors, unsplittable) = classify(raw, &dimensions);
    assert!(unsplittable.is_empty(), "{unsplittable:?}");
    assert_parts_add_up(&tensors);
    for (name, _, wanted) in expected {
        let [(got, ..)] = parts_of(&tensors, name)[..] else { panic!("{name}") };
        assert_eq!(got, wanted, "{name}");
    }
}

#[test]
fn names_that_vary_between_publishers_lead_to_the_same_roles() {
    let spellings: [[&str; 4]; 6] = [
        [
            "layers.0.self_attn.q_proj",
            "layers.0.self_attn.o_proj",
            "layers.0.mlp.up_proj",
            "layers.0.mlp.down_proj",
        ],
        [
            "model.decoder.layers.0.self_attn.q_proj",
            "model.decoder.layers.0.self_attn.out_proj",
            "model.decoder.layers.0.fc1",
            "model.decoder.layers.0.fc2",
        ],
        [
            "transformer.h.0.attn.q_proj",
            "transformer.h.0.attn.out_proj",
            "transformer.h.0.mlp.fc_in",
            "transformer.h.0.mlp.fc_out",
        ],
        [
            "language_model.model.layers.0.self_attn.q_proj",
            "language_model.model.layers.0.self_attn.o_proj",
            "language_model.model.layers.0.mlp.up_proj",
            "language_model.model.layers.0.mlp.down_proj",
        ],
        [
            "model.layers.0.attention.wq",
            "model.layers.0.attention.wo",
            "model.layers.0.feed_forward.w3",
            "model.layers.0.feed_forward.w2",
        ],
        [
            "gpt_neox.layers.0.attention.q_proj",
            "gpt_neox.layers.0.attention.dense",
            "gpt_neox.layers.0.mlp.dense_h_to_4h",
            "gpt_neox.layers.0.mlp.dense_4h_to_h",
        ],
    ];
    let shapes = [[512, 384], [384, 512], [1024, 384], [384, 1024]];
    let roles = [Role::AttentionIn, Role::AttentionOut, Role::MlpIn, Role::MlpOut];
    for spelling in spellings {
        let raw =
            spelling.iter().zip(&shapes).map(|(n, shape)| bf16(&format!("{n}.weight"), shape)).collect();
        let (tensors, _) = classify(raw, &dimensions(GEOMETRY, 1, Quantization::None));
        let got: Vec<_> = tensors.iter().map(|t| t.role).collect();
        assert_eq!(got, roles, "{spelling:?}");
    }
}

#[test]
fn a_shape_that_the_geometry_does_not_explain_says_got_and_wanted() {
    let (tensors, unsplittable) = classify(
        vec![bf16("layers.0.self_attn.k_proj.weight", &[192, 384])],
        &dimensions(GEOMETRY, 1, Quantization::None),
    );
    assert_eq!(tensors[0].role, Role::Replicated);
    assert_eq!(unsplittable[0].reason, "its shape is [192, 384], wanted [128, 384]");
    assert_eq!(tensors[0].reason.as_ref(), Some(&unsplittable[0].reason));
}

proptest! {
    #[test]
    fn parts_follow_the_rows_they_are_made_of(
        kv in 1_u64..9, group in 1_u64..9, dim in 1_u64..130, hidden in 1_u64..600, width in 2_u64..900,
        vocabulary in 1_u64..3000, fused in any::<bool>(), bias in any::<bool>(),
    ) {
        let query = kv * group;
        let g = Geometry { query, kv, dim, hidden, width, vocabulary };
        // A square embedding or a width equal to another length would only make the rules' task easier.
        let mut raw = vec![
            bf16("model.embed_tokens.weight", &[vocabulary, hidden]),
            bf16("lm_head.weight", &[vocabulary, hidden]),
        ];
        let at = "model.layers.0";
        let (q, k) = (query * dim, kv * dim);
        let mut module = |name: &str, outputs: u64, inputs: u64| {
            raw.push(bf16(&format!("{at}.{name}.weight"), &[outputs, inputs]));
            if bias {
                raw.push(bf16(&format!("{at}.{name}.bias"), &[outputs]));
            }
        };
        if fused {
            module("self_attn.qkv_proj", q + 2 * k, hidden);
            module("mlp.gate_up_proj", 2 * width, hidden);
        } else {
            module("self_attn.q_proj", q, hidden);
            module("self_attn.k_proj", k, hidden);
            module("self_attn.v_proj", k, hidden);
            module("mlp.gate_proj", width, hidden);
            module("mlp.up_proj", width, hidden);
        }
        module("self_attn.o_proj", hidden, q);
        module("mlp.down_proj", hidden, width);
        let (tensors, unsplittable) = classify(raw, &dimensions(g, 1, Quantization::None));
        assert_parts_add_up(&tensors);
        prop_assert!(unsplittable.is_empty(), "{unsplittable:?}");
        let b = u64::from(bias);
        let totals = totals(&tensors);
        prop_assert_eq!(totals["query_heads"], 2 * q * (hidden + b + hidden));
        prop_assert_eq!(totals["kv_heads"], 2 * 2 * k * (hidden + b));
        prop_assert_eq!(totals["intermediate"], 2 * width * (2 * (hidden + b) + hidden));
        prop_assert_eq!(totals["vocabulary"], 2 * 2 * vocabulary * hidden);
        prop_assert_eq!(totals.get("whole").copied().unwrap_or(0), 2 * 2 * b * hidden);
    }

    #[test]
    fn any_name_and_shape_is_held_somehow(
        name in "(model\\.|blk\\.|)(layers\\.|h\\.|)[0-9]{0,20}\\.?(mlp|self_attn|experts|attn)?\\.?[a-z_0-9]{0,12}(_proj)?(\\.weight|\\.qweight|\\.scales|\\.weight_scale_inv|\\.bias)?",
        shape in prop::collection::vec(0_u64..u64::MAX, 0..4), bytes: u64, block in 1_u64..300,
        bits: u64, group: u64, method in 0..5,
    ) {
        let quantization = match method {
            0 => Quantization::Gptq { bits, group_size: group, act_order: false },
            1 => Quantization::Awq { bits, group_size: group },
            2 => Quantization::Fp8Block { rows: bits, columns: group },
            3 => Quantization::Exl2,
            _ => Quantization::None,
        };
        let raw = RawTensor { name, dtype: "F8_E4M3".to_owned(), shape, bytes, block };
        let (tensors, _) = classify(vec![raw], &dimensions(GEOMETRY, 2, quantization));
        prop_assert_eq!(tensors[0].parts.iter().map(|p| p.bytes).sum::<u64>(), bytes);
    }
}
