//! The header of a safetensors file, as a whole file and with any number of bytes behind it.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use safetensors::tensor::Metadata;
use tp_rs::model::safetensors as reader;

fuzz_target!(|input: &[u8]| {
    let path = Path::new("fuzzed");
    let _ = reader::read_from(input, input.len() as u64, path);

    // The first eight bytes say how many bytes follow the header, so that the fuzzer need not write them.
    let Some((length, header)) = input.split_first_chunk::<8>() else { return };
    let data_len = u64::from_le_bytes(*length) % (1 << 20);
    match reader::parse(header, data_len, path) {
        Ok(tensors) => {
            assert_eq!(tensors.iter().map(|tensor| tensor.bytes).sum::<u64>(), data_len);
            // The crate that defines the format must read what is read here, and read the same.
            let text = std::str::from_utf8(header).expect("a header that was read is UTF-8");
            let reference = reader_of_the_crate(text).expect("the crate reads it");
            assert_eq!(reference.tensors().len(), tensors.len());
            for tensor in &tensors {
                let info = reference.info(&tensor.name).expect("the crate has the tensor");
                assert_eq!(info.dtype.to_string(), tensor.dtype);
                assert_eq!((info.data_offsets.1 - info.data_offsets.0) as u64, tensor.bytes);
                assert!(info.shape.iter().map(|&size| size as u64).eq(tensor.shape.iter().copied()));
            }
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.starts_with("fuzzed") && text.len() < 4096);
        }
    }
});

fn reader_of_the_crate(text: &str) -> Result<Metadata, serde_json::Error> {
    serde_json::from_str(text)
}
