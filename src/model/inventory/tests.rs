//! The configurations in `tests/data/configs` against what transformers makes of them (`tests/data/parameters`,
//! recorded by `tests/data/record_parameters.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::Error;
use crate::model::{Dimensions, Mixer, Mlp, Quantization, RawTensor};
use crate::model::{config, inventory};

fn data(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(folder)
}

pub(in crate::model) fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub(in crate::model) fn published(name: &str) -> Value {
    read(&data("configs").join(format!("{name}.json")))
}

/// Every configuration: name, configuration, what transformers says of it.
fn recorded() -> Vec<(String, Value, Value)> {
    let mut all: Vec<_> = std::fs::read_dir(data("configs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let parameters = read(&data("parameters").join(format!("{name}.json")));
            (name, read(&path), parameters)
        })
        .collect();
    all.sort_by(|left, right| left.0.cmp(&right.0));
    assert!(all.len() > 40, "only {} configurations were found", all.len());
    all
}

/// Architectures whose dimensions are read but whose tensors are not listed.
const WITHOUT_INVENTORY: [&str; 4] = ["gpt2", "jamba", "mamba", "qwen3_next"];

fn elements(tensor: &RawTensor) -> u64 {
    tensor.shape.iter().product()
}

fn fnv1a(lines: &BTreeMap<&str, &[u64]>) -> String {
    let mut state = 0xCBF2_9CE4_8422_2325_u64;
    for (name, shape) in lines {
        let shape = shape.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        for byte in format!("{name} {shape}\n").bytes() {
            state = (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
        }
    }
    format!("{state:016x}")
}

#[test]
fn the_inventory_is_what_transformers_saves() {
    let mut compared = 0;
    for (name, config, wanted) in recorded() {
        let dimensions = config::dimensions(&config, &name).unwrap();
        if WITHOUT_INVENTORY.contains(&dimensions.architecture.as_str()) {
            let error = inventory::tensors(&config, &dimensions, &name).unwrap_err();
            assert!(matches!(error, Error::UnknownArchitecture { .. }), "{name}: {error}");
            continue;
        }
        let tensors = inventory::tensors(&config, &dimensions, &name).unwrap();
        let got: BTreeMap<&str, &[u64]> =
            tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice())).collect();
        assert_eq!(got.len(), tensors.len(), "{name}: a name comes twice");
        // Names first: they say most about what is wrong.
        for (tensor, shape) in wanted["tensors"].as_object().unwrap() {
            let shape: Vec<u64> = shape.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
            assert_eq!(got.get(tensor.as_str()).copied(), Some(shape.as_slice()), "{name}: {tensor}");
        }
        assert_eq!(tensors.len() as u64, wanted["count"].as_u64().unwrap(), "{name}: tensors");
        assert_eq!(
            tensors.iter().map(elements).sum::<u64>(),
            wanted["total"].as_u64().unwrap(),
            "{name}: total"
        );
        assert_eq!(fnv1a(&got), wanted["digest"].as_str().unwrap(), "{name}: some name or shape differs");
        compared += 1;
    }
    assert!(compared > 35, "only {compared} configurations were compared");
}

#[test]
fn well_known_totals_come_out() {
    // Published parameter counts, independent of transformers.
    let published_totals = [
        ("llama-3-8b", 8_030_261_248_u64),
        ("llama-3-70b", 70_553_706_496),
        ("llama-2-7b", 6_738_415_616),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("mixtral-8x7b", 46_702_792_704),
        ("gemma-2-9b", 9_241_705_984),
        ("phi-3-mini-4k", 3_821_079_552),
        ("phi-2", 2_779_683_840),
        ("deepseek-v2-lite", 15_706_484_224),
        ("deepseek-v3", 671_026_419_200),
        ("smollm2-135m", 134_515_008),
        ("gpt-oss-20b", 20_914_757_184),
        ("falcon-7b", 6_921_720_704),
    ];
    for (name, total) in published_totals {
        let config = published(name);
        let dimensions = config::dimensions(&config, name).unwrap();
        let tensors = inventory::tensors(&config, &dimensions, name).unwrap();
        assert_eq!(tensors.iter().map(elements).sum::<u64>(), total, "{name}");
        let plain = tensors.iter().filter(|tensor| !tensor.name.ends_with("e_score_correction_bias"));
        for tensor in plain {
            assert_eq!(tensor.bytes, elements(tensor) * dimensions.element_bytes, "{name}: {}", tensor.name);
        }
    }
}

/// Mixer, window and cache elements a token.
fn described(mixer: &Mixer) -> Value {
    match mixer {
        Mixer::Attention { kv_heads, key_dim, value_dim, window, .. } => {
            json!(["attention", window, kv_heads * (key_dim + value_dim)])
        }
        Mixer::Latent { latent_dim, rope_dim, .. } => json!(["latent", null, latent_dim + rope_dim]),
        Mixer::Recurrent { .. } => json!(["recurrent", null, 0]),
        Mixer::None => json!(["none", null, 0]),
    }
}

#[test]
fn layers_cache_what_transformers_modules_produce() {
    for (name, config, wanted) in recorded() {
        let dimensions = config::dimensions(&config, &name).unwrap();
        let got: Vec<Value> = dimensions.layers.iter().map(|layer| described(&layer.mixer)).collect();
        let mut all = Vec::new();
        for run in wanted["layers"].as_array().unwrap() {
            let entry = json!([run[1], run[2], run[3]]);
            all.extend((0..run[0].as_u64().unwrap()).map(|_| entry.clone()));
        }
        assert_eq!(got, all, "{name}");
    }
}

/// Elements that the MLPs of `dimensions` hold: routed experts, and everything else without routers and biases.
fn mlp_elements(dimensions: &Dimensions) -> (u64, u64) {
    let hidden = dimensions.hidden;
    dimensions.layers.iter().fold((0, 0), |(experts, dense), layer| match layer.mlp {
        Mlp::Dense { width } => (experts, dense + 3 * hidden * width),
        Mlp::Experts { count, width, shared_width, .. } => {
            (experts + 3 * count * hidden * width, dense + 3 * hidden * shared_width)
        }
        Mlp::None => (experts, dense),
    })
}

#[test]
fn experts_and_widths_add_up_to_what_transformers_allocates() {
    for name in [
        "llama-3-8b",
        "gemma-2-9b",
        "phi-3-mini-4k",
        "deepseek-v2-lite",
        "deepseek-v3",
        "mixtral-8x7b",
        "olmoe-1b-7b",
        "qwen1.5-moe-a2.7b",
        "qwen3-30b-a3b",
        "qwen3-moe-mixed",
        "qwen3-next-80b",
        "llama-4-scout",
    ] {
        let dimensions = config::dimensions(&published(name), name).unwrap();
        let wanted = read(&data("parameters").join(format!("{name}.json")));
        let (experts, dense) = mlp_elements(&dimensions);
        assert_eq!(experts, wanted["roles"]["experts"].as_u64().unwrap(), "{name}: routed experts");
        // Routers and the gates of shared experts are the only other parameters in there.
        let routers: u64 = dimensions
            .layers
            .iter()
            .map(|layer| match (&layer.mlp, dimensions.architecture.as_str()) {
                (Mlp::Experts { count, .. }, "qwen2_moe" | "qwen3_next") => (count + 1) * dimensions.hidden,
                (Mlp::Experts { count, .. }, "deepseek_v3") => count * (dimensions.hidden + 1),
                (Mlp::Experts { count, .. }, _) => count * dimensions.hidden,
                _ => 0,
            })
            .sum();
        assert_eq!(dense + routers, wanted["roles"]["mlp"].as_u64().unwrap(), "{name}: dense and shared");
    }
}

fn quantised(name: &str, quantization: Value) -> (Value, Dimensions) {
    let mut config = published(name);
    config["quantization_config"] = quantization;
    let dimensions = config::dimensions(&config, name).unwrap();
    (config, dimensions)
}

fn find<'a>(tensors: &'a [RawTensor], name: &str) -> &'a RawTensor {
    tensors.iter().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn gptq_and_awq_pack_as_their_kernels_expect() {
    let (config, dimensions) = quantised(
        "llama-3-8b",
        json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": true}),
    );
    assert_eq!(dimensions.quantization, Quantization::Gptq { bits: 4, group_size: 128, act_order: true });
    let tensors = inventory::tensors(&config, &dimensions, "gptq").unwrap();
    let down = "model.layers.3.mlp.down_proj";
    assert_eq!(find(&tensors, &format!("{down}.qweight")).shape, [14336 / 8, 4096]);
    assert_eq!(find(&tensors, &format!("{down}.qzeros")).shape, [14336 / 128, 4096 / 8]);
    assert_eq!(find(&tensors, &format!("{down}.scales")).shape, [14336 / 128, 4096]);
    assert_eq!(find(&tensors, &format!("{down}.g_idx")).bytes, 14336 * 4);
    assert_eq!(find(&tensors, "lm_head.weight").dtype, "BF16");
    assert!(!tensors.iter().any(|tensor| tensor.name == format!("{down}.weight")));

    let (config, dimensions) = quantised(
        "qwen2.5-7b",
        json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "gemm",
               "modules_to_not_convert": ["mlp.up_proj"]}),
    );
    let tensors = inventory::tensors(&config, &dimensions, "awq").unwrap();
    assert_eq!(find(&tensors, "model.layers.0.mlp.gate_proj.qweight").shape, [3584, 18944 / 8]);
    assert_eq!(find(&tensors, "model.layers.0.mlp.gate_proj.qzeros").shape, [28, 18944 / 8]);
    assert_eq!(find(&tensors, "model.layers.0.mlp.up_proj.weight").shape, [18944, 3584]);
    assert_eq!(find(&tensors, "model.layers.0.self_attn.q_proj.bias").dtype, "BF16");
}

#[test]
fn float8_blocks_and_mxfp4_experts_are_listed() {
    let (config, dimensions) = quantised(
        "deepseek-v3",
        json!({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}),
    );
    let tensors = inventory::tensors(&config, &dimensions, "fp8").unwrap();
    // 576 rows are four blocks and a half.
    let compressed = "model.layers.0.self_attn.kv_a_proj_with_mqa";
    assert_eq!(find(&tensors, &format!("{compressed}.weight_scale_inv")).shape, [5, 56]);
    assert_eq!(find(&tensors, &format!("{compressed}.weight")).bytes, 576 * 7168);
    assert_eq!(find(&tensors, "model.layers.3.mlp.gate.weight").dtype, "BF16");

    let (config, dimensions) = quantised("gpt-oss-20b", json!({"quant_method": "mxfp4"}));
    let tensors = inventory::tensors(&config, &dimensions, "mxfp4").unwrap();
    let experts = "model.layers.0.mlp.experts";
    assert_eq!(find(&tensors, &format!("{experts}.gate_up_proj_blocks")).shape, [32, 5760, 90, 16]);
    assert_eq!(find(&tensors, &format!("{experts}.down_proj_scales")).shape, [32, 2880, 90]);
    assert_eq!(find(&tensors, &format!("{experts}.down_proj_bias")).dtype, "BF16");
    // The checkpoint is 13.76 GB large.
    let bytes: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
    assert!((13_750_000_000..13_780_000_000).contains(&bytes), "{bytes}");
}

#[test]
fn quantisation_that_leaves_tensors_open_asks_for_headers() {
    for (name, quantization) in [
        ("llama-3-8b", json!({"quant_method": "compressed-tensors"})),
        ("llama-3-8b", json!({"quant_method": "bitsandbytes", "load_in_4bit": true})),
        ("mixtral-8x7b", json!({"quant_method": "gptq", "bits": 4, "group_size": 128})),
        ("llama-3-8b", json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "lm_head": true})),
    ] {
        let (config, dimensions) = quantised(name, quantization.clone());
        let error = inventory::tensors(&config, &dimensions, name).unwrap_err().to_string();
        assert!(error.contains("headers are enough"), "{quantization}: {error}");
    }
}

#[test]
fn an_unknown_architecture_is_named_with_what_is_known() {
    let mut config = published("llama-3-8b");
    config["model_type"] = json!("llama_of_tomorrow");
    let dimensions = config::dimensions(&config, "tomorrow").unwrap();
    assert_eq!(dimensions.layers.len(), 32);
    let error = inventory::tensors(&config, &dimensions, "tomorrow").unwrap_err().to_string();
    assert!(error.contains("llama_of_tomorrow") && error.contains("qwen3_moe"), "{error}");

    let wrapped = json!({"model_type": "strange_vision", "text_config": published("llama-3-8b")});
    let dimensions = config::dimensions(&wrapped, "wrapped").unwrap();
    let error = inventory::tensors(&wrapped, &dimensions, "wrapped").unwrap_err().to_string();
    assert!(error.contains("strange_vision") && error.contains("\"llama\""), "{error}");
}

#[test]
fn more_tensors_than_any_model_has_are_refused_before_they_are_listed() {
    let mut config = published("mixtral-8x7b");
    config["num_local_experts"] = json!(65_536);
    config["num_hidden_layers"] = json!(4096);
    let dimensions = config::dimensions(&config, "huge").unwrap();
    let error = inventory::tensors(&config, &dimensions, "huge").unwrap_err().to_string();
    assert!(error.contains("4096 layers"), "{error}");
}
