//! Headers of safetensors files: names, types, shapes and bytes of tensors, never their values.
//!
//! The format is described in the README of the safetensors repository: eight bytes with the header's length, a JSON
//! object with an entry a tensor, then the tensors' bytes without a gap. Types and the check of the offsets are those
//! of the crate `safetensors`. Its own parser is not used, because it keeps a generic tree of the whole JSON text
//! (twenty times the text) before it knows what is in it.

mod walk;

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::io::Read;
use std::path::Path;

use ::safetensors::tensor::{Metadata, TensorInfo};

use super::header::{broken, memory_limit, open, quoted, unreadable};
use super::{RawTensor, json};
use crate::error::Result;
use walk::Entry;

const FORMAT: &str = "safetensors header";
/// Longest header that the crate `safetensors` reads.
const MAX_HEADER: u64 = 100_000_000;
/// Bytes in front of the header that say how long it is.
const LENGTH_BYTES: u64 = 8;
/// The header's object, a tensor's object, its shape.
const MAX_DEPTH: usize = 3;
/// Bytes that reading takes whatever the header says: mostly messages.
const ALWAYS_HELD: u64 = 8 << 10;
/// Bytes a tensor takes while the header is read, names and shapes not counted: its entry (72), the crate's table of
/// entries (48) and of names (up to 76 for each, half of the slots being free), the list of names by offset (40), and
/// the [`RawTensor`] with its type (104).
const TENSOR_BYTES: u64 = 352;

/// The tensors of one safetensors file, in the order of their bytes.
///
/// Only the header is read.
///
/// # Errors
///
/// [`Error::File`](crate::Error::File) where the file cannot be read; otherwise those of [`parse`], and
/// [`Error::BrokenHeader`](crate::Error::BrokenHeader) for a file shorter than its header.
pub fn read_header(path: &Path) -> Result<Vec<RawTensor>> {
    let (file, length) = open(path)?;
    read_from(file, length, path)
}

/// [`read_header`] for a file of `length` bytes that `reader` yields. `path` is named in errors.
///
/// # Errors
///
/// See [`read_header`].
pub fn read_from(mut reader: impl Read, length: u64, path: &Path) -> Result<Vec<RawTensor>> {
    let Some(after_length) = length.checked_sub(LENGTH_BYTES) else {
        let problem = format!(
            "the file is {length} bytes long and its header's length alone takes {LENGTH_BYTES}; download it again"
        );
        return Err(broken(path, FORMAT, problem));
    };
    let mut prefix = [0; 8];
    reader.read_exact(&mut prefix).map_err(|source| unreadable(path, source))?;
    let header_length = u64::from_le_bytes(prefix);
    let size =
        checked_header_length(prefix, after_length).map_err(|problem| broken(path, FORMAT, problem))?;
    let mut header = vec![0; size];
    reader.read_exact(&mut header).map_err(|source| unreadable(path, source))?;
    parse(&header, after_length - header_length, path)
}

/// The header's length where a file with `after_length` further bytes can hold it.
fn checked_header_length(prefix: [u8; 8], after_length: u64) -> Result<usize, String> {
    // A checkpoint cloned without Git LFS has small text files in place of tensors. They start with "version ".
    if &prefix == b"version " {
        return Err("this is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`".to_owned());
    }
    let header_length = u64::from_le_bytes(prefix);
    if header_length > after_length {
        return Err(format!(
            "its header should take {header_length} bytes, and the file has {after_length} after the header's \
             length: {} bytes are missing, or this is no safetensors file; download it again",
            header_length - after_length
        ));
    }
    let length = after_length.saturating_add(LENGTH_BYTES);
    if header_length.saturating_add(ALWAYS_HELD) > memory_limit(length) {
        return Err(format!(
            "its header takes {header_length} of its {length} bytes, which leaves nothing for tensors; download it again"
        ));
    }
    usize::try_from(header_length).ok().filter(|_| header_length <= MAX_HEADER).ok_or_else(|| {
        format!(
            "its header should take {header_length} bytes, and the format allows {MAX_HEADER}; download it again"
        )
    })
}

/// The tensors of a header that `data_len` bytes of tensors follow, in the order of their bytes. `path` is named in
/// errors.
///
/// Takes no more memory than the file is long, header included, or 1 MiB where it is shorter.
///
/// # Errors
///
/// [`Error::BrokenHeader`](crate::Error::BrokenHeader) where the header is no JSON object as the format has it,
/// names an unknown type, has two tensors of one name, offsets that overlap, leave a hole or contradict the shape,
/// tensors that end before or after the file does, or more entries than a file of this length can have.
pub fn parse(header: &[u8], data_len: u64, path: &Path) -> Result<Vec<RawTensor>> {
    tensors(header, data_len).map_err(|problem| broken(path, FORMAT, format!("{problem}; download it again")))
}

fn tensors(header: &[u8], data_len: u64) -> Result<Vec<RawTensor>, String> {
    let text = std::str::from_utf8(header)
        .map_err(|error| format!("not UTF-8 at byte {} of the header", error.valid_up_to()))?;
    let count = counted(text, data_len)?;
    let metadata =
        Metadata::new(None, entries(text, count)?).map_err(|error| match explanation(text, count) {
            Ok(Some(problem)) | Err(problem) => problem,
            Ok(None) => error.to_string(),
        })?;

    let end = metadata.data_len() as u64;
    if end > data_len {
        return Err(format!(
            "the file is truncated: its tensors take {end} bytes after the header and the file has {data_len}, \
             {} bytes are missing",
            end - data_len
        ));
    }
    if end < data_len {
        return Err(format!(
            "its tensors take {end} bytes after the header and the file has {data_len}: {} bytes follow that \
             belong to no tensor",
            data_len - end
        ));
    }

    let names = metadata.offset_keys();
    // The crate keeps the last of several tensors with one name.
    if names.len() != count {
        return Err(explanation(text, count)?.unwrap_or_default());
    }
    let mut tensors = Vec::with_capacity(count);
    for name in names {
        if let Some(info) = metadata.info(&name) {
            tensors.push(raw(name, info));
        }
    }
    Ok(tensors)
}

/// How many tensors the header has, once it is sure that they fit the memory.
fn counted(text: &str, data_len: u64) -> Result<usize, String> {
    let scan = json::scan(text.as_bytes(), MAX_DEPTH)?;
    let header_length = text.len() as u64;
    let limit = memory_limit(LENGTH_BYTES.saturating_add(header_length).saturating_add(data_len));
    let mut needed = header_length.saturating_add(ALWAYS_HELD).saturating_add(scan.copies());
    let mut count = 0_usize;
    let within = |needed: u64, count: usize| {
        if needed <= limit {
            return Ok(());
        }
        Err(format!(
            "reading its first {count} tensors would take {needed} bytes of memory, more than the whole file \
             ({limit}): no real header describes so little"
        ))
    };
    within(needed, count)?;
    walk::walk(text, |entry| {
        let strings = 2 * entry.name.len() as u64;
        let shapes = 16 * entry.shape().len() as u64;
        needed = needed.saturating_add(TENSOR_BYTES + strings + shapes);
        count += 1;
        within(needed, count)
    })?;
    Ok(count)
}

/// The header's tensors, by offset.
fn entries(text: &str, count: usize) -> Result<Vec<(String, TensorInfo)>, String> {
    let mut entries = Vec::with_capacity(count);
    walk::walk(text, |entry| {
        entries.push((entry.name.to_owned(), info(&entry)?));
        Ok(())
    })?;
    // Unstable, because a stable sort takes memory of its own. An empty tensor comes before its neighbour.
    entries.sort_unstable_by(|(left_name, left), (right_name, right)| {
        (left.data_offsets, left_name).cmp(&(right.data_offsets, right_name))
    });
    Ok(entries)
}

/// The crate's form of an entry.
fn info(entry: &Entry<'_>) -> Result<TensorInfo, String> {
    let size = |value: u64| {
        usize::try_from(value).map_err(|_| {
            format!("tensor {}: {value} is more than this machine can address", quoted(entry.name))
        })
    };
    let mut shape = Vec::with_capacity(entry.shape().len());
    for &dimension in entry.shape() {
        shape.push(size(dimension)?);
    }
    Ok(TensorInfo {
        dtype: entry.dtype,
        shape,
        data_offsets: (size(entry.offsets.0)?, size(entry.offsets.1)?),
    })
}

fn raw(name: String, info: &TensorInfo) -> RawTensor {
    let (start, end) = info.data_offsets;
    RawTensor {
        name,
        dtype: info.dtype.to_string(),
        shape: info.shape.iter().map(|&dimension| dimension as u64).collect(),
        bytes: end.saturating_sub(start) as u64,
        block: elements_of_whole_bytes(info.dtype.bitsize() as u64),
    }
}

/// The fewest elements of `bits` bits that fill whole bytes: 1 for plain types, 2 for 4 bits, 4 for 6.
fn elements_of_whole_bytes(bits: u64) -> u64 {
    match bits % 8 {
        0 => 1,
        4 => 2,
        2 | 6 => 4,
        _ => 8,
    }
}

/// Why the crate refuses the header, with the values that its errors leave out.
fn explanation(text: &str, count: usize) -> Result<Option<String>, String> {
    let entries = entries(text, count)?;
    let mut names = HashSet::with_capacity(count);
    if let Some((name, _)) = entries.iter().find(|(name, _)| !names.insert(name)) {
        return Ok(Some(format!("two tensors have the name {}", quoted(name))));
    }
    let mut expected = 0;
    let mut previous = "the header";
    for (name, info) in &entries {
        let (start, end) = info.data_offsets;
        let tensor = || {
            format!("tensor {} ({}, shape {:?}, bytes {start}..{end})", quoted(name), info.dtype, info.shape)
        };
        if end < start {
            return Ok(Some(format!("{}: it ends before it starts", tensor())));
        }
        if start < expected {
            let shared = expected - start;
            return Ok(Some(format!("{}: overlaps {} by {shared} bytes", tensor(), quoted(previous))));
        }
        if start > expected {
            let hole = start - expected;
            return Ok(Some(format!("{}: a hole of {hole} bytes before it, from byte {expected}", tensor())));
        }
        let bits = info
            .shape
            .iter()
            .try_fold(1_usize, |elements, &dimension| elements.checked_mul(dimension))
            .and_then(|elements| elements.checked_mul(info.dtype.bitsize()));
        match bits {
            None => return Ok(Some(format!("{}: a shape of this size overflows", tensor()))),
            Some(bits) if bits % 8 != 0 => {
                return Ok(Some(format!("{}: {bits} bits are no whole number of bytes", tensor())));
            }
            Some(bits) if bits / 8 != end - start => {
                let found = end - start;
                return Ok(Some(format!(
                    "{}: its shape takes {} bytes and its offsets hold {found}",
                    tensor(),
                    bits / 8
                )));
            }
            Some(_) => {}
        }
        expected = end;
        previous = name;
    }
    Ok(None)
}
