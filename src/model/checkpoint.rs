//! Finds what a path holds of a model: configurations, and headers of safetensors or GGUF files.

mod folder;

#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::gguf::{self, GgufFile};
use super::header::{broken, open, read_whole, unreadable};
use super::{RawTensor, index, json};
use crate::error::{Error, Result};
use folder::Weights;

const FORMAT: &str = "config";
/// Longest configuration that is read. Those that list every tensor of a quantised model have a few megabytes.
const MAX_CONFIG: u64 = 16 << 20;
/// Bytes that a configuration may take once it is parsed.
const MAX_PARSED: u64 = 128 << 20;
/// Levels of a configuration. The parser stops at 128.
const MAX_DEPTH: usize = 100;
/// What is read of a file whose name does not say what it is.
const MAGIC_BYTES: usize = 4;
const WANTED: &str = "a folder with config.json and *.safetensors or one *.gguf, or one such file; convert other \
                      formats to safetensors or GGUF, or name the right path";

/// What a path holds of a model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Checkpoint {
    /// The path as it was given.
    pub name: String,
    /// `config.json`, an object.
    pub config: Option<Value>,
    /// `quantize_config.json` (where GPTQ wrote its settings before `config.json` had them), an object.
    pub quantize_config: Option<Value>,
    /// The tensors of all safetensors files; `None` where there is only a configuration, or a GGUF file.
    pub tensors: Option<Vec<RawTensor>>,
    /// The GGUF file, its tensors included.
    pub gguf: Option<GgufFile>,
}

impl Checkpoint {
    /// How the weights are quantised: `quantization_config` of the configuration, else `quantize_config.json`.
    #[must_use]
    pub fn quantization(&self) -> Option<&Value> {
        let own = self.config.as_ref().and_then(|config| config.get("quantization_config"));
        own.filter(|value| !value.is_null()).or(self.quantize_config.as_ref())
    }
}

/// Reads what is at `path`: a folder, a `.safetensors` or `.gguf` file (all its parts, if it is one of several), an
/// index (`.index.json`), or a `config.json`.
///
/// In a folder the first of these counts: the index, `model.safetensors`, the parts of `model-*-of-*.safetensors`, the
/// only other safetensors file or set of parts, the only GGUF file or set of parts. Adapters, optimizer states and
/// the originals that some vendors add (`consolidated.*`) are passed over. A configuration alone is enough.
///
/// # Errors
///
/// [`Error::File`] where something cannot be read; it keeps the system's "not found". [`Error::NoModel`] where there
/// is no model, or more than one. [`Error::BrokenHeader`] and [`Error::MissingShard`] as the readers of the formats
/// give them.
pub fn find(path: &Path) -> Result<Checkpoint> {
    let kind = std::fs::metadata(path).map_err(|source| unreadable(path, source))?;
    let mut checkpoint = if kind.is_dir() { find_in_folder(path)? } else { find_file(path)? };
    checkpoint.name = path.display().to_string();
    Ok(checkpoint)
}

/// The safetensors files that [`find`] reads at `path`; none where there is only a GGUF file or a configuration.
///
/// # Errors
///
/// As for [`find`], but no file of tensors is opened.
pub fn safetensors_files(path: &Path) -> Result<Vec<PathBuf>> {
    let kind = std::fs::metadata(path).map_err(|source| unreadable(path, source))?;
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    if !kind.is_dir() {
        return match name {
            _ if name.ends_with(".index.json") => index::files(path),
            _ if has_extension(path, "safetensors") => folder::parts(path),
            _ => Ok(Vec::new()),
        };
    }
    match folder::choose(path, &folder::names(path)?)? {
        Some(Weights::Index(path)) => index::files(&path),
        Some(Weights::Safetensors(paths)) => Ok(paths),
        Some(Weights::Gguf(_)) | None => Ok(Vec::new()),
    }
}

fn find_in_folder(folder: &Path) -> Result<Checkpoint> {
    let names = folder::names(folder)?;
    let mut checkpoint = configs(folder)?;
    match folder::choose(folder, &names)? {
        Some(Weights::Index(path)) => checkpoint.tensors = Some(index::read(&path)?),
        Some(Weights::Safetensors(paths)) => checkpoint.tensors = Some(read_set(&paths)?),
        Some(Weights::Gguf(path)) => checkpoint.gguf = Some(gguf::read(&path)?),
        None if checkpoint.config.is_some() => {}
        None => {
            return Err(Error::NoModel {
                path: folder.to_owned(),
                found: folder::listing(&names),
                wanted: WANTED.to_owned(),
            });
        }
    }
    Ok(checkpoint)
}

fn find_file(path: &Path) -> Result<Checkpoint> {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let folder = path.parent().unwrap_or(Path::new(""));
    if name.ends_with(".index.json") {
        return Ok(Checkpoint { tensors: Some(index::read(path)?), ..configs(folder)? });
    }
    if has_extension(path, "json") {
        return Ok(Checkpoint { config: Some(read_object(path)?), ..Checkpoint::default() });
    }
    if has_extension(path, "safetensors") {
        let tensors = read_set(&folder::parts(path)?)?;
        return Ok(Checkpoint { tensors: Some(tensors), ..configs(folder)? });
    }
    // Caches name files by their hash.
    if has_extension(path, "gguf") || starts_with_gguf(path)? {
        return Ok(Checkpoint { gguf: Some(gguf::read(path)?), ..Checkpoint::default() });
    }
    Err(Error::NoModel {
        path: path.to_owned(),
        found: format!("a file named {name:?}"),
        wanted: WANTED.to_owned(),
    })
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

fn starts_with_gguf(path: &Path) -> Result<bool> {
    let (file, _) = open(path)?;
    let mut magic = Vec::with_capacity(MAGIC_BYTES);
    file.take(MAGIC_BYTES as u64).read_to_end(&mut magic).map_err(|source| unreadable(path, source))?;
    Ok(magic == b"GGUF")
}

/// The tensors of files that belong together.
fn read_set(paths: &[PathBuf]) -> Result<Vec<RawTensor>> {
    let files: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let tensors = index::read_shards(files.iter().copied())?;
    index::holders(&files, &tensors)?;
    Ok(tensors.into_iter().flatten().collect())
}

/// The configurations of a folder, as far as it has them.
fn configs(folder: &Path) -> Result<Checkpoint> {
    let read = |name: &str| {
        let path = folder.join(name);
        match read_object(&path) {
            Err(error) if error.kind() == crate::Kind::MissingFile => Ok(None),
            other => other.map(Some),
        }
    };
    Ok(Checkpoint {
        config: read("config.json")?,
        quantize_config: read("quantize_config.json")?,
        ..Checkpoint::default()
    })
}

/// A JSON file that holds an object.
///
/// # Errors
///
/// [`Error::File`] where it cannot be read, [`Error::BrokenHeader`] where it is too long or no JSON object.
fn read_object(path: &Path) -> Result<Value> {
    parse_config(&read_whole(path, FORMAT, MAX_CONFIG)?, path)
}

/// Parses the text of a `config.json`. `path` is named in errors.
///
/// `NaN` and `Infinity`, which Python writes, become `null`.
///
/// # Errors
///
/// [`Error::BrokenHeader`] where the text is no JSON object, or would take more than 128 MiB once parsed.
pub fn parse_config(text: &[u8], path: &Path) -> Result<Value> {
    let invalid = |problem: String| broken(path, FORMAT, format!("{problem}; download it again"));
    let parsed = json::scan(text, MAX_DEPTH).map_err(invalid)?.tree();
    if parsed > MAX_PARSED {
        return Err(invalid(format!(
            "its {} bytes would take {parsed} bytes of memory, and {MAX_PARSED} is the limit",
            text.len()
        )));
    }
    let value: Value = serde_json::from_slice(&json::without_python_constants(text))
        .map_err(|error| invalid(format!("no JSON: {error}")))?;
    let found = match &value {
        Value::Object(_) => return Ok(value),
        Value::Array(_) => "a list",
        Value::String(_) => "a string",
        Value::Number(_) => "a number",
        Value::Bool(_) => "a truth value",
        Value::Null => "null",
    };
    Err(invalid(format!("it holds {found}, wanted an object")))
}
