//! The text of an index.
#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use tp_rs::model::index;

fuzz_target!(|input: &[u8]| {
    let read = index::parse(input, Path::new("fuzzed"), |_, shard| {
        let parts: Vec<Component<'_>> = Path::new(shard).components().collect();
        assert!(matches!(parts[..], [Component::Normal(_)]) && !shard.contains(['/', '\\']));
        Ok(())
    });
    if let Err(error) = read {
        let text = error.to_string();
        assert!(text.starts_with("fuzzed") && text.len() < 4096);
    }
});
