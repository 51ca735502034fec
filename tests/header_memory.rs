//! Headers that ask for as much memory as they can: reading takes no more than the file is long, and is not refused
//! long before that.

// Helpers of tests are tests, but clippy.toml's exceptions do not reach them.
#![allow(clippy::unwrap_used)]

#[path = "common/memory.rs"]
mod memory;
#[path = "../src/model/gguf/tests/writer.rs"]
#[allow(dead_code)]
mod writer;

use std::path::Path;

use memory::measured;
use tp_rs::model::{gguf, safetensors as reader};
use writer::{Writer, array};

const PATH: &str = "folder/the file";

/// The shortest file in which a header is not refused for its memory. `read` is given the bytes of the tensors.
fn shortest(read: impl Fn(u64) -> Option<String>) -> u64 {
    let refused = |data_len: u64| read(data_len).is_some_and(|text| text.contains("bytes of memory"));
    let (mut short, mut long) = (0_u64, 1 << 30);
    assert!(refused(short), "{:?}", read(short));
    assert!(!refused(long), "{:?}", read(long));
    while long - short > 1 {
        let middle = u64::midpoint(short, long);
        if refused(middle) {
            short = middle;
        } else {
            long = middle;
        }
    }
    assert_eq!(read(long), None, "a header is read as soon as its memory is allowed");
    long
}

/// Reading takes what the file has, never more, and is not refused long before that.
fn assert_tight(peak: u64, length: u64) {
    assert!(peak <= length, "{peak} bytes for a file of {length}");
    assert!(peak > length / 4, "{peak} bytes are allowed only for a file of {length}");
}

#[test]
fn tensors_of_safetensors_take_no_more_than_the_file() {
    let names: [fn(usize) -> String; 3] = [
        |number| number.to_string(),
        |number| format!("\\u0061{number}"),
        |number| number.to_string().repeat(30),
    ];
    // Tables double at powers of two: just before and just behind one.
    for (name, count) in names.iter().flat_map(|name| [3_580, 3_600].map(|count| (name, count))) {
        let empty = |number| {
            let name = name(number);
            format!(",\"{name}\":{{\"dtype\":\"U8\",\"shape\":[0,1,1,1],\"data_offsets\":[0,0]}}")
        };
        let empty: String = (0..count).map(empty).collect();
        let parse = |data_len: u64| {
            let header = format!(
                "{{\"z\":{{\"dtype\":\"U8\",\"shape\":[{data_len}],\"data_offsets\":[0,{data_len}]}}{empty}}}"
            );
            let (result, peak) = measured(|| reader::parse(header.as_bytes(), data_len, Path::new(PATH)));
            (result.err().map(|error| error.to_string()), header.len() as u64, peak)
        };
        let data_len = shortest(|data_len| parse(data_len).0);
        let (_, header, peak) = parse(data_len);
        assert_tight(header + peak, 8 + header + data_len);
    }
}

#[test]
fn gguf_files_take_no_more_than_they_are_long() {
    let infos = |count: u32| {
        (0..count)
            .fold(Writer::new(), |writer, number| writer.tensor(&number.to_string(), &[256, 1, 1, 0], 16, 0))
    };
    let keys =
        (0..6_000_u32).fold(Writer::new(), |writer, number| writer.entry(&number.to_string(), 0, &[1]));
    let arrays = array(0, 4000, &[1; 4000]);
    let arrays = (0..50).fold(Writer::new(), |writer, number| writer.entry(&number.to_string(), 9, &arrays));
    let invalid = [&(1_u64 << 20).to_le_bytes()[..], &vec![0xff; 1 << 20]].concat();
    let invalid = Writer::new().entry("a", 8, &invalid);
    for writer in [infos(4_000), infos(4_100), keys, arrays, invalid] {
        let read = |data_len: u64| {
            let bytes = writer.clone().info("z", &[data_len], 24, 0).bytes();
            let length = (bytes.len() as u64).next_multiple_of(32) + data_len;
            let (result, peak) = measured(|| {
                let buffered = std::io::BufReader::with_capacity(64 << 10, &bytes[..]);
                gguf::read_from(buffered, length, Path::new(PATH))
            });
            (result.err().map(|error| error.to_string()), length, peak)
        };
        let data_len = shortest(|data_len| read(data_len).0);
        let (_, length, peak) = read(data_len);
        assert_tight(peak, length);
    }
}
