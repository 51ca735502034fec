use std::collections::HashMap;
use std::path::PathBuf;

use ::safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use super::*;
use crate::{Error, Kind};

/// A file as the crate `safetensors` writes it.
fn written(tensors: &[(&str, Dtype, &[usize])]) -> Vec<u8> {
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, dtype, shape)| vec![7; shape.iter().product::<usize>() * dtype.bitsize() / 8])
        .collect();
    let views = tensors
        .iter()
        .zip(&data)
        .map(|((name, dtype, shape), data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
    let notes = HashMap::from([("format".to_owned(), "pt \"quoted\" \u{e9}".to_owned())]);
    serialize(views, Some(notes)).unwrap()
}

fn read_bytes(bytes: &[u8]) -> Result<Vec<RawTensor>> {
    read_from(bytes, bytes.len() as u64, Path::new("some/model.safetensors"))
}

/// The message for a file with this header and so many bytes of tensors.
fn refusal(header: &str, data_len: u64) -> String {
    let error = parse(header.as_bytes(), data_len, Path::new("some/model.safetensors")).unwrap_err();
    assert_eq!(error.kind(), Kind::Model);
    let text = error.to_string();
    assert!(text.starts_with("some/model.safetensors: broken safetensors header: "), "{text}");
    assert!(text.ends_with("; download it again"), "{text}");
    text
}

fn assert_says(text: &str, wanted: &[&str]) {
    for part in wanted {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn agrees_with_the_crate_that_wrote_the_file() {
    let bytes = written(&[
        ("model.embed_tokens.weight", Dtype::BF16, &[12, 8]),
        ("with \"quotes\" and \u{1F600}", Dtype::F32, &[3]),
        ("scalar", Dtype::I64, &[]),
        ("empty", Dtype::F16, &[4, 0, 2]),
        ("packed", Dtype::F4, &[3, 6]),
        ("six", Dtype::F6_E2M3, &[2, 4]),
        ("scales", Dtype::F8_E8M0, &[5]),
    ]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, &bytes).unwrap();
    let read = read_header(&path).unwrap();

    let reference = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.len(), reference.len());
    for tensor in &read {
        let view = reference.tensor(&tensor.name).unwrap();
        assert_eq!(tensor.dtype, view.dtype().to_string());
        assert_eq!(tensor.shape, view.shape().iter().map(|&size| size as u64).collect::<Vec<_>>());
        assert_eq!(tensor.bytes, view.data().len() as u64);
    }
    let block = |name: &str| read.iter().find(|tensor| tensor.name == name).unwrap().block;
    assert_eq!((block("packed"), block("six"), block("scales"), block("scalar")), (2, 4, 1, 1));
}

#[test]
fn a_file_cut_anywhere_is_refused_and_says_how_much_is_missing() {
    let bytes = written(&[("a", Dtype::F32, &[2, 2]), ("b", Dtype::U8, &[3])]);
    for length in 0..bytes.len() {
        let text = read_bytes(&bytes[..length]).unwrap_err().to_string();
        if length >= 8 {
            // Bytes that the header lacks, or, where it is whole, bytes that the tensors lack.
            let header_end = 8 + usize::from(bytes[0]);
            let missing = if length < header_end { header_end } else { bytes.len() } - length;
            assert_says(&text, &[&format!("{missing} bytes are missing"), "download it again"]);
        } else {
            assert_says(&text, &[&format!("{length} bytes long")]);
        }
    }
    assert!(read_bytes(&bytes).is_ok());
    let longer = [bytes, vec![0; 5]].concat();
    assert_says(&read_bytes(&longer).unwrap_err().to_string(), &["5 bytes follow"]);
}

#[test]
fn header_lengths_that_cannot_be_are_refused_before_anything_is_read() {
    let mut bytes = u64::MAX.to_le_bytes().to_vec();
    bytes.extend(b"{}");
    assert_says(&read_bytes(&bytes).unwrap_err().to_string(), &["18446744073709551615", "2 after"]);
    // A sparse file of 200 MB: the header would fit, the format forbids it.
    let prefix = 100_000_001_u64.to_le_bytes();
    let text = read_from(&prefix[..], 200_000_000, Path::new("m")).unwrap_err().to_string();
    assert_says(&text, &["100000001", "100000000"]);
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n";
    assert_says(&read_bytes(pointer).unwrap_err().to_string(), &["git lfs pull"]);
}

#[test]
fn every_contradiction_is_named_with_its_values() {
    let cases: &[(&str, u64, &[&str])] = &[
        ("", 0, &["EOF"]),
        ("{", 0, &["EOF"]),
        ("{} x", 0, &["trailing"]),
        ("[]", 0, &["sequence", "an object with an entry for each tensor"]),
        ("\"text\"", 0, &["got the string \"text\""]),
        (r#"{"a": 5}"#, 0, &["tensor \"a\"", "dtype, shape and data_offsets"]),
        (r#"{"a": {"shape": [1], "data_offsets": [0, 4]}}"#, 4, &["missing field `dtype`"]),
        (r#"{"a": {"dtype": "F32", "data_offsets": [0, 4]}}"#, 4, &["missing field `shape`"]),
        (r#"{"a": {"dtype": "F32", "shape": [1]}}"#, 4, &["missing field `data_offsets`"]),
        (
            r#"{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}"#,
            4,
            &["tensor \"a\"", "unknown dtype \"F33\""],
        ),
        (r#"{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}"#, 4, &["got the string \"x\""]),
        (r#"{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}"#, 4, &["-1"]),
        (r#"{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}"#, 4, &["1.5"]),
        (
            r#"{"a": {"dtype": "F32", "shape": [18446744073709551616], "data_offsets": [0, 4]}}"#,
            4,
            &["whole number"],
        ),
        (
            r#"{"a": {"dtype": "F32", "shape": [1,1,1,1,1,1,1,1,1], "data_offsets": [0, 4]}}"#,
            4,
            &["more than 8"],
        ),
        (r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}"#, 4, &["[0]", "a start and an end"]),
        (
            r#"{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#,
            4,
            &["two fields dtype"],
        ),
        (
            r#"{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}"#,
            8,
            &["\"a\"", "[3]", "takes 12 bytes", "hold 8"],
        ),
        (r#"{"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}"#, 2, &["12 bits"]),
        (
            r#"{"a": {"dtype": "F64", "shape": [4294967296, 4294967296], "data_offsets": [0, 8]}}"#,
            8,
            &["overflows"],
        ),
        (
            r#"{"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}"#,
            4,
            &["ends before it starts", "4..0"],
        ),
        (
            r#"{"a": {"dtype": "U8", "shape": [4], "data_offsets": [3, 7]}}"#,
            7,
            &["hole of 3 bytes", "from byte 0"],
        ),
        (
            r#"{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "b": {"dtype": "U8", "shape": [4], "data_offsets": [6, 10]}}"#,
            10,
            &["\"b\"", "6..10", "hole of 2 bytes", "from byte 4"],
        ),
        (
            r#"{"b": {"dtype": "U8", "shape": [4], "data_offsets": [3, 7]}, "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}"#,
            7,
            &["\"b\"", "3..7", "overlaps \"a\" by 1 bytes"],
        ),
        (
            r#"{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}"#,
            8,
            &["two tensors", "\"a\""],
        ),
        (r#"{"__metadata__": {"a": "b"}, "__metadata__": {}}"#, 0, &["two entries __metadata__"]),
        (r#"{"__metadata__": {"a": 5}}"#, 0, &["5", "a string"]),
        (r#"{"a": {"dtype": "U8", "shape": [[1]], "data_offsets": [0, 1]}}"#, 1, &["deeper than 3"]),
    ];
    for (header, data_len, wanted) in cases {
        assert_says(&refusal(header, *data_len), wanted);
    }
}

#[test]
fn bytes_that_are_not_utf8_are_refused_with_their_place() {
    let error = parse(b"{\"a\xff\": 1}", 0, Path::new("m")).unwrap_err();
    assert_says(&error.to_string(), &["not UTF-8 at byte 3"]);
}

#[test]
fn what_the_format_allows_is_read() {
    // Offsets out of order, a field that nobody knows, spaces behind: all of it occurs.
    let header = r#" {"__metadata__": null, "b": {"dtype": "U8", "shape": [2], "data_offsets": [4, 6], "x": [1]},
        "a": {"data_offsets": [0, 4], "shape": [4], "dtype": "U8"}}   "#;
    let read = parse(header.as_bytes(), 6, Path::new("m")).unwrap();
    let names: Vec<&str> = read.iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert!(parse(b"{}", 0, Path::new("m")).unwrap().is_empty());
}

#[test]
fn long_strings_of_a_hostile_header_are_not_repeated() {
    let long = "\u{7f}".repeat(200_000);
    for header in [
        format!(r#"{{"a": "{long}"}}"#),
        format!(r#"{{"{long}": 1}}"#),
        format!(r#"{{"a": {{"dtype": "{long}"}}}}"#),
        format!(r#"{{"a": {{"shape": "{long}"}}}}"#),
        format!(r#"{{"a": {{"shape": ["{long}"]}}}}"#),
        format!(r#"{{"__metadata__": "{long}"}}"#),
        format!("\"{long}\""),
    ] {
        let text = refusal(&header, 0);
        assert!(text.len() < 1500, "{} bytes", text.len());
    }
}

#[test]
fn a_header_that_describes_nothing_may_not_cost_more_than_the_file() {
    let entry = |number: usize| format!(r#""{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    let header = |count: usize| format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","));
    assert_eq!(parse(header(2_000).as_bytes(), 0, Path::new("m")).unwrap().len(), 2_000);
    assert_says(&refusal(&header(20_000), 0), &["bytes of memory", "more than the whole file"]);
    // The same header is fine where the file is long, and only its length is ever asked.
    let long = 100 << 20;
    assert_says(&refusal(&header(20_000), long), &["104857600 bytes follow"]);
}

#[test]
fn a_missing_file_stays_missing() {
    let missing = PathBuf::from("/nonexistent/model.safetensors");
    let error = read_header(&missing).unwrap_err();
    assert!(matches!(&error, Error::File { path, .. } if *path == missing));
    assert_eq!(error.kind(), Kind::MissingFile);
}
