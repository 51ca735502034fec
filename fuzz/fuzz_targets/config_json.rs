//! Any bytes as a transformers configuration: an answer or an error, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(config) = serde_json::from_slice::<serde_json::Value>(data) {
        let _ = tp_rs::model::ModelShape::from_config(&config, "fuzz");
    }
});
