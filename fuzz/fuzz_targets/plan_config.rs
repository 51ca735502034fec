//! Any bytes as a transformers configuration, planned where they describe a model: an answer or an error, never a
//! panic, and never more than a moment.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tp_rs::model::{ModelShape, checkpoint};
use tp_rs::split::{CacheType, Options, RankBudget};

fuzz_target!(|data: &[u8]| {
    let Ok(config) = checkpoint::parse_config(data, Path::new("config.json")) else { return };
    let Ok(shape) = ModelShape::from_config(&config, "fuzz") else { return };
    let ranks = [RankBudget::cuda(0, 24.0), RankBudget::cuda(1, 12.0), RankBudget::cuda(2, 3.0)];
    for duplicate_kv in [false, true] {
        let options = Options { duplicate_kv, cache: CacheType::Q6, ..Options::default() };
        if let Ok(plan) = tp_rs::plan(&shape, &ranks, &options) {
            assert_eq!(plan.fits, plan.ranks.iter().all(|rank| rank.total <= rank.budget));
        }
    }
});
