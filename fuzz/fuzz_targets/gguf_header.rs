//! A whole GGUF file.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tp_rs::model::gguf;

fuzz_target!(|input: &[u8]| {
    let length = input.len() as u64;
    match gguf::read_from(input, length, Path::new("fuzzed")) {
        Ok(file) => {
            let mut total = 0;
            for tensor in &file.tensors {
                let elements: u64 = tensor.shape.iter().product();
                assert_eq!(elements % tensor.block, 0);
                total += tensor.bytes;
            }
            assert!(total <= length);
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.starts_with("fuzzed") && text.len() < 4096);
        }
    }
});
