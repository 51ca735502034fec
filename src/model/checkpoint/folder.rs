//! Which files of a folder are the model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::model::header::{broken, part_name, quoted, unreadable};
use crate::model::index;

const INDEX: &str = "model.safetensors.index.json";
const SAFETENSORS: &str = ".safetensors";
const GGUF: &str = ".gguf";
/// Beginnings of files that are no model of their own: adapters, the originals beside a converted checkpoint, what
/// training leaves, and the vision part that belongs to a GGUF file.
const PASSED_OVER: [&str; 4] = ["adapter", "consolidated", "optimizer", "mmproj"];
/// Names that an error lists.
const MAX_LISTED: usize = 12;

/// The files to read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Weights {
    /// An index of safetensors files.
    Index(PathBuf),
    /// Safetensors files without an index.
    Safetensors(Vec<PathBuf>),
    /// A GGUF file, or the first of its parts.
    Gguf(PathBuf),
}

/// The names of a folder's entries, sorted. Names that are not Unicode are left out: no model has one.
pub(super) fn names(folder: &Path) -> Result<Vec<String>> {
    let unreadable = |source| unreadable(folder, source);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        names.extend(entry.map_err(unreadable)?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// `names` for an error.
pub(super) fn listing(names: &[String]) -> String {
    let text = names.iter().take(MAX_LISTED).map(|name| quoted(name)).collect::<Vec<_>>().join(", ");
    match names.len() {
        0 => "an empty folder".to_owned(),
        count if count > MAX_LISTED => format!("{text} and {} more", count - MAX_LISTED),
        _ => text,
    }
}

/// Files that belong together: the parts of a checkpoint, or one file.
type Sets<'a> = BTreeMap<(String, u64), Vec<&'a String>>;

/// The names that end in `extension`, parts of a set together.
fn sets<'a>(names: &'a [String], extension: &str) -> Sets<'a> {
    let mut sets = Sets::new();
    for name in names {
        if !name.ends_with(extension) || PASSED_OVER.iter().any(|start| name.starts_with(start)) {
            continue;
        }
        let key = match part_name(name, extension) {
            Some((stem, _, count)) => (stem, count),
            None => (name.clone(), 0),
        };
        sets.entry(key).or_default().push(name);
    }
    sets
}

/// The weights of a folder with these `names`; `None` if it has none.
pub(super) fn choose(folder: &Path, names: &[String]) -> Result<Option<Weights>> {
    let mut safetensors = sets(names, SAFETENSORS);
    if names.iter().any(|name| name == INDEX) {
        let path = folder.join(INDEX);
        if safetensors.is_empty() || !is_left_over(&path, names)? {
            return Ok(Some(Weights::Index(path)));
        }
        tracing::warn!(index = %path.display(), "none of the shards that the index names is there; other safetensors files are read");
    }
    if names.iter().any(|name| name == "model.safetensors") {
        return Ok(Some(Weights::Safetensors(vec![folder.join("model.safetensors")])));
    }
    if safetensors.keys().any(|(stem, count)| stem == "model" && *count > 0) {
        safetensors.retain(|(stem, count), _| stem == "model" && *count > 0);
    }
    if let Some(files) = only_one(folder, &safetensors, SAFETENSORS)? {
        return files
            .first()
            .map(|name| parts(&folder.join(name)))
            .transpose()
            .map(|paths| paths.map(Weights::Safetensors));
    }
    let gguf = sets(names, GGUF);
    let files = only_one(folder, &gguf, GGUF)?;
    Ok(files.and_then(|files| files.first()).map(|name| Weights::Gguf(folder.join(name))))
}

/// Whether an index is left over from another form of the model: quantised copies (ExLlamaV2's `output-*`) often keep
/// the original's index, none of whose shards is there.
fn is_left_over(index: &Path, names: &[String]) -> Result<bool> {
    let text = super::read_whole(index, "index", index::MAX_INDEX)?;
    let mut any_there = false;
    index::parse(&text, index, |_, shard| {
        any_there = any_there || names.binary_search_by(|name| name.as_str().cmp(shard)).is_ok();
        Ok(())
    })?;
    Ok(!any_there)
}

/// The files of the only set there is; `None` if there is none.
fn only_one<'a, 's>(folder: &Path, sets: &'s Sets<'a>, extension: &str) -> Result<Option<&'s [&'a String]>> {
    if sets.len() > 1 {
        let firsts: Vec<String> =
            sets.values().filter_map(|files| files.first()).map(|name| (*name).clone()).collect();
        return Err(Error::NoModel {
            path: folder.to_owned(),
            found: format!("{} models in {extension} files: {}", sets.len(), listing(&firsts)),
            wanted: "one; name the file that is meant".to_owned(),
        });
    }
    Ok(sets.values().next().map(Vec::as_slice))
}

/// The safetensors files that `path` is one of: itself, or all parts of its set, each of which is there.
pub(super) fn parts(path: &Path) -> Result<Vec<PathBuf>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Some((stem, _, count)) = part_name(&name, SAFETENSORS) else { return Ok(vec![path.to_owned()]) };
    let mut paths = Vec::new();
    for number in 1..=count {
        let part = path.with_file_name(format!("{stem}-{number:05}-of-{count:05}{SAFETENSORS}"));
        if !part.try_exists().map_err(|source| unreadable(&part, source))? {
            let missing = part.file_name().unwrap_or_default().to_string_lossy();
            let problem = format!(
                "it is one of {count} parts, and the part {missing} is not beside it; download that part"
            );
            return Err(broken(path, "safetensors header", problem));
        }
        paths.push(part);
    }
    Ok(paths)
}
