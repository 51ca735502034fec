//! Access to the metadata of a GGUF file under its architecture's prefix.

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::model::config::reader::quoted;
use crate::model::gguf::{GgufFile, GgufValue};

/// A file, what messages call it, and the prefix of its keys.
pub(in crate::model) struct Metadata<'a> {
    pub(in crate::model) gguf: &'a GgufFile,
    pub(in crate::model) name: &'a str,
    pub(in crate::model) architecture: &'a str,
}

impl Metadata<'_> {
    /// Which layers have a tensor of this name; `None` where no layer has.
    pub(in crate::model) fn layers_with(&self, tensor: &str, layers: usize) -> Option<Vec<bool>> {
        let mut found = vec![false; layers];
        for tensor_info in &self.gguf.tensors {
            let layer = tensor_info
                .name
                .strip_prefix("blk.")
                .and_then(|rest| rest.strip_suffix(tensor))
                .and_then(|rest| rest.strip_suffix('.'))
                .and_then(|layer| layer.parse::<usize>().ok());
            if let Some(flag) = layer.and_then(|layer| found.get_mut(layer)) {
                *flag = true;
            }
        }
        found.contains(&true).then_some(found)
    }

    pub(in crate::model) fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    pub(in crate::model) fn value(&self, key: &str) -> Option<(String, &GgufValue)> {
        let key = self.key(key);
        let value = self.gguf.metadata.get(&key)?;
        Some((key, value))
    }

    pub(in crate::model) fn number(&self, key: &str, most: u64) -> Result<Option<u64>> {
        let Some((key, value)) = self.value(key) else { return Ok(None) };
        // Some converters write an array where all layers agree.
        let value = match value {
            GgufValue::Unsigned(number) => Some(*number),
            GgufValue::Signed(number) => u64::try_from(*number).ok(),
            other => match other.as_numbers().as_deref() {
                Some([first, rest @ ..]) if rest.iter().all(|other| (other - first).abs() < 0.5) => {
                    whole(*first)
                }
                _ => None,
            },
        };
        match value {
            Some(number) if number <= most => Ok(Some(number)),
            _ => Err(self.wrong(&key, most)),
        }
    }

    pub(in crate::model) fn required(&self, key: &str, most: u64) -> Result<u64> {
        match self.number(key, most)? {
            None => Err(self.missing(key)),
            Some(0) => Err(self.wrong(&self.key(key), most)),
            Some(number) => Ok(number),
        }
    }

    /// One number for all layers, or an array of them.
    pub(in crate::model) fn per_layer(
        &self,
        key: &str,
        layers: usize,
        most: u64,
    ) -> Result<Option<Vec<u64>>> {
        let listed = self.value(key).and_then(|(full, value)| value.as_numbers().map(|list| (full, list)));
        let Some((full, list)) = listed else {
            return Ok(self.number(key, most)?.map(|number| vec![number; layers]));
        };
        let one = |value: &f64| {
            whole(*value).filter(|number| *number <= most).ok_or_else(|| self.wrong(&full, most))
        };
        self.length(key, &list, layers)?;
        list.iter().map(one).collect::<Result<Vec<_>>>().map(Some)
    }

    pub(in crate::model) fn length(&self, key: &str, list: &[f64], layers: usize) -> Result<()> {
        if list.len() == layers {
            return Ok(());
        }
        Err(Error::Contradiction {
            source_name: self.name.to_owned(),
            left: format!("{} with {} entries", self.key(key), list.len()),
            right: format!("{} of {layers}", self.key("block_count")),
            remedy: "convert the model again".to_owned(),
        })
    }

    pub(in crate::model) fn wrong(&self, key: &str, most: u64) -> Error {
        let got = self.gguf.metadata.get(key).map_or_else(|| "missing".to_owned(), shown);
        broken(
            self.name,
            format!("{key} is {got}, wanted a whole number up to {most}; convert the model again"),
        )
    }

    pub(in crate::model) fn missing(&self, key: &str) -> Error {
        broken(self.name, format!("{} is missing; convert the model again", quoted(&[&self.key(key)])))
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn whole(value: f64) -> Option<u64> {
    (value.fract() == 0.0 && (0.0..=1e15).contains(&value)).then_some(value as u64)
}

pub(in crate::model) fn shown(value: &GgufValue) -> String {
    match value {
        GgufValue::Unsigned(number) => number.to_string(),
        GgufValue::Signed(number) => number.to_string(),
        GgufValue::Float(number) => number.to_string(),
        GgufValue::Bool(flag) => flag.to_string(),
        GgufValue::String(text) => format!("{:?}", text.chars().take(60).collect::<String>()),
        GgufValue::Array(list) => format!("an array of {} values", list.length),
    }
}

pub(in crate::model) fn broken(name: &str, problem: impl Into<String>) -> Error {
    Error::BrokenHeader { path: PathBuf::from(name), format: "GGUF header", problem: problem.into() }
}
