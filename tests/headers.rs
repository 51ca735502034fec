//! Readers of headers on files that are broken at random: no panic, no more memory than the file is long, and either
//! a result that the file bears out or an error that names the file.

// Helpers of tests are tests, but clippy.toml's exceptions do not reach them.
#![allow(clippy::panic, clippy::unwrap_used)]

#[path = "common/memory.rs"]
mod memory;
#[path = "../src/model/gguf/tests/writer.rs"]
#[allow(dead_code)]
mod writer;

use std::path::Path;

use memory::measured;
use proptest::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use tp_rs::model::{RawTensor, checkpoint, gguf, index, safetensors as reader};
use writer::{Writer, array, text};

const PATH: &str = "folder/the file";
const FLOOR: u64 = 1 << 20;

fn read_safetensors(bytes: &[u8]) -> tp_rs::Result<Vec<RawTensor>> {
    let length = bytes.len() as u64;
    let (result, peak) = measured(|| reader::read_from(bytes, length, Path::new(PATH)));
    assert!(peak <= length.max(FLOOR), "{peak} bytes for a file of {length}");
    result
}

fn read_gguf(bytes: &[u8]) -> tp_rs::Result<gguf::GgufFile> {
    let length = bytes.len() as u64;
    let (result, peak) = measured(|| {
        let buffered = std::io::BufReader::with_capacity(64 << 10, bytes);
        gguf::read_from(buffered, length, Path::new(PATH))
    });
    assert!(peak <= length.max(FLOOR), "{peak} bytes for a file of {length}");
    result
}

fn assert_names_the_file<T>(result: &tp_rs::Result<T>) {
    if let Err(error) = result {
        let text = error.to_string();
        assert!(text.starts_with(PATH), "{text}");
        assert!(text.len() < 4096, "{} bytes of message", text.len());
    }
}

/// The reader and the crate `safetensors` must agree, but for what is refused on purpose.
fn check_safetensors(bytes: &[u8]) {
    let result = read_safetensors(bytes);
    assert_names_the_file(&result);
    let reference = SafeTensors::deserialize(bytes);
    match (&result, &reference) {
        (Ok(tensors), Ok(reference)) => {
            assert_eq!(tensors.len(), reference.len());
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let total: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
            assert_eq!(8 + header + total, bytes.len() as u64);
            for tensor in tensors {
                let view = reference.tensor(&tensor.name).unwrap();
                assert_eq!(tensor.bytes, view.data().len() as u64);
                assert_eq!(tensor.shape, view.shape().iter().map(|&size| size as u64).collect::<Vec<_>>());
            }
        }
        (Ok(_), Err(error)) => panic!("read what the crate refuses: {error}"),
        (Err(error), Ok(_)) => {
            let text = error.to_string();
            let on_purpose = [
                "two tensors",
                "leaves nothing for tensors",
                "deeper than",
                "more than 8",
                "bytes of memory",
                "characters",
                "two fields",
                "two entries",
            ];
            assert!(
                on_purpose.iter().any(|part| text.contains(part)),
                "refused what the crate reads: {text}"
            );
        }
        (Err(_), Err(_)) => {}
    }
}

fn check_gguf(bytes: &[u8]) {
    let result = read_gguf(bytes);
    assert_names_the_file(&result);
    if let Ok(file) = result {
        let total: u64 =
            file.tensors.iter().map(|tensor| tensor.bytes.next_multiple_of(file.alignment)).sum();
        assert!(total < bytes.len() as u64 + file.alignment);
        for tensor in &file.tensors {
            let elements: u64 = tensor.shape.iter().product();
            assert_eq!(elements % tensor.block, 0);
            assert!(tensor.bytes <= elements * 8);
        }
    }
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![
        Dtype::BF16,
        Dtype::F32,
        Dtype::I64,
        Dtype::U8,
        Dtype::F8_E4M3,
        Dtype::F4,
        Dtype::BOOL,
    ])
}

/// A file as the crate `safetensors` writes it.
fn safetensors_file() -> impl Strategy<Value = Vec<u8>> {
    let tensor = ("[a-z.\"\\\\é]{0,12}", dtype(), prop::collection::vec(0..5_usize, 0..4));
    prop::collection::btree_map("[a-z.\"\\\\é]{1,12}", tensor, 0..8).prop_map(|tensors| {
        let tensors: Vec<_> = tensors
            .into_iter()
            .map(|(name, (_, dtype, mut shape))| {
                if dtype == Dtype::F4 {
                    shape.push(2);
                }
                let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
                (name, dtype, shape, vec![1; bytes])
            })
            .collect();
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        serialize(views, None).unwrap()
    })
}

fn gguf_file() -> impl Strategy<Value = Vec<u8>> {
    let names = prop::collection::btree_set("[a-z.]{1,12}", 0..8);
    (names, prop::collection::vec("[a-z.]{0,9}", 0..5), any::<u64>()).prop_map(|(names, words, mut draw)| {
        let mut next = |limit: u64| {
            draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (draw >> 33) % limit
        };
        let tokens: Vec<u8> = words.iter().flat_map(|word| text(word)).collect();
        let mut writer = Writer::new()
            .string("general.architecture", "llama")
            .u32("llama.block_count", 2)
            .u32("general.alignment", 32)
            .entry("tokenizer.ggml.tokens", 9, &array(8, words.len() as u64, &tokens))
            .entry("llama.attention.head_count", 9, &array(4, 2, &[9, 0, 0, 0, 3, 0, 0, 0]))
            .entry("nested", 9, &array(9, 1, &array(0, 3, &[1, 2, 3])));
        for name in &names {
            let (id, block, bytes) =
                [(0, 1, 4), (1, 1, 2), (2, 32, 18), (14, 256, 210)][usize::try_from(next(4)).unwrap()];
            let (row, rows) = (block * (1 + next(3)), next(4));
            let bytes = usize::try_from(row / block * bytes * rows).unwrap();
            writer = writer.tensor(name, &[row, rows], id, bytes);
        }
        writer.bytes()
    })
}

fn index_file() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::btree_map("[a-z.\\\\]{1,12}", "[a-z/]{1,4}\\.safetensors", 1..20).prop_map(
        |weight_map| {
            serde_json::json!({"metadata": {"total_size": 5}, "weight_map": weight_map})
                .to_string()
                .into_bytes()
        },
    )
}

/// What goes wrong with a file.
#[derive(Debug, Clone)]
enum Damage {
    Byte(prop::sample::Index, u8),
    Word(prop::sample::Index, u64),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Double(prop::sample::Index, prop::sample::Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let index = any::<prop::sample::Index>;
    let word = prop_oneof![any::<u64>(), 0..64_u64, Just(u64::MAX), Just(1 << 63), Just(1 << 32)];
    // Characters that mean something in JSON are likelier than chance would have them.
    let byte = prop_oneof![any::<u8>(), prop::sample::select(b"\"\\{}[],:0129-.eE".to_vec())];
    let inserted = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..20),
        prop::sample::select(vec![
            b"[[[[[[".to_vec(),
            b"\"x\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},".to_vec(),
            b"\\u00e9".to_vec(),
            b"99999999999999999999".to_vec(),
        ]),
    ];
    prop_oneof![
        4 => (index(), byte).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        2 => (index(), word).prop_map(|(at, word)| Damage::Word(at, word)),
        1 => index().prop_map(Damage::Cut),
        2 => (index(), inserted).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        1 => (index(), index()).prop_map(|(from, to)| Damage::Double(from, to)),
    ]
}

fn damaged(mut bytes: Vec<u8>, damages: &[Damage]) -> Vec<u8> {
    for damage in damages {
        if bytes.is_empty() {
            break;
        }
        match damage {
            Damage::Byte(at, byte) => *at.get_mut(&mut bytes) = *byte,
            Damage::Word(at, word) => {
                let start = at.index(bytes.len());
                bytes[start..].iter_mut().zip(word.to_le_bytes()).for_each(|(slot, byte)| *slot = byte);
            }
            Damage::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Damage::Insert(at, inserted) => {
                let start = at.index(bytes.len());
                bytes.splice(start..start, inserted.iter().copied());
            }
            Damage::Double(from, to) => {
                let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
                let (from, to) = (from.min(to), from.max(to));
                let copy = bytes[from..to].to_vec();
                bytes.splice(from..from, copy);
            }
        }
    }
    bytes
}

fn damages() -> impl Strategy<Value = Vec<Damage>> {
    prop::collection::vec(damage(), 0..4)
}

/// Makes the length in front of a header right again, so that what is behind it is reached.
fn with_header_length(mut bytes: Vec<u8>, original: &[u8]) -> Vec<u8> {
    let header = u64::from_le_bytes(original[..8].try_into().unwrap());
    let grown = (bytes.len() as u64 + header).saturating_sub(original.len() as u64);
    if let Some(slot) = bytes.get_mut(..8) {
        slot.copy_from_slice(&grown.to_le_bytes());
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn safetensors_files_that_are_broken(file in safetensors_file(), damages in damages(), mend in any::<bool>()) {
        let broken = damaged(file.clone(), &damages);
        check_safetensors(&if mend { with_header_length(broken, &file) } else { broken });
    }

    #[test]
    fn gguf_files_that_are_broken(file in gguf_file(), damages in damages()) {
        check_gguf(&damaged(file, &damages));
    }

    #[test]
    fn whole_files_are_read(safetensors in safetensors_file(), gguf in gguf_file()) {
        read_safetensors(&safetensors).unwrap();
        read_gguf(&gguf).unwrap();
    }

    #[test]
    fn indexes_and_configurations_that_are_broken(file in index_file(), damages in damages()) {
        let bytes = damaged(file, &damages);
        let mut shards = Vec::new();
        let (result, peak) = measured(|| {
            index::parse(&bytes, Path::new(PATH), |_, shard| {
                shards.push(shard.contains(['/', '\\']) || shard.starts_with("..safe"));
                Ok(())
            })
        });
        assert_names_the_file(&result);
        prop_assert!(peak <= FLOOR && !shards.contains(&true));
        let (result, peak) = measured(|| checkpoint::parse_config(&bytes, Path::new(PATH)));
        assert_names_the_file(&result);
        prop_assert!(peak <= FLOOR);
    }

    #[test]
    fn bytes_that_are_no_file(bytes in prop::collection::vec(any::<u8>(), 0..200), magic in any::<bool>()) {
        check_safetensors(&bytes);
        check_gguf(&if magic { [b"GGUF\x03\0\0\0", &bytes[..]].concat() } else { bytes });
    }
}

/// Strings, numbers and brackets that a parser would copy, in files that are all header and in longer ones.
#[test]
fn what_a_parser_copies_takes_no_more_than_the_file() {
    let long = 1_200_000;
    for header in [
        format!("{{\"__metadata__\":{{\"a\":\"\\n{}\"}}}}", "x".repeat(long)),
        format!("{{\"\\n{}\":1}}", "\u{7f}".repeat(long)),
        format!("{{\"{}\":1}}", "\u{7f}".repeat(long)),
        format!("{{\"a\":{{\"dtype\":\"{}\"}}}}", "\u{7f}".repeat(long)),
        format!("{{\"a\":{{\"shape\":[{}]}}}}", "7".repeat(long)),
        format!("{{\"a\":{}", "[".repeat(long)),
    ] {
        for factor in [0, 1, 4] {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.resize(bytes.len() + factor * header.len(), 0);
            check_safetensors(&bytes);
        }
    }
}
