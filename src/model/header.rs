//! What the header readers share: opening files, the memory they may use, and quoting what a file says.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

/// Bytes that a reader may always allocate, however short the file is.
const ALWAYS_ALLOWED: u64 = 1 << 20;
/// Characters of a file's text that a message repeats. Names in broken files can be megabytes long.
const QUOTED_CHARACTERS: usize = 100;

/// Bytes that reading the header of a file of `length` bytes may take at once.
pub(super) fn memory_limit(length: u64) -> u64 {
    length.max(ALWAYS_ALLOWED)
}

/// `text` between quotes, cut where it is too long for a message.
pub(super) fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED_CHARACTERS) {
        Some((end, _)) => {
            format!("{:?}... ({} bytes)", text.get(..end).unwrap_or_default(), text.len())
        }
        None => format!("{text:?}"),
    }
}

/// [`Error::BrokenHeader`] for `path`.
pub(super) fn broken(path: &Path, format: &'static str, problem: impl Into<String>) -> Error {
    Error::BrokenHeader { path: path.to_owned(), format, problem: problem.into() }
}

/// [`Error::File`] for `path`.
pub(super) fn unreadable(path: &Path, source: std::io::Error) -> Error {
    Error::File { path: path.to_owned(), source }
}

/// Opens a regular file and says how long it is.
pub(super) fn open(path: &Path) -> Result<(File, u64)> {
    // Asked before opening, because opening a named pipe waits for a writer.
    let found = std::fs::metadata(path).map_err(|source| unreadable(path, source))?;
    if !found.is_file() {
        let kind = if found.is_dir() { "a folder" } else { "neither a file nor a folder" };
        return Err(Error::NoModel {
            path: path.to_owned(),
            found: kind.to_owned(),
            wanted: "a file".to_owned(),
        });
    }
    let file = File::open(path).map_err(|source| unreadable(path, source))?;
    Ok((file, found.len()))
}

/// The whole of a text file that must not be longer than `limit` bytes.
pub(super) fn read_whole(path: &Path, format: &'static str, limit: u64) -> Result<Vec<u8>> {
    let (mut file, length) = open(path)?;
    let size = usize::try_from(length).ok().filter(|_| length <= limit).ok_or_else(|| {
        broken(
            path,
            format,
            format!(
                "the file is {length} bytes long and more than {limit} is never right; download it again"
            ),
        )
    })?;
    let mut text = vec![0; size];
    file.read_exact(&mut text).map_err(|source| unreadable(path, source))?;
    Ok(text)
}

/// Of a file that is one of several (`name-00001-of-00003.gguf`): the name, the part's number from 1, and how many
/// there are.
pub(super) fn part_name(file_name: &str, extension: &str) -> Option<(String, u64, u64)> {
    let stem = file_name.strip_suffix(extension)?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    if name.is_empty() || !digits(number) || !digits(count) {
        return None;
    }
    let (number, count) = (number.parse().ok()?, count.parse().ok()?);
    (1..=count).contains(&number).then(|| (name.to_owned(), number, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_cut_between_characters() {
        assert_eq!(quoted("wq"), "\"wq\"");
        let long = "é".repeat(QUOTED_CHARACTERS + 1);
        let cut = quoted(&long);
        assert!(cut.ends_with("... (202 bytes)"), "{cut}");
        assert_eq!(cut.matches('é').count(), QUOTED_CHARACTERS);
    }

    #[test]
    fn parts_are_told_by_their_five_digits() {
        let part = |name| part_name(name, ".gguf");
        assert_eq!(part("a-00002-of-00013.gguf"), Some(("a".to_owned(), 2, 13)));
        assert_eq!(part("a-1-of-3.gguf"), None);
        assert_eq!(part("a-00001-of-00003.bin"), None);
        assert_eq!(part("-00001-of-00003.gguf"), None);
        assert_eq!(part("a-00000-of-00000.gguf"), None);
        assert_eq!(part("a-00004-of-00003.gguf"), None);
        assert_eq!(part("a-+0001-of-00003.gguf"), None);
    }

    #[test]
    fn a_folder_is_not_read_as_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let text = open(folder.path()).unwrap_err().to_string();
        assert!(text.contains("a folder"), "{text}");
        let missing = open(&folder.path().join("none")).unwrap_err();
        assert_eq!(missing.kind(), crate::Kind::MissingFile);
    }

    #[test]
    fn a_file_over_the_limit_is_refused_by_its_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let text = read_whole(&path, "config", 16).unwrap_err().to_string();
        assert!(text.contains("1099511627776 bytes long") && text.contains("16"), "{text}");
    }
}
