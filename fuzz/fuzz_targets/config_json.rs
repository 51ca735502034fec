//! Any bytes as a transformers configuration: a shape or an error, never a panic.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tp_rs::model::{ModelShape, checkpoint};

fuzz_target!(|data: &[u8]| {
    if let Ok(config) = checkpoint::parse_config(data, Path::new("config.json")) {
        let _ = ModelShape::from_config(&config, "fuzz");
    }
});
