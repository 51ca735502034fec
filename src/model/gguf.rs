//! GGUF files: metadata and tensor infos, never the tensors' values.
//!
//! Format: `docs/gguf.md` of the ggml repository, versions 2 and 3, little endian. Where that text leaves a limit
//! open, the one of ggml's own reader holds (`gguf.cpp`).

mod input;
mod layout;
mod split;
mod types;
mod value;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::{BufRead, BufReader};
use std::path::Path;

use super::RawTensor;
use super::header::{open, quoted};
use crate::error::Result;
use input::Input;
pub use types::TensorType;
pub use value::{GgufArray, GgufType, GgufValue};

const FORMAT: &str = "GGUF header";
const MAGIC: [u8; 4] = *b"GGUF";
/// What tensors are aligned to where the file does not say.
const DEFAULT_ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
/// Longest key that the format allows.
const MAX_KEY: u64 = 65_535;
/// Arrays in arrays that are followed. The format sets no limit, and no known file has any.
const MAX_DEPTH: u32 = 4;
/// Bytes that a file is read by.
const BUFFER_BYTES: usize = 64 << 10;
/// The shortest metadata entry: a key's length, a type, one byte.
const SHORTEST_ENTRY: u64 = 13;
/// Bytes of a metadata entry in memory, strings and arrays not counted: a B-tree keeps eleven entries a node, of
/// which half may be free.
const ENTRY_BYTES: u64 = 192;

/// What a GGUF file says of its model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GgufFile {
    /// Version of the format.
    pub version: u32,
    /// Metadata by key.
    pub metadata: BTreeMap<String, GgufValue>,
    /// Tensors in the order of their infos, those of all parts where the file is split.
    pub tensors: Vec<RawTensor>,
    /// Bytes that tensors are aligned to.
    pub alignment: u64,
}

/// Reads a GGUF file, and its other parts where it is one of several (`name-00001-of-00003.gguf`), whichever is
/// named.
///
/// # Errors
///
/// [`Error::File`](crate::Error::File) where the file cannot be read; otherwise those of [`read_from`], and
/// [`Error::BrokenHeader`](crate::Error::BrokenHeader) where a part is missing or belongs to another file.
pub fn read(path: &Path) -> Result<GgufFile> {
    split::read_parts(path, read_one(path)?)
}

/// One file, whatever its other parts.
fn read_one(path: &Path) -> Result<GgufFile> {
    let (file, length) = open(path)?;
    read_from(BufReader::with_capacity(BUFFER_BYTES, file), length, path)
}

/// Reads one GGUF file of `length` bytes that `reader` yields. `path` is named in errors.
///
/// Takes no more memory than the file is long, or 1 MiB where it is shorter.
///
/// # Errors
///
/// [`Error::BrokenHeader`](crate::Error::BrokenHeader) for another format, version or byte order, for a file that is
/// cut short, for keys or tensors that are there twice, unknown types, and tensors that lie elsewhere than their
/// shapes say.
pub fn read_from(reader: impl BufRead, length: u64, path: &Path) -> Result<GgufFile> {
    let mut input = Input::new(reader, length, path);
    let version = version(&mut input)?;
    let tensor_count = input.u64(format_args!("the number of tensors"))?;
    let entry_count = input.u64(format_args!("the number of metadata entries"))?;
    plausible(&input, entry_count, SHORTEST_ENTRY, "metadata entries")?;
    plausible(&input, tensor_count, layout::SHORTEST_INFO, "tensors")?;

    let mut alignment = DEFAULT_ALIGNMENT;
    let mut metadata = BTreeMap::new();
    for number in 0..entry_count {
        let key = input.name(MAX_KEY, format_args!("the key of metadata entry {number}"))?;
        input.hold(ENTRY_BYTES, format_args!("metadata entry {number}"))?;
        let value_type = value_type(&mut input, format_args!("the value of {}", quoted(&key)))?;
        let value = value(&mut input, value_type, &key)?;
        if key == ALIGNMENT_KEY {
            alignment = checked_alignment(&input, value_type, &value)?;
        }
        match metadata.entry(key) {
            Entry::Vacant(slot) => slot.insert(value),
            Entry::Occupied(slot) => {
                let problem =
                    format!("the metadata key {} is there twice; convert it again", quoted(slot.key()));
                return Err(input.fail(problem));
            }
        };
    }
    let tensors = layout::tensors(&mut input, tensor_count, alignment)?;
    Ok(GgufFile { version, metadata, tensors, alignment })
}

/// Checks what the file starts with.
fn version(input: &mut Input<'_, impl BufRead>) -> Result<u32> {
    let magic = input.array::<4>(format_args!("the word GGUF"))?;
    if magic != MAGIC {
        let found = String::from_utf8_lossy(&magic).into_owned();
        return Err(input.fail(format!(
            "it starts with {found:?} and not with \"GGUF\": another format, or a file of before 2023-08; give a \
             GGUF file, or convert it again"
        )));
    }
    let version = input.u32(format_args!("the version"))?;
    match version {
        2 | 3 => Ok(version),
        1 => Err(input.fail(
            "it is of version 1, whose counts have 32 bits; versions 2 and 3 are read: convert the model again",
        )),
        _ if version.trailing_zeros() >= 16 && version != 0 => Err(input.fail(format!(
            "it is big endian (version {} with its bytes reversed); convert the model to little endian",
            version.swap_bytes()
        ))),
        _ => Err(input.fail(format!(
            "it is of version {version}; versions 2 and 3 are read: download it again, or a newer tp_rs may know it"
        ))),
    }
}

/// Refuses counts that the rest of the file cannot hold, before anything is read by them.
fn plausible(input: &Input<'_, impl BufRead>, count: u64, shortest: u64, what: &str) -> Result<()> {
    let possible = input.left() / shortest;
    if count <= possible {
        return Ok(());
    }
    Err(input.fail(format!(
        "it should have {count} {what}, and its {} bytes hold {possible} at most; download it again",
        input.length()
    )))
}

fn value_type(input: &mut Input<'_, impl BufRead>, what: std::fmt::Arguments<'_>) -> Result<GgufType> {
    let id = input.u32(what)?;
    GgufType::of(id).ok_or_else(|| {
        input.fail(format!(
            "{what} has the type {id} before byte {}, and types end at 12; download it again",
            input.position()
        ))
    })
}

fn value(input: &mut Input<'_, impl BufRead>, value_type: GgufType, key: &str) -> Result<GgufValue> {
    if value_type != GgufType::Array {
        return input.scalar(value_type, format_args!("the value of {}", quoted(key)));
    }
    let (element, length) = array_start(input, key)?;
    let size = element.bytes().filter(|_| length <= GgufArray::MAX_KEPT);
    let Some(size) = size else {
        skip_array(input, element, length, key, MAX_DEPTH)?;
        return Ok(GgufValue::Array(GgufArray { element, length, values: None }));
    };
    let what = format!("the array {}", quoted(key));
    input.require(length.saturating_mul(size), format_args!("{what}"))?;
    input.hold(length.saturating_mul(size_of::<GgufValue>() as u64), format_args!("{what}"))?;
    // `length` is MAX_KEPT at most, and the file has that many.
    let mut values = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    for _ in 0..length {
        values.push(input.scalar(element, format_args!("{what}"))?);
    }
    Ok(GgufValue::Array(GgufArray { element, length, values: Some(values) }))
}

fn array_start(input: &mut Input<'_, impl BufRead>, key: &str) -> Result<(GgufType, u64)> {
    let element = value_type(input, format_args!("the array {}", quoted(key)))?;
    let length = input.u64(format_args!("the length of the array {}", quoted(key)))?;
    Ok((element, length))
}

/// Passes over an array's values.
fn skip_array(
    input: &mut Input<'_, impl BufRead>,
    element: GgufType,
    length: u64,
    key: &str,
    depth: u32,
) -> Result<()> {
    // The shortest string is its length, the shortest array its type and length.
    let shortest = element.bytes().unwrap_or(if element == GgufType::String { 8 } else { 12 });
    let bytes = length.saturating_mul(shortest);
    input.require(bytes, format_args!("the array {}", quoted(key)))?;
    match element {
        GgufType::String => {
            for _ in 0..length {
                let bytes = input.u64(format_args!("a string of the array {}", quoted(key)))?;
                input.skip(bytes, format_args!("a string of the array {}", quoted(key)))?;
            }
            Ok(())
        }
        GgufType::Array if depth == 0 => Err(input.fail(format!(
            "the array {} has arrays nested deeper than {MAX_DEPTH} levels; download it again",
            quoted(key)
        ))),
        GgufType::Array => {
            for _ in 0..length {
                let (element, length) = array_start(input, key)?;
                skip_array(input, element, length, key, depth - 1)?;
            }
            Ok(())
        }
        _ => input.skip(bytes, format_args!("the array {}", quoted(key))),
    }
}

fn checked_alignment(
    input: &Input<'_, impl BufRead>,
    value_type: GgufType,
    value: &GgufValue,
) -> Result<u64> {
    match value {
        GgufValue::Unsigned(alignment) if value_type == GgufType::U32 && alignment.is_power_of_two() => {
            Ok(*alignment)
        }
        _ => Err(input.fail(format!(
            "{ALIGNMENT_KEY} is {} of type {value_type:?}, wanted a power of two of type U32; convert it again",
            value.as_f64().map_or_else(|| "a value".to_owned(), |number| number.to_string())
        ))),
    }
}
