//! Reads an index entry by entry and keeps nothing.

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::model::header::quoted;
use crate::model::visitors::{Text, wants};

/// Longest file name of the usual file systems.
const MAX_FILE_NAME: usize = 255;
const EXTENSION: &str = ".safetensors";

/// Calls `visit` with every tensor and its shard; gives their number.
pub(super) fn walk(
    text: &[u8],
    mut visit: impl FnMut(&str, &str) -> Result<(), String>,
) -> Result<usize, String> {
    let mut parser = serde_json::Deserializer::from_slice(text);
    let count = parser.deserialize_any(Index { visit: &mut visit }).map_err(|error| error.to_string())?;
    parser.end().map_err(|error| error.to_string())?;
    Ok(count)
}

/// Refuses anything but a file's own name, so that an index cannot lead out of its folder.
fn checked_shard(shard: &str) -> Result<(), String> {
    let plain = !shard.contains(['/', '\\', ':', '\0']) && shard.len() <= MAX_FILE_NAME;
    if !plain {
        return Err(format!(
            "it names the shard {}, which is no plain file name; a shard lies beside its index",
            quoted(shard)
        ));
    }
    // ".." and "" end otherwise as well.
    if shard.len() == EXTENSION.len() || !shard.ends_with(EXTENSION) {
        return Err(format!(
            "it names the shard {}, which is no {EXTENSION} file; convert the checkpoint to safetensors",
            quoted(shard)
        ));
    }
    Ok(())
}

struct Index<'f, F> {
    visit: &'f mut F,
}

impl<'de, F: FnMut(&str, &str) -> Result<(), String>> Visitor<'de> for Index<'_, F> {
    type Value = usize;

    wants!("an object with a weight_map");

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<usize, A::Error> {
        let mut count = None;
        while let Some(key) = map.next_key_seed(Text)? {
            if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
            } else if count.replace(map.next_value_seed(WeightMap { visit: &mut *self.visit })?).is_some() {
                return Err(A::Error::custom("two entries weight_map"));
            }
        }
        count.ok_or_else(|| A::Error::custom("it has no weight_map: this is no index of safetensors files"))
    }
}

struct WeightMap<'f, F> {
    visit: &'f mut F,
}

impl<'de, F: FnMut(&str, &str) -> Result<(), String>> DeserializeSeed<'de> for WeightMap<'_, F> {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<usize, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, F: FnMut(&str, &str) -> Result<(), String>> Visitor<'de> for WeightMap<'_, F> {
    type Value = usize;

    wants!("an object with a file name for each tensor");

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<usize, A::Error> {
        let mut count = 0;
        while let Some(tensor) = map.next_key_seed(Text)? {
            let shard = map.next_value_seed(Text)?;
            checked_shard(&shard).and_then(|()| (self.visit)(&tensor, &shard)).map_err(A::Error::custom)?;
            count += 1;
        }
        Ok(count)
    }
}
