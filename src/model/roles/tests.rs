use std::collections::BTreeMap;
use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::model::{Layer, Mlp, Quantization};

fn data(path: &str) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn raw(name: &str, dtype: &str, shape: &[u64], element_bytes: u64) -> RawTensor {
    let bytes = shape.iter().product::<u64>() * element_bytes;
    RawTensor { name: name.to_owned(), dtype: dtype.to_owned(), shape: shape.to_vec(), bytes, block: 1 }
}

fn bf16(name: &str, shape: &[u64]) -> RawTensor {
    raw(name, "BF16", shape, 2)
}

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
    }
}

/// `(module, outputs, inputs)` of one Llama layer.
fn linears(g: Geometry) -> Vec<(String, u64, u64)> {
    let (q, kv) = (g.query * g.dim, g.kv * g.dim);
    [
        ("self_attn.q_proj", q, g.hidden),
        ("self_attn.k_proj", kv, g.hidden),
        ("self_attn.v_proj", kv, g.hidden),
        ("self_attn.o_proj", g.hidden, q),
        ("mlp.gate_proj", g.width, g.hidden),
        ("mlp.up_proj", g.width, g.hidden),
        ("mlp.down_proj", g.hidden, g.width),
    ]
    .into_iter()
    .map(|(name, outputs, inputs)| (format!("model.layers.0.{name}"), outputs, inputs))
    .collect()
}

#[test]
fn tiny_transformers_models_are_held_as_their_modules_say() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny_parameters");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let record = data(&format!("tiny_parameters/{name}.json"));
        let dimensions: Dimensions = serde_json::from_value(record["dimensions"].clone()).unwrap();
        let parameters: BTreeMap<String, Vec<u64>> =
            serde_json::from_value(record["parameters"].clone()).unwrap();
        let raw: Vec<_> = parameters.iter().map(|(name, shape)| bf16(name, shape)).collect();
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

fn gptq(bits: u64, group_size: u64, act_order: bool) -> Quantization {
    Quantization::Gptq { bits, group_size, act_order }
}

fn gptq_tensors(g: Geometry, bits: u64, group: u64) -> Vec<RawTensor> {
    let mut tensors = Vec::new();
    for (name, outputs, inputs) in linears(g) {
        let groups = if group == 0 { 1 } else { inputs.div_ceil(group) };
        tensors.push(raw(&format!("{name}.qweight"), "I32", &[inputs * bits / 32, outputs], 4));
        tensors.push(raw(&format!("{name}.qzeros"), "I32", &[groups, outputs * bits / 32], 4));
        tensors.push(raw(&format!("{name}.scales"), "F16", &[groups, outputs], 2));
        tensors.push(raw(&format!("{name}.g_idx"), "I32", &[inputs], 4));
    }
    tensors
}

#[test]
fn gptq_cuts_outputs_at_packs_and_inputs_at_groups() {
    let (tensors, unsplittable) =
        classify(gptq_tensors(GEOMETRY, 4, 128), &dimensions(GEOMETRY, 1, gptq(4, 128, false)));
    assert_parts_add_up(&tensors);
    assert!(unsplittable.is_empty(), "{unsplittable:?}");
    let layer = "model.layers.0";
    assert_eq!(
        parts_of(&tensors, &format!("{layer}.self_attn.q_proj.qweight")),
        [("query_heads", 48 * 512 * 4, 8)]
    );
    assert_eq!(
        parts_of(&tensors, &format!("{layer}.self_attn.k_proj.qzeros")),
        [("kv_heads", 3 * 16 * 4, 8)]
    );
    assert_eq!(
        parts_of(&tensors, &format!("{layer}.self_attn.k_proj.g_idx")),
        [("with_attention", 384 * 4, 1)]
    );
    for leaf in ["qweight", "qzeros", "scales", "g_idx"] {
        let [(kind, _, grid)] = parts_of(&tensors, &format!("{layer}.mlp.down_proj.{leaf}"))[..] else {
            panic!()
        };
        assert_eq!((kind, grid), ("intermediate", 128), "{leaf}");
        let [(kind, _, grid)] = parts_of(&tensors, &format!("{layer}.self_attn.o_proj.{leaf}"))[..] else {
            panic!()
        };
        assert_eq!((kind, grid), ("query_heads", 128), "{leaf}");
    }
}

#[test]
fn gptq_with_reordered_inputs_keeps_row_parallel_layers_whole() {
    let raw = gptq_tensors(GEOMETRY, 4, 128);
    let whole: u64 = raw.iter().filter(|t| t.name.contains("down_proj")).map(|t| t.bytes).sum();
    let (tensors, unsplittable) = classify(raw, &dimensions(GEOMETRY, 1, gptq(4, 128, true)));
    assert_parts_add_up(&tensors);
    let named: Vec<_> = unsplittable.iter().map(|u| u.what.as_str()).collect();
    assert_eq!(
        named,
        [
            "model.layers.*.self_attn.o_proj (1 layer, 4 tensors)",
            "model.layers.*.mlp.down_proj (1 layer, 4 tensors)"
        ]
    );
    assert_eq!(unsplittable[1].bytes, whole);
    assert!(unsplittable[0].reason.contains("desc_act"));
    assert_eq!(parts_of(&tensors, "model.layers.0.mlp.up_proj.qweight")[0].0, "intermediate");
    assert_eq!(parts_of(&tensors, "model.layers.0.mlp.down_proj.qweight")[0].0, "whole");
}

#[test]
fn gptq_with_one_group_keeps_the_row_parallel_scales_whole() {
    let (tensors, _) = classify(gptq_tensors(GEOMETRY, 8, 0), &dimensions(GEOMETRY, 1, gptq(8, 0, false)));
    assert_eq!(parts_of(&tensors, "model.layers.0.mlp.down_proj.scales"), [("whole", 384 * 2, 1)]);
    assert_eq!(
        parts_of(&tensors, "model.layers.0.mlp.down_proj.qweight"),
        [("intermediate", 256 * 384 * 4, 4)]
    );
}

#[test]
fn awq_cuts_outputs_at_packs_and_inputs_at_groups() {
    let mut tensors = Vec::new();
    for (name, outputs, inputs) in linears(GEOMETRY) {
        tensors.push(raw(&format!("{name}.qweight"), "I32", &[inputs, outputs / 8], 4));
        tensors.push(raw(&format!("{name}.qzeros"), "I32", &[inputs / 64, outputs / 8], 4));
        tensors.push(raw(&format!("{name}.scales"), "F16", &[inputs / 64, outputs], 2));
    }
    let quantization = Quantization::Awq { bits: 4, group_size: 64 };
    let (tensors, unsplittable) = classify(tensors, &dimensions(GEOMETRY, 1, quantization));
    assert_parts_add_up(&tensors);
    assert!(unsplittable.is_empty(), "{unsplittable:?}");
    assert_eq!(parts_of(&tensors, "model.layers.0.mlp.up_proj.qweight")[0].2, 8);
    assert_eq!(parts_of(&tensors, "model.layers.0.mlp.down_proj.scales")[0].2, 64);
    assert_eq!(parts_of(&tensors, "model.layers.0.self_attn.o_proj.qzeros")[0].0, "query_heads");
}

#[test]
fn float8_scales_follow_their_blocks() {
    let g = Geometry { width: 1088, ..GEOMETRY };
    let mut tensors = vec![bf16("lm_head.weight", &[1000, 384])];
    for (name, outputs, inputs) in linears(g) {
        tensors.push(raw(&format!("{name}.weight"), "F8_E4M3", &[outputs, inputs], 1));
        let blocks = [outputs.div_ceil(128), inputs.div_ceil(128)];
        tensors.push(raw(&format!("{name}.weight_scale_inv"), "F32", &blocks, 4));
    }
    let quantization = Quantization::Fp8Block { rows: 128, columns: 128 };
    let (tensors, unsplittable) = classify(tensors, &dimensions(g, 1, quantization));
    assert_parts_add_up(&tensors);
    assert!(unsplittable.is_empty(), "{unsplittable:?}");
    // What the checkpoint leaves in bfloat16 can be cut anywhere.
    assert_eq!(parts_of(&tensors, "lm_head.weight"), [("vocabulary", 768_000, 1)]);
    for leaf in ["weight", "weight_scale_inv"] {
        for module in ["mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj"] {
            let name = format!("model.layers.0.{module}.{leaf}");
            assert_eq!(parts_of(&tensors, &name)[0].2, 128, "{name}");
        }
    }
}

#[test]
fn a_fused_gate_whose_halves_do_not_end_on_a_block_is_held_whole_with_its_scales() {
    let tensors = vec![
        raw("model.layers.0.mlp.gate_up_proj.weight", "F8_E4M3", &[2 * 1088, 384], 1),
        raw("model.layers.0.mlp.gate_up_proj.weight_scale_inv", "F32", &[17, 3], 4),
        bf16("model.layers.0.mlp.gate_up_proj.bias", &[2 * 1088]),
    ];
    let g = Geometry { width: 1088, ..GEOMETRY };
    let quantization = Quantization::Fp8Block { rows: 128, columns: 128 };
    let (tensors, unsplittable) = classify(tensors, &dimensions(g, 1, quantization));
    assert!(tensors.iter().all(|t| t.role == Role::Replicated && t.reason.is_some()), "{tensors:?}");
    let [only] = unsplittable.as_slice() else { panic!("{unsplittable:?}") };
    assert_eq!(only.bytes, tensors.iter().map(|t| t.bytes).sum::<u64>());
    assert!(only.reason.contains("1088") && only.reason.contains("128"), "{only:?}");
}

#[test]
fn exl2_counts_shares_in_blocks_of_32_columns() {
    let g = Geometry { hidden: 512, ..GEOMETRY };
    let mut tensors = Vec::new();
    let head = ("lm_head".to_owned(), g.vocabulary, g.hidden);
    for (name, outputs, inputs) in linears(g).into_iter().chain([head]) {
        let (columns, groups) = (outputs.next_multiple_of(32), inputs / 32);
        tensors.push(raw(&format!("{name}.q_weight"), "I32", &[inputs / 8, columns], 4));
        tensors.push(raw(&format!("{name}.q_invperm"), "I32", &[inputs], 4));
        tensors.push(raw(&format!("{name}.q_scale"), "I32", &[groups, columns / 8], 4));
        tensors.push(raw(&format!("{name}.q_scale_max"), "F16", &[groups], 2));
        tensors.push(raw(&format!("{name}.q_groups"), "I16", &[2 * groups], 2));
    }
    let (tensors, unsplittable) = classify(tensors, &dimensions(g, 1, Quantization::Exl2));
    assert_parts_add_up(&tensors);
    assert!(unsplittable.is_empty(), "{unsplittable:?}");
    assert_eq!(parts_of(&tensors, "lm_head.q_weight"), [("vocabulary", 64 * 1024 * 4, 32)]);
    assert_eq!(parts_of(&tensors, "model.layers.0.self_attn.o_proj.q_weight")[0].0, "query_heads");
    assert_eq!(
        parts_of(&tensors, "model.layers.0.mlp.down_proj.q_scale"),
        [("intermediate", 32 * 64 * 4, 32)]
    );
    assert_eq!(parts_of(&tensors, "model.layers.0.self_attn.q_proj.q_groups")[0].0, "with_attention");
}

#[test]
fn mxfp4_experts_are_cut_at_their_blocks() {
    let mut dimensions = dimensions(GEOMETRY, 1, Quantization::Other { name: "mxfp4".to_owned() });
    dimensions.layers[0].mlp = Mlp::Experts { count: 4, active: 2, width: 96, shared_width: 0 };
    let at = "model.layers.0.mlp.experts";
    let (tensors, unsplittable) = classify(
        vec![
            raw(&format!("{at}.gate_up_proj_blocks"), "U8", &[4, 192, 12, 16], 1),
            raw(&format!("{at}.gate_up_proj_scales"), "U8", &[4, 192, 12], 1),
            bf16(&format!("{at}.gate_up_proj_bias"), &[4, 192]),
            raw(&format!("{at}.down_proj_blocks"), "U8", &[4, 384, 3, 16], 1),
            raw(&format!("{at}.down_proj_scales"), "U8", &[4, 384, 3], 1),
            bf16(&format!("{at}.down_proj_bias"), &[4, 384]),
        ],
        &dimensions,
    );
    assert!(unsplittable.is_empty(), "{unsplittable:?}");
    let grids: Vec<_> = tensors.iter().map(|t| (kind(t.parts[0].along), t.parts[0].grid)).collect();
    let experts = |grid| ("experts", grid);
    assert_eq!(grids, [experts(1), experts(1), experts(1), experts(32), experts(32), ("whole", 1)]);
}

#[test]
fn unknown_quantisations_leave_linear_layers_whole_and_say_so() {
    let quantization = Quantization::Other { name: "bitsandbytes".to_owned() };
    let (tensors, unsplittable) = classify(
        vec![
            raw("model.layers.0.mlp.up_proj.weight", "U8", &[196_608, 1], 1),
            raw("model.layers.0.mlp.up_proj.weight.absmax", "F32", &[6144], 4),
            raw("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "U8", &[90], 1),
            bf16("model.layers.0.self_attn.q_proj.weight", &[512, 384]),
        ],
        &dimensions(GEOMETRY, 1, quantization),
    );
    let [only] = unsplittable.as_slice() else { panic!("{unsplittable:?}") };
    assert!(only.reason.contains("bitsandbytes") && only.what.contains("3 tensors"), "{only:?}");
    // A module that the quantiser skipped is cut like any other.
    assert_eq!(parts_of(&tensors, "model.layers.0.self_attn.q_proj.weight")[0].0, "query_heads");
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
            0 => gptq(bits, group, false),
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
