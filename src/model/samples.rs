//! Recorded and made-up tensors that the tests of this room share.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use super::{Dimensions, RawTensor};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// A JSON file of `tests/data`.
pub(crate) fn data(path: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder().join(path)).unwrap()).unwrap()
}

/// A plain tensor.
pub(crate) fn raw(name: &str, dtype: &str, shape: &[u64], element_bytes: u64) -> RawTensor {
    let bytes = shape.iter().product::<u64>() * element_bytes;
    RawTensor { name: name.to_owned(), dtype: dtype.to_owned(), shape: shape.to_vec(), bytes, block: 1 }
}

/// A plain tensor of two bytes an element.
pub(crate) fn bf16(name: &str, shape: &[u64]) -> RawTensor {
    raw(name, "BF16", shape, 2)
}

/// The names of the recorded tiny models.
pub(crate) fn tiny_names() -> Vec<String> {
    let entries = std::fs::read_dir(folder().join("tiny_parameters")).unwrap();
    let stem = |path: PathBuf| path.file_stem().unwrap().to_string_lossy().into_owned();
    entries.map(|entry| stem(entry.unwrap().path())).collect()
}

/// A recorded tiny model: its tensors, its dimensions, and the whole record.
pub(crate) fn tiny(name: &str) -> (Vec<RawTensor>, Dimensions, Value) {
    let record = data(&format!("tiny_parameters/{name}.json"));
    let dimensions = serde_json::from_value(record["dimensions"].clone()).unwrap();
    let shapes: BTreeMap<String, Vec<u64>> = serde_json::from_value(record["parameters"].clone()).unwrap();
    (shapes.iter().map(|(name, shape)| bf16(name, shape)).collect(), dimensions, record)
}
