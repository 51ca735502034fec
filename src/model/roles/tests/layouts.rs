//! How quantised checkpoints store their linear layers.

use proptest::prelude::*;

use super::*;

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
    dimensions.layers[0].mlp = experts(4, 96, 0);
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
fn a_grid_of_heads_with_another_length_asks_for_as_many_whole_heads() {
    // 192 rows a head in blocks of 128: two heads end on a block, and so do two of the model's heads of 64.
    let mut dimensions = dimensions(GEOMETRY, 1, Quantization::Fp8Block { rows: 128, columns: 128 });
    dimensions.layers[0].mixer = Mixer::Latent { query_heads: 8, latent_dim: 128, rope_dim: 64 };
    let at = "model.layers.0.self_attn";
    let (tensors, unsplittable) = classify(
        vec![
            raw(&format!("{at}.q_b_proj.weight"), "F8_E4M3", &[8 * 192, 256], 1),
            raw(&format!("{at}.q_b_proj.weight_scale_inv"), "F32", &[12, 2], 4),
            raw(&format!("{at}.kv_b_proj.weight"), "F8_E4M3", &[8 * 256, 128], 1),
            raw(&format!("{at}.kv_a_proj_with_mqa.weight"), "F8_E4M3", &[192, 384], 1),
            raw(&format!("{at}.kv_a_proj_with_mqa.weight_scale_inv"), "F32", &[2, 3], 4),
        ],
        &dimensions,
    );
    assert!(unsplittable.is_empty(), "{unsplittable:?}");
    assert_parts_add_up(&tensors);
    let grids: Vec<_> = tensors.iter().map(|t| (kind(t.parts[0].along), t.parts[0].grid)).collect();
    let (query, whole) = ("query_heads", ("with_attention", 1));
    assert_eq!(grids, [(query, 2 * 64), (query, 2 * 64), (query, 1), whole, whole]);
}

proptest! {
    /// Every cut that GPTQ's grid allows falls between two words and between two groups.
    #[test]
    fn gptq_grids_are_where_words_and_groups_end(bits in prop::sample::select(vec![2_u64, 3, 4, 8]), power in 5_u32..8, blocks in 2_u64..9) {
        let group = 1 << power;
        let g = Geometry { width: group * blocks, ..GEOMETRY };
        let (tensors, unsplittable) = classify(gptq_tensors(g, bits, group), &dimensions(g, 1, gptq(bits, group, false)));
        prop_assert!(unsplittable.is_empty(), "{unsplittable:?}");
        let grid = |name: &str| parts_of(&tensors, &format!("model.layers.0.mlp.{name}.qweight"))[0].2;
        prop_assert!(grid("down_proj") * bits % 32 == 0 && grid("down_proj") % group == 0);
        prop_assert!((1..grid("down_proj")).all(|cut| cut * bits % 32 != 0 || cut % group != 0));
        prop_assert!(grid("up_proj") * bits % 32 == 0);
        prop_assert!((1..grid("up_proj")).all(|cut| cut * bits % 32 != 0));
    }
}
