//! A GGUF file as a stream of numbers and strings, none of which may reach beyond its end.

use std::fmt::Arguments;
use std::io::{BufRead, ErrorKind};
use std::path::Path;

use super::FORMAT;
use super::value::{GgufType, GgufValue};
use crate::error::{Error, Result};
use crate::model::header::{broken, memory_limit, unreadable};

/// Bytes that reading takes whatever is read: the buffer, a message.
const ALWAYS_HELD: u64 = super::BUFFER_BYTES as u64 + 4096;

/// The stream. `what` in its methods names, for errors, what is being read.
pub(super) struct Input<'a, R> {
    reader: R,
    path: &'a Path,
    length: u64,
    position: u64,
    held: u64,
}

impl<'a, R: BufRead> Input<'a, R> {
    pub(super) fn new(reader: R, length: u64, path: &'a Path) -> Self {
        Self { reader, path, length, position: 0, held: ALWAYS_HELD }
    }

    /// Bytes of the file.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Bytes left.
    pub(super) fn left(&self) -> u64 {
        self.length.saturating_sub(self.position)
    }

    /// [`Error::BrokenHeader`] for this file.
    pub(super) fn fail(&self, problem: impl Into<String>) -> Error {
        broken(self.path, FORMAT, problem)
    }

    /// Notes that `bytes` more are held, before they are allocated.
    pub(super) fn hold(&mut self, bytes: u64, what: Arguments<'_>) -> Result<()> {
        self.held = self.held.saturating_add(bytes);
        let limit = memory_limit(self.length);
        if self.held > limit {
            return Err(self.fail(format!(
                "reading up to {what} would take {} bytes of memory, more than the whole file ({limit}): no real \
                 header describes so little; download it again",
                self.held
            )));
        }
        Ok(())
    }

    /// Fails where the file ends before `bytes` more.
    pub(super) fn require(&self, bytes: u64, what: Arguments<'_>) -> Result<()> {
        let left = self.left();
        if bytes <= left {
            return Ok(());
        }
        Err(self.fail(format!(
            "{what} at byte {} takes {bytes} bytes and the file ends at byte {}: {} bytes are missing; download it \
             again",
            self.position,
            self.length,
            bytes - left
        )))
    }

    pub(super) fn array<const N: usize>(&mut self, what: Arguments<'_>) -> Result<[u8; N]> {
        self.require(N as u64, what)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(|source| unreadable(self.path, source))?;
        self.position += N as u64;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, what: Arguments<'_>) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: Arguments<'_>) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// The bytes of a string of at most `limit`.
    pub(super) fn bytes(&mut self, limit: u64, what: Arguments<'_>) -> Result<Vec<u8>> {
        let length = self.u64(what)?;
        self.require(length, what)?;
        if length > limit {
            return Err(self.fail(format!(
                "{what} before byte {} is {length} bytes long, and {limit} is the limit; download it again",
                self.position
            )));
        }
        self.hold(length, what)?;
        let size = usize::try_from(length).map_err(|_| self.fail(format!("{what} has {length} bytes")))?;
        let mut bytes = vec![0; size];
        self.reader.read_exact(&mut bytes).map_err(|source| unreadable(self.path, source))?;
        self.position += length;
        Ok(bytes)
    }

    /// A name: UTF-8, at most `limit` bytes.
    pub(super) fn name(&mut self, limit: u64, what: Arguments<'_>) -> Result<String> {
        let start = self.position;
        String::from_utf8(self.bytes(limit, what)?)
            .map_err(|_| self.fail(format!("{what} at byte {start} is not UTF-8; download it again")))
    }

    /// A string value: any bytes.
    pub(super) fn text(&mut self, what: Arguments<'_>) -> Result<String> {
        match String::from_utf8(self.bytes(u64::MAX, what)?) {
            Ok(text) => Ok(text),
            Err(error) => {
                // Each byte can become a replacement character of three, in a vector that doubles.
                self.hold(6 * error.as_bytes().len() as u64, what)?;
                Ok(String::from_utf8_lossy(error.as_bytes()).into_owned())
            }
        }
    }

    /// A value of a type with a fixed size.
    pub(super) fn scalar(&mut self, element: GgufType, what: Arguments<'_>) -> Result<GgufValue> {
        Ok(match element {
            GgufType::U8 => GgufValue::Unsigned(u8::from_le_bytes(self.array(what)?).into()),
            GgufType::U16 => GgufValue::Unsigned(u16::from_le_bytes(self.array(what)?).into()),
            GgufType::U32 => GgufValue::Unsigned(self.u32(what)?.into()),
            GgufType::U64 => GgufValue::Unsigned(self.u64(what)?),
            GgufType::I8 => GgufValue::Signed(i8::from_le_bytes(self.array(what)?).into()),
            GgufType::I16 => GgufValue::Signed(i16::from_le_bytes(self.array(what)?).into()),
            GgufType::I32 => GgufValue::Signed(i32::from_le_bytes(self.array(what)?).into()),
            GgufType::I64 => GgufValue::Signed(i64::from_le_bytes(self.array(what)?)),
            GgufType::F32 => GgufValue::Float(f32::from_le_bytes(self.array(what)?).into()),
            GgufType::F64 => GgufValue::Float(f64::from_le_bytes(self.array(what)?)),
            GgufType::Bool => GgufValue::Bool(self.array::<1>(what)? != [0]),
            GgufType::String => GgufValue::String(self.text(what)?),
            GgufType::Array => return Err(self.fail(format!("{what} is an array"))),
        })
    }

    /// Passes over `bytes`.
    pub(super) fn skip(&mut self, bytes: u64, what: Arguments<'_>) -> Result<()> {
        self.require(bytes, what)?;
        let mut left = bytes;
        while left > 0 {
            let ready = match self.reader.fill_buf() {
                Ok(buffer) => buffer.len(),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(source) => return Err(unreadable(self.path, source)),
            };
            if ready == 0 {
                // The file has become shorter since its length was asked.
                return Err(unreadable(self.path, ErrorKind::UnexpectedEof.into()));
            }
            let now = ready.min(usize::try_from(left).unwrap_or(usize::MAX));
            self.reader.consume(now);
            left -= now as u64;
        }
        self.position += bytes;
        Ok(())
    }
}
