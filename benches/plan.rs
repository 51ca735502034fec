//! The planner's own time: the solver alone on Llama-3-70B, and whole plans from headers on disk.
//!
//! Goals: 16 unequal ranks under 10 ms, 4 under 1 ms; a checkpoint of 30 shards under 50 ms with a warm cache.

use std::hint::black_box;
use std::path::Path;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use tp_rs::model::ModelShape;
use tp_rs::split::{Context, Options, RankBudget, Strategy};

const CONFIG: &str = include_str!("../tests/data/configs/llama-3-70b.json");

/// GiB and GB/s of cards that people own.
const CARDS: [(f64, f64); 16] = [
    (24.0, 936.0),
    (12.0, 360.0),
    (8.0, 448.0),
    (16.0, 600.0),
    (24.0, 1008.0),
    (10.0, 320.0),
    (11.0, 616.0),
    (12.0, 504.0),
    (6.0, 336.0),
    (24.0, 936.0),
    (16.0, 512.0),
    (8.0, 288.0),
    (12.0, 432.0),
    (20.0, 768.0),
    (16.0, 640.0),
    (10.0, 484.0),
];

fn shape() -> ModelShape {
    let config = serde_json::from_str(CONFIG).unwrap_or_default();
    ModelShape::from_config(&config, "Llama-3-70B").unwrap_or_else(|error| unreachable!("{error}"))
}

/// The first `count` cards, their memory scaled so that the model takes `filled` of it.
fn ranks(count: usize, filled: f64) -> Vec<RankBudget> {
    let model_gib = 134.0;
    let sum: f64 = CARDS[..count].iter().map(|(gib, _)| gib).sum();
    let cards = CARDS[..count].iter().enumerate();
    cards
        .map(|(index, (gib, speed))| {
            RankBudget::cuda(index, gib * model_gib / sum / filled + 1.6).with_speed(*speed)
        })
        .collect()
}

fn whole_plans(criterion: &mut Criterion) {
    let shape = shape();
    let mut group = criterion.benchmark_group("plan Llama-3-70B");
    for count in [2, 4, 8, 16] {
        for (name, filled) in [("room", 0.5), ("memory binds", 0.97)] {
            for (strategy, duplicate_kv) in
                [(Strategy::Balanced, false), (Strategy::Balanced, true), (Strategy::ExLlamaV2, false)]
            {
                let options =
                    Options { strategy, duplicate_kv, context: Context::Tokens(4096), ..Options::default() };
                let ranks = ranks(count, filled);
                let shared = if duplicate_kv { ", shared heads" } else { "" };
                let id = BenchmarkId::new(format!("{}{shared}, {name}", strategy.name()), count);
                group.bench_function(id, |bench| {
                    bench.iter(|| tp_rs::plan(black_box(&shape), black_box(&ranks), &options));
                });
            }
        }
    }
    group.finish();
}

/// Writes a checkpoint of 30 shards with the headers of Llama-3-70B and holes instead of weights.
fn write_shards(folder: &Path, shape: &ModelShape) -> std::io::Result<()> {
    let mut weight_map = serde_json::Map::new();
    let per_shard = shape.tensors.len().div_ceil(30);
    for (index, tensors) in shape.tensors.chunks(per_shard).enumerate() {
        let name = format!("model-{:05}-of-00030.safetensors", index + 1);
        let mut header = serde_json::Map::new();
        let mut offset = 0;
        for tensor in tensors {
            let end = offset + tensor.bytes;
            let info = serde_json::json!({
                "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end],
            });
            header.insert(tensor.name.clone(), info);
            weight_map.insert(tensor.name.clone(), name.clone().into());
            offset = end;
        }
        let text = serde_json::to_vec(&header)?;
        let mut file = std::fs::File::create(folder.join(&name))?;
        std::io::Write::write_all(&mut file, &(text.len() as u64).to_le_bytes())?;
        std::io::Write::write_all(&mut file, &text)?;
        file.set_len(8 + text.len() as u64 + offset)?;
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
    std::fs::write(folder.join("model.safetensors.index.json"), serde_json::to_vec(&index)?)?;
    std::fs::write(folder.join("config.json"), CONFIG)
}

fn headers(criterion: &mut Criterion) {
    let Ok(folder) = tempfile::tempdir() else { return };
    if write_shards(folder.path(), &shape()).is_err() {
        return;
    }
    let ranks = ranks(4, 0.9);
    criterion.bench_function("plan a checkpoint of 30 shards from its headers", |bench| {
        bench.iter(|| {
            let shape = ModelShape::open(black_box(folder.path()))?;
            tp_rs::plan(&shape, &ranks, &Options::default())
        });
    });
}

criterion_group!(benches, whole_plans, headers);
criterion_main!(benches);
