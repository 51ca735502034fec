mod writer;

use std::path::PathBuf;

use super::*;
use crate::{Error, Kind};
use writer::{Writer, array, text};

fn read_bytes(bytes: &[u8]) -> Result<GgufFile> {
    read_from(bytes, bytes.len() as u64, Path::new("some/model.gguf"))
}

/// The message for a file that must be refused.
fn refusal(bytes: &[u8]) -> String {
    let error = read_bytes(bytes).unwrap_err();
    assert_eq!(error.kind(), Kind::Model);
    let text = error.to_string();
    assert!(text.starts_with("some/model.gguf: broken GGUF header: "), "{text}");
    text
}

fn assert_says(text: &str, wanted: &[&str]) {
    for part in wanted {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

fn refused(writer: &Writer, wanted: &[&str]) {
    assert_says(&refusal(&writer.bytes()), wanted);
}

/// Everything that the Python package `gguf` wrote and then read back: a tensor of each of its types.
#[test]
fn agrees_with_the_python_package_on_every_type() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let file = read(&folder.join("gguf_py.gguf")).unwrap();
    let listed = std::fs::read(folder.join("gguf_py.json")).unwrap();
    let wanted: Vec<(String, String, Vec<u64>, u64, u64)> = serde_json::from_slice(&listed).unwrap();
    assert_eq!(wanted.len(), 34);
    let found: Vec<_> = file
        .tensors
        .iter()
        .map(|tensor| {
            (tensor.name.clone(), tensor.dtype.clone(), tensor.shape.clone(), tensor.bytes, tensor.block)
        })
        .collect();
    assert_eq!(found, wanted);

    assert_eq!((file.version, file.alignment), (3, 64));
    let value = |key: &str| &file.metadata[key];
    assert_eq!(value("general.architecture").as_str(), Some("llama"));
    assert_eq!(value("general.name").as_str(), Some("Fixture é"));
    assert_eq!(value("llama.context_length").as_u64(), Some(2048));
    assert_eq!(value("llama.attention.head_count").as_u64s(), Some(vec![8, 4]));
    assert_eq!(value("llama.rope.freq_base").as_f64(), Some(10000.0));
    assert_eq!(value("test.flags").as_bools(), Some(vec![true, false, true]));
    assert_eq!(value("test.yes").as_bool(), Some(true));
    assert_eq!(*value("test.i8"), GgufValue::Signed(-8));
    assert_eq!(value("test.i8").as_u64(), None);
    assert_eq!(*value("test.u8"), GgufValue::Unsigned(200));
    assert_eq!(*value("test.i16"), GgufValue::Signed(-300));
    assert_eq!(*value("test.i64"), GgufValue::Signed(-(1 << 60)));
    assert_eq!(*value("test.u64"), GgufValue::Unsigned(1 << 63));
    assert_eq!(*value("test.f64"), GgufValue::Float(0.1));
    let tokens = value("tokenizer.ggml.tokens").as_array().unwrap();
    assert_eq!((tokens.element, tokens.length), (GgufType::String, 103));
    assert!(tokens.values.is_none());
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = Writer::new()
        .string("general.architecture", "llama")
        .entry("a.strings", 9, &array(8, 2, &[text("x"), text("yz")].concat()))
        .entry("a.numbers", 9, &array(4, 2, &[0; 8]))
        .tensor("a", &[64, 2], 2, 72)
        .tensor("b", &[3], 0, 12)
        .bytes();
    let file = read_bytes(&bytes).unwrap();
    assert_eq!(file.tensors[0].shape, [2, 64]);
    for length in 0..bytes.len() {
        let text = refusal(&bytes[..length]);
        assert!(text.contains("missing") || text.contains("at most"), "{text}");
    }
    // The last tensor's padding, or anything else, may follow: ggml does not mind.
    assert!(read_bytes(&[bytes, vec![0; 100]].concat()).is_ok());
}

#[test]
fn other_formats_and_versions_are_named() {
    assert_says(&refusal(b"ggjt\x03\0\0\0"), &["\"ggjt\""]);
    let version = |version| Writer { version, ..Writer::new() };
    for good in [2, 3] {
        assert_eq!(read_bytes(&version(good).bytes()).unwrap().version, good);
    }
    refused(&version(1), &["version 1", "convert"]);
    refused(&version(0), &["version 0"]);
    refused(&version(4), &["version 4", "2 and 3"]);
    refused(&version(3_u32.swap_bytes()), &["big endian (version 3 "]);
}

#[test]
fn hostile_counts_are_refused_before_anything_is_read_by_them() {
    let mut bytes = Writer::new().bytes();
    bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_says(&refusal(&bytes), &["18446744073709551615 tensors", "hold 0 at most"]);
    let mut bytes = Writer::new().bytes();
    bytes[16..24].copy_from_slice(&(1_u64 << 60).to_le_bytes());
    assert_says(&refusal(&bytes), &["1152921504606846976 metadata entries"]);
    refused(&Writer::new().entry("a", 8, &u64::MAX.to_le_bytes()), &["18446744073709551615 bytes"]);
    for element in [0, 8, 9, 12] {
        let hostile = Writer::new().entry("a", 9, &array(element, 1 << 62, &[]));
        refused(&hostile, &["the array \"a\"", "missing"]);
    }
    refused(&Writer::new().entry("a", 13, &[0; 8]), &["\"a\" has the type 13"]);
    refused(&Writer::new().entry("a", 9, &array(13, 0, &[])), &["the type 13"]);
    let key = "k".repeat(65_536);
    refused(&Writer::new().u32(&key, 1), &["65536 bytes long", "65535"]);
}

#[test]
fn arrays_are_kept_up_to_a_length_and_passed_over_beyond_it() {
    let numbers = |length: u64| array(0, length, &vec![1; usize::try_from(length).unwrap()]);
    let nested = array(9, 2, &[array(8, 1, &text("x")), array(5, 1, &[0; 4])].concat());
    let bytes = Writer::new()
        .entry("kept", 9, &numbers(GgufArray::MAX_KEPT))
        .entry("long", 9, &numbers(GgufArray::MAX_KEPT + 1))
        .entry("nested", 9, &nested)
        .u32("after", 5)
        .bytes();
    let file = read_bytes(&bytes).unwrap();
    assert_eq!(file.metadata["kept"].as_u64s().unwrap().len(), 4096);
    assert_eq!(file.metadata["long"].as_array().unwrap().length, 4097);
    assert_eq!(file.metadata["long"].as_u64s(), None);
    assert_eq!(file.metadata["nested"].as_array().unwrap().element, GgufType::Array);
    assert_eq!(file.metadata["after"].as_u64(), Some(5));

    let deep = (0..6).fold(array(0, 0, &[]), |inner, _| array(9, 1, &inner));
    refused(&Writer::new().entry("deep", 9, &deep), &["\"deep\"", "deeper than 4"]);
}

#[test]
fn strings_that_are_not_utf8_are_refused_as_names_and_mended_as_values() {
    let raw = |bytes: &[u8]| [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat();
    let bytes = Writer::new().entry("general.name", 8, &raw(b"caf\xe9")).bytes();
    assert_eq!(read_bytes(&bytes).unwrap().metadata["general.name"].as_str(), Some("caf\u{fffd}"));
    let mut writer = Writer::new();
    writer.entries.push([raw(b"\xe9"), vec![0; 5]].concat());
    refused(&writer, &["not UTF-8", "byte 24"]);
}

#[test]
fn keys_and_names_are_there_once() {
    refused(&Writer::new().u32("a", 1).u32("b", 1).u32("a", 1), &["key \"a\" is there twice"]);
    let twice = Writer::new().tensor("t", &[1], 0, 4).tensor("u", &[1], 0, 4).tensor("t", &[1], 0, 4);
    refused(&twice, &["two tensors", "\"t\""]);
}

#[test]
fn alignment_is_a_power_of_two() {
    for wrong in [0, 3, 48] {
        refused(&Writer::new().u32("general.alignment", wrong), &[&wrong.to_string(), "power of two"]);
    }
    refused(&Writer::new().entry("general.alignment", 10, &64_u64.to_le_bytes()), &["64", "U64"]);
    refused(&Writer::new().string("general.alignment", "64"), &["a value", "String"]);
    let mut writer = Writer { alignment: 8, ..Writer::new() }.u32("general.alignment", 8);
    writer = writer.tensor("a", &[3], 24, 3).tensor("b", &[1], 24, 1);
    assert_eq!(read_bytes(&writer.bytes()).unwrap().alignment, 8);
}

#[test]
fn tensors_lie_where_ggml_wants_them() {
    let one = || Writer::new().tensor("a", &[16], 0, 64);
    let place = |offset| Writer { data_len: 4096, ..one().info("b", &[8], 0, offset) };
    assert!(read_bytes(&place(64).bytes()).is_ok());
    refused(&place(65), &["\"b\"", "1 bytes past a multiple", "32"]);
    refused(&place(32), &["\"b\"", "overlaps tensor \"a\" by 32 bytes"]);
    refused(&place(128), &["\"b\"", "hole of 64 bytes"]);
    let beyond = Writer { data_len: 70, ..one().info("b", &[8], 0, 64) };
    refused(&beyond, &["with \"b\"", "26 bytes are missing"]);
    // Infos need not be in the order of the bytes.
    let swapped = Writer { data_len: 96, ..Writer::new().info("b", &[8], 0, 64).info("a", &[16], 0, 0) };
    assert_eq!(read_bytes(&swapped.bytes()).unwrap().tensors[0].name, "b");
    // An empty tensor takes no room.
    let empty = Writer::new().tensor("e", &[32, 0], 2, 0).tensor("a", &[16], 0, 64);
    assert_eq!(read_bytes(&empty.bytes()).unwrap().tensors[0].bytes, 0);
    refused(&one().info("b", &[u64::MAX / 8], 24, 1 << 63), &["hole"]);
    let wide = Writer::new().info("a", &[u64::MAX - 5], 24, 0);
    refused(&wide, &["\"a\"", "beyond 64 bits"]);
}

#[test]
fn shapes_and_types_are_checked() {
    refused(&Writer::new().tensor("t", &[1; 5], 0, 4), &["\"t\"", "5 dimensions", "4 at most"]);
    refused(&Writer::new().tensor("t", &[48], 2, 27), &["rows of 48", "32", "Q4_0"]);
    refused(&Writer::new().tensor("t", &[1 << 32, 1 << 32], 0, 0), &["\"t\"", "[4294967296, 4294967296]"]);
    refused(&Writer::new().tensor("t", &[32], 4, 0), &["type 4", "removed"]);
    refused(&Writer::new().tensor("t", &[32], 42, 0), &["unknown type 42"]);
    let scalar = Writer::new().tensor("t", &[], 0, 4);
    assert!(read_bytes(&scalar.bytes()).unwrap().tensors[0].shape.is_empty());
}

#[test]
fn a_header_that_describes_nothing_may_not_cost_more_than_the_file() {
    let many = |count: u32| {
        (0..count).fold(Writer::new(), |writer, number| writer.tensor(&number.to_string(), &[0], 24, 0))
    };
    assert_eq!(read_bytes(&many(1_500).bytes()).unwrap().tensors.len(), 1_500);
    refused(&many(20_000), &["bytes of memory", "more than the whole file"]);
    let kept = array(0, 4096, &[0; 4096]);
    let arrays = (0..100).fold(Writer::new(), |writer, number| writer.entry(&number.to_string(), 9, &kept));
    refused(&arrays, &["bytes of memory"]);
}

fn part(number: u16, count: u16, tensors: &[&str]) -> Writer {
    let writer = Writer::new().u16("split.no", number).u16("split.count", count);
    let writer = writer.entry("split.tensors.count", 5, &3_i32.to_le_bytes());
    tensors.iter().fold(writer, |writer, name| writer.tensor(name, &[8], 0, 32))
}

#[test]
fn parts_are_read_whichever_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |number| folder.path().join(format!("m-{number:05}-of-00003.gguf"));
    let write = |number, writer: &Writer| std::fs::write(path(number), writer.bytes()).unwrap();
    write(1, &part(0, 3, &[]).string("general.architecture", "llama"));
    write(2, &part(1, 3, &["a", "b"]));
    let error = read(&path(2)).unwrap_err();
    assert_eq!(error.kind(), Kind::Model);
    assert_says(&error.to_string(), &["m-00002-of-00003.gguf", "m-00003-of-00003.gguf is not beside it"]);

    write(3, &part(2, 3, &["c"]));
    for number in 1..=3 {
        let file = read(&path(number)).unwrap();
        assert_eq!(file.metadata["general.architecture"].as_str(), Some("llama"));
        let names: Vec<&str> = file.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
    }

    let says = |wanted: &[&str]| assert_says(&read(&path(1)).unwrap_err().to_string(), wanted);
    write(3, &part(2, 3, &["b"]));
    says(&["two of its parts", "\"b\""]);
    write(3, &part(2, 3, &["c", "d"]));
    says(&["4 tensors", "says 3"]);
    write(3, &part(1, 3, &["c"]));
    says(&["m-00003-of-00003.gguf", "split.no is 1", "wanted 3 and 2"]);
    write(1, &part(0, 4, &[]));
    says(&["4 parts", "3"]);
    let renamed = folder.path().join("model.gguf");
    std::fs::write(&renamed, part(0, 3, &[]).bytes()).unwrap();
    assert_says(&read(&renamed).unwrap_err().to_string(), &["3 parts", "name-00001-of-00003.gguf"]);
}

#[test]
fn a_missing_file_stays_missing() {
    let error = read(Path::new("/nonexistent/m.gguf")).unwrap_err();
    assert!(matches!(error, Error::File { .. }));
    assert_eq!(error.kind(), Kind::MissingFile);
}
