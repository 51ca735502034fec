//! The index of a checkpoint in several safetensors files (`model.safetensors.index.json`): which file holds which
//! tensor.

mod walk;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use super::header::{broken, memory_limit, quoted, read_whole};
use super::{RawTensor, json, safetensors};
use crate::error::{Error, Result};

const FORMAT: &str = "index";
/// Longest index that is read. The largest known ones (90,000 tensors) are 9 MB.
pub(super) const MAX_INDEX: u64 = 256 << 20;
/// The index, its `weight_map`, and what else writers put beside them.
const MAX_DEPTH: usize = 8;

/// The tensors of every shard that an index names, shard by shard.
///
/// # Errors
///
/// [`Error::MissingShard`] for a shard that is not there; [`Error::BrokenHeader`] where the index is no such index,
/// names a shard outside of its folder, or where a tensor is in another shard than it says, in none or in two; and
/// those of [`safetensors::read_header`].
pub fn read(path: &Path) -> Result<Vec<RawTensor>> {
    let text = read_whole(path, FORMAT, MAX_INDEX)?;
    let shards = shards(&text, path)?;
    let tensors = read_shards(shards.keys().map(PathBuf::as_path))?;
    check(&text, path, &shards, &tensors)?;
    Ok(tensors.into_iter().flatten().collect())
}

/// The shards that an index names, sorted, each of which is there.
///
/// # Errors
///
/// Those of [`read`] that need no shard to be opened.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let text = read_whole(path, FORMAT, MAX_INDEX)?;
    Ok(shards(&text, path)?.into_keys().collect())
}

/// Calls `visit` with every tensor of an index and the name of its shard, in the order of the text.
///
/// Takes no memory beside the text but for strings that have escapes in them. `path` is named in errors.
///
/// # Errors
///
/// [`Error::BrokenHeader`] where the text is no index, or names a shard that is no plain file name ending in
/// `.safetensors`; and what `visit` returned.
pub fn parse(text: &[u8], path: &Path, mut visit: impl FnMut(&str, &str) -> Result<()>) -> Result<()> {
    let invalid = |problem: String| broken(path, FORMAT, format!("{problem}; download it again"));
    let length = text.len() as u64;
    let needed = length.saturating_add(json::scan(text, MAX_DEPTH).map_err(invalid)?.copies());
    if needed > memory_limit(length) {
        return Err(invalid("its strings are longer than names are".to_owned()));
    }
    // An error of the caller's own cannot pass through the JSON parser as it is.
    let mut stopped = None;
    let read = walk::walk(text, |tensor, shard| {
        let Err(error) = visit(tensor, shard) else { return Ok(()) };
        stopped = Some(error);
        Err("stopped".to_owned())
    });
    match (stopped, read) {
        (Some(error), _) => Err(error),
        (None, Err(problem)) => Err(invalid(problem)),
        (None, Ok(0)) => Err(invalid("its weight_map names no tensor".to_owned())),
        (None, Ok(_)) => Ok(()),
    }
}

/// The shards that an index names, each of which is there, with a number.
fn shards(text: &[u8], path: &Path) -> Result<BTreeMap<PathBuf, usize>> {
    let mut shards = BTreeMap::new();
    let mut last = String::new();
    parse(text, path, |tensor, shard| {
        // Tensors of one shard mostly stand together.
        if shard == last {
            return Ok(());
        }
        shard.clone_into(&mut last);
        let file = path.with_file_name(shard);
        if shards.contains_key(&file) {
            return Ok(());
        }
        // Looked for at once: an index can name many more files than there are.
        if !file.try_exists().map_err(|source| Error::File { path: file.clone(), source })? {
            return Err(Error::MissingShard {
                index: path.to_owned(),
                shard: shard.to_owned(),
                tensor: tensor.to_owned(),
            });
        }
        shards.insert(file, 0);
        Ok(())
    })?;
    for (number, slot) in shards.values_mut().enumerate() {
        *slot = number;
    }
    Ok(shards)
}

/// The headers of several files.
pub(super) fn read_shards<'a>(files: impl Iterator<Item = &'a Path>) -> Result<Vec<Vec<RawTensor>>> {
    files.map(safetensors::read_header).collect()
}

/// Whether the index and the shards say the same.
fn check(
    text: &[u8],
    path: &Path,
    shards: &BTreeMap<PathBuf, usize>,
    tensors: &[Vec<RawTensor>],
) -> Result<()> {
    let files: Vec<&Path> = shards.keys().map(PathBuf::as_path).collect();
    let found = holders(&files, tensors)?;
    let mut named = 0_usize;
    let mut last = (String::new(), None);
    parse(text, path, |tensor, shard| {
        if shard != last.0 {
            last = (shard.to_owned(), shards.get(&path.with_file_name(shard)).copied());
        }
        named += 1;
        let holder = found.get(tensor).copied();
        if holder.is_some() && holder == last.1 {
            return Ok(());
        }
        let place = match holder.and_then(|number| files.get(number)) {
            Some(file) => format!("the tensor is in {}", file_name(file)),
            None => "no shard has that tensor".to_owned(),
        };
        let problem = format!(
            "it names the shard {} for the tensor {}, but {place}; download the index and the shards again",
            quoted(shard),
            quoted(tensor)
        );
        Err(broken(path, FORMAT, problem))
    })?;
    if named < found.len() {
        // Loaders take every tensor that a shard has, so these count.
        tracing::warn!(index = %path.display(), named, found = found.len(), "shards hold tensors that the index does not name");
    }
    Ok(())
}

/// Which of `files` has each tensor.
///
/// # Errors
///
/// A tensor that two files have.
pub(super) fn holders<'a>(files: &[&Path], tensors: &'a [Vec<RawTensor>]) -> Result<HashMap<&'a str, usize>> {
    let mut holders = HashMap::with_capacity(tensors.iter().map(Vec::len).sum());
    for (number, (file, shard)) in files.iter().zip(tensors).enumerate() {
        for tensor in shard {
            let Some(other) = holders.insert(tensor.name.as_str(), number) else { continue };
            let other = files.get(other).map_or_else(String::new, |file| file_name(file));
            let problem = format!(
                "the tensor {} is in {other} as well; keep the files of one checkpoint only, or download them again",
                quoted(&tensor.name)
            );
            return Err(broken(file, "safetensors header", problem));
        }
    }
    Ok(holders)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
