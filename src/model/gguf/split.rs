//! GGUF files in several parts, as `llama-gguf-split` writes them: `name-00001-of-00003.gguf`, with the model's
//! metadata in the first and the keys `split.count`, `split.no` and `split.tensors.count` in each.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::{FORMAT, GgufFile, GgufValue, read_one};
use crate::error::{Error, Result};
use crate::model::header::{broken, part_name, quoted};

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";

fn number(file: &GgufFile, key: &str) -> Option<u64> {
    file.metadata.get(key).and_then(GgufValue::as_u64)
}

/// `file`, read from `path`, with its other parts' tensors if it has any.
pub(super) fn read_parts(path: &Path, file: GgufFile) -> Result<GgufFile> {
    let count = match number(&file, COUNT) {
        None | Some(0 | 1) => return Ok(file),
        Some(count) => count,
    };
    let paths = part_paths(path, count)?;
    let mut own = Some(file);
    let mut whole: Option<GgufFile> = None;
    for (part_path, position) in paths.iter().zip(0_u64..) {
        let part = match own.take_if(|_| part_path == path) {
            Some(part) => part,
            None => read_one(part_path).map_err(|error| missing(error, path, count))?,
        };
        if number(&part, COUNT) != Some(count) || number(&part, NUMBER) != Some(position) {
            let shown = |key| number(&part, key).map_or_else(|| "none".to_owned(), |value| value.to_string());
            let problem = format!(
                "{COUNT} is {} and {NUMBER} is {}, wanted {count} and {position} as {} and its name say; download \
                 all parts again",
                shown(COUNT),
                shown(NUMBER),
                path.display()
            );
            return Err(broken(part_path, FORMAT, problem));
        }
        match &mut whole {
            Some(whole) => whole.tensors.extend(part.tensors),
            None => whole = Some(part),
        }
    }
    // `count` is 2 at least, so there was a first part.
    let whole = whole.unwrap_or_default();
    check(path, &whole)?;
    Ok(whole)
}

/// Where the parts of `path` are.
fn part_paths(path: &Path, count: u64) -> Result<Vec<PathBuf>> {
    let file_name = path.file_name().unwrap_or_default().to_string_lossy();
    let wanted = format!("{COUNT} says that it is one of {count} parts");
    let Some((name, _, named)) = part_name(&file_name, ".gguf") else {
        let problem = format!(
            "{wanted}, and its name does not say which; name it as it was: name-00001-of-{count:05}.gguf"
        );
        return Err(broken(path, FORMAT, problem));
    };
    if named != count {
        let problem = format!("{wanted}, and its name that there are {named}; download all parts again");
        return Err(broken(path, FORMAT, problem));
    }
    // The name has five digits, so the count is 99,999 at most.
    Ok((1..=count)
        .map(|number| path.with_file_name(format!("{name}-{number:05}-of-{count:05}.gguf")))
        .collect())
}

/// Says which part is missing and who asked for it.
fn missing(error: Error, asked: &Path, count: u64) -> Error {
    match error {
        Error::File { path, source } if source.kind() == std::io::ErrorKind::NotFound => {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let problem = format!(
                "it is one of {count} parts, and the part {name} is not beside it; download that part"
            );
            broken(asked, FORMAT, problem)
        }
        other => other,
    }
}

fn check(path: &Path, whole: &GgufFile) -> Result<()> {
    let found = whole.tensors.len() as u64;
    if let Some(wanted) = number(whole, TENSORS).filter(|&wanted| wanted != found) {
        let problem =
            format!("its parts hold {found} tensors and {TENSORS} says {wanted}; download all parts again");
        return Err(broken(path, FORMAT, problem));
    }
    let mut names = HashSet::with_capacity(whole.tensors.len());
    for tensor in &whole.tensors {
        if !names.insert(&tensor.name) {
            let problem = format!(
                "two of its parts have the tensor {}; download all parts again",
                quoted(&tensor.name)
            );
            return Err(broken(path, FORMAT, problem));
        }
    }
    Ok(())
}
