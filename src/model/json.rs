//! A look over JSON text before it is parsed, because a parser's memory depends on what the text holds.

use std::borrow::Cow;

/// Characters of a number that are still plausible. `serde_json` copies longer ones while it reads them.
const MAX_NUMBER: usize = 1024;
/// Bytes of a parsed object with a few members: `serde_json` keeps members in B-tree nodes of eleven.
const OBJECT_BYTES: u64 = 768;
/// Bytes of any other parsed value, or of an object's member beyond the first few, with room that vectors keep to
/// grow.
const VALUE_BYTES: u64 = 160;

/// What a text holds, counted without parsing it. All numbers are upper bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Scan {
    /// Bytes of the longest string that has an escape. Parsers copy such strings.
    escaped: u64,
    /// Objects.
    objects: u64,
    /// Values of every kind.
    values: u64,
}

impl Scan {
    /// Bytes that a streaming parser may hold at once: its copy of a string with escapes, which grows by doubling,
    /// and a second copy for whoever keeps it.
    pub(super) fn copies(self) -> u64 {
        self.escaped.saturating_mul(4)
    }

    /// Bytes of the text parsed into a `serde_json::Value`, the text's own strings not counted.
    pub(super) fn tree(self) -> u64 {
        self.objects
            .saturating_mul(OBJECT_BYTES)
            .saturating_add(self.values.saturating_mul(VALUE_BYTES))
            .saturating_add(self.copies())
    }
}

/// Counts what `text` holds. Text that is no JSON is counted up to where a parser would stop, and past it.
///
/// # Errors
///
/// Arrays and objects nested deeper than `max_depth`, or a number of more than 1024 characters, with the offset.
pub(super) fn scan(text: &[u8], max_depth: usize) -> Result<Scan, String> {
    let mut scan = Scan { values: 1, ..Scan::default() };
    let mut depth = 0_usize;
    let mut number = 0_usize;
    let mut position = 0_usize;
    while let Some(&byte) = text.get(position) {
        number = match byte {
            b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E' => number + 1,
            _ => 0,
        };
        if number > MAX_NUMBER {
            return Err(format!("the number before byte {position} has more than {MAX_NUMBER} characters"));
        }
        match byte {
            b'{' | b'[' => {
                depth += 1;
                if depth > max_depth {
                    return Err(format!("nested deeper than {max_depth} levels at byte {position}"));
                }
                scan.objects += u64::from(byte == b'{');
                scan.values += 1;
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b',' => scan.values += 1,
            b'"' => {
                let (end, has_escapes) = string_end(text, position + 1);
                if has_escapes {
                    scan.escaped = scan.escaped.max((end - position) as u64);
                }
                position = end;
            }
            _ => {}
        }
        position += 1;
    }
    Ok(scan)
}

/// Where the string that starts at `start` has its closing quote (the text's end if it has none), and whether there
/// is an escape in it.
fn string_end(text: &[u8], start: usize) -> (usize, bool) {
    let mut position = start;
    let mut has_escapes = false;
    while let Some(&byte) = text.get(position) {
        match byte {
            b'"' => return (position, has_escapes),
            b'\\' => {
                has_escapes = true;
                position += 2;
            }
            _ => position += 1,
        }
    }
    (text.len(), has_escapes)
}

/// `text` with the constants that Python's `json` module writes and JSON does not have (`NaN`, `Infinity`,
/// `-Infinity`) replaced by `null`. Configurations of state-space models hold them (`time_step_limit`).
pub(super) fn without_python_constants(text: &[u8]) -> Cow<'_, [u8]> {
    let mut replaced = Vec::new();
    let mut copied = 0;
    let mut position = 0;
    while let Some(&byte) = text.get(position) {
        let rest = text.get(position..).unwrap_or_default();
        let word = match byte {
            b'"' => {
                position = string_end(text, position + 1).0 + 1;
                continue;
            }
            b'N' if rest.starts_with(b"NaN") => "NaN",
            b'I' if rest.starts_with(b"Infinity") => "Infinity",
            b'-' if rest.starts_with(b"-Infinity") => "-Infinity",
            _ => {
                position += 1;
                continue;
            }
        };
        replaced.extend_from_slice(text.get(copied..position).unwrap_or_default());
        replaced.extend_from_slice(b"null");
        position += word.len();
        copied = position;
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    replaced.extend_from_slice(text.get(copied..).unwrap_or_default());
    Cow::Owned(replaced)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_hide_what_is_in_them() {
        let scan = scan(br#"{"a[{,": "\"[[[[", "b": [1, 2]}"#, 2).unwrap();
        assert_eq!(scan, Scan { escaped: 7, objects: 1, values: 5 });
    }

    #[test]
    fn depth_and_long_numbers_are_refused_with_their_place() {
        assert_eq!(scan(b"[[[]]]", 3).unwrap().values, 4);
        assert!(scan(b"[[[]]]", 2).unwrap_err().contains("byte 2"));
        let long = [b'7'; 1025];
        assert!(scan(&long, 1).unwrap_err().contains("1024"));
        assert!(scan(&long[..1024], 1).is_ok());
        // Digits in a string are no number.
        let in_string = format!("\"{}\"", "7".repeat(2000));
        assert!(scan(in_string.as_bytes(), 1).is_ok());
    }

    #[test]
    fn text_that_ends_in_a_string_is_scanned_to_its_end() {
        assert_eq!(scan(b"\"abc\\", 1).unwrap().escaped, 5);
        assert_eq!(scan(b"\"", 1).unwrap().escaped, 0);
    }

    #[test]
    fn python_constants_become_null_outside_of_strings() {
        let text = br#"{"a": [0.0, Infinity, -Infinity, NaN], "NaN": "Infinity \" NaN"}"#;
        let value: serde_json::Value = serde_json::from_slice(&without_python_constants(text)).unwrap();
        assert_eq!(value, serde_json::json!({"a": [0.0, null, null, null], "NaN": "Infinity \" NaN"}));
    }
}
