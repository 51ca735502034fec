//! Reads keys of a configuration: the nested text part, names that differ between architectures, bounds.

use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::model::config::defaults::{CLASS_DEFAULTS, ClassDefault, Defaults};

/// No dimension of a language model comes near this; beyond it products of two or three could overflow.
pub(in crate::model) const LARGEST_DIMENSION: u64 = 1 << 24;
/// The deepest published model has 126 layers.
pub(in crate::model) const MOST_LAYERS: u64 = 4096;
/// Routed experts of one layer.
pub(in crate::model) const MOST_EXPERTS: u64 = 65_536;
/// Positions go further than dimensions: Llama 4 Scout has 10,485,760.
const MOST_POSITIONS: u64 = 1 << 40;

/// Keys under which wrappers keep the configuration of their language model.
const TEXT_KEYS: [&str; 6] =
    ["text_config", "llm_config", "language_config", "language_model_config", "thinker_config", "text_model"];

/// The language model's part of a configuration.
#[derive(Clone)]
pub(in crate::model) struct Config<'a> {
    name: &'a str,
    /// `"text_config."` where the keys lie deeper, for messages.
    place: String,
    map: &'a Map<String, Value>,
    /// The configurations around it, outermost first: dtype and quantisation are often written there.
    around: Vec<&'a Map<String, Value>>,
    architecture: &'a str,
    defaults: Defaults,
}

impl<'a> Config<'a> {
    /// Finds the language model in `config`.
    ///
    /// # Errors
    /// Not an object, no `model_type`, or wrappers nested without end.
    pub(in crate::model) fn open(config: &'a Value, name: &'a str) -> Result<Self> {
        let mut map = config
            .as_object()
            .ok_or_else(|| broken(name, format!("wanted a JSON object, got {}", short(config))))?;
        let mut around = Vec::new();
        let mut place = String::new();
        // Qwen-Omni nests twice (`thinker_config.text_config`); nobody nests deeper than three.
        for _ in 0..3 {
            let Some((key, inner)) =
                TEXT_KEYS.iter().find_map(|key| Some((*key, map.get(*key)?.as_object()?)))
            else {
                break;
            };
            place.push_str(key);
            place.push('.');
            around.push(map);
            map = inner;
        }
        let declared =
            std::iter::once(map).chain(around.iter().rev().copied()).find_map(|m| m.get("model_type"));
        let architecture = match declared {
            Some(Value::String(text)) if !text.is_empty() => text.as_str(),
            Some(other) => {
                return Err(broken(
                    name,
                    format!("{place}model_type is {}, wanted a name such as \"llama\"", short(other)),
                ));
            }
            None => {
                return Err(broken(
                    name,
                    format!(
                        "there is no \"model_type\"; found the keys {}; give a transformers config.json",
                        some_keys(map)
                    ),
                ));
            }
        };
        let defaults = CLASS_DEFAULTS
            .iter()
            .find(|entry| entry.0.contains(&architecture))
            .map_or(&[][..], |entry| entry.1);
        Ok(Self { name, place, map, around, architecture, defaults })
    }

    /// Its `model_type`.
    pub(in crate::model) fn architecture(&self) -> &'a str {
        self.architecture
    }

    /// What the caller calls the model.
    pub(in crate::model) fn name(&self) -> &'a str {
        self.name
    }

    /// Whether it lies inside a wrapper.
    pub(in crate::model) fn nested(&self) -> bool {
        !self.around.is_empty()
    }

    /// `model_type` of the outermost configuration.
    pub(in crate::model) fn outermost(&self) -> &'a str {
        self.around
            .first()
            .and_then(|m| m.get("model_type"))
            .and_then(Value::as_str)
            .unwrap_or(self.architecture)
    }

    /// The first of `keys` that is there and not null, with its name.
    pub(in crate::model) fn get(&self, keys: &[&'static str]) -> Option<(&'static str, &'a Value)> {
        keys.iter().find_map(|key| Some((*key, self.map.get(*key).filter(|v| !v.is_null())?)))
    }

    /// As [`Config::get`], looking into the wrappers as well.
    pub(in crate::model) fn get_anywhere(&self, keys: &[&'static str]) -> Option<(&'static str, &'a Value)> {
        self.get(keys).or_else(|| {
            self.around.iter().rev().find_map(|map| {
                keys.iter().find_map(|key| Some((*key, map.get(*key).filter(|v| !v.is_null())?)))
            })
        })
    }

    /// The class default of the first of `keys` that has one and may be left out here.
    fn default(&self, keys: &[&'static str]) -> Option<&'static ClassDefault> {
        let allowed = |value: &ClassDefault| self.nested() || !matches!(value, ClassDefault::Nested(_));
        keys.iter().find_map(|key| self.defaults.iter().find(|d| d.0 == *key && allowed(&d.1)).map(|d| &d.1))
    }

    /// A whole number in `0..=most`, `None` if absent, the class default of the architecture included.
    pub(in crate::model) fn number(&self, keys: &[&'static str], most: u64) -> Result<Option<u64>> {
        match self.get(keys) {
            Some((key, value)) => self.whole(key, value, 0, most).map(Some),
            // A written null means "derive it", and hides the class default.
            None if keys.iter().any(|key| self.map.contains_key(*key)) => Ok(None),
            None => Ok(match self.default(keys) {
                Some(ClassDefault::Number(number) | ClassDefault::Nested(number)) => Some(*number),
                _ => None,
            }),
        }
    }

    /// A dimension, `None` if absent, never zero.
    pub(in crate::model) fn size(&self, keys: &[&'static str]) -> Result<Option<u64>> {
        self.bounded(keys, LARGEST_DIMENSION)
    }

    /// Positions that the model was made for.
    pub(in crate::model) fn positions(&self, keys: &[&'static str]) -> Result<Option<u64>> {
        self.bounded(keys, MOST_POSITIONS)
    }

    fn bounded(&self, keys: &[&'static str], most: u64) -> Result<Option<u64>> {
        let number = self.number(keys, most)?;
        if number == Some(0) {
            let key = self.get(keys).map_or("", |found| found.0);
            return Err(self.broken(format!("{}{key} is 0, wanted 1 to {most}", self.place)));
        }
        Ok(number)
    }

    /// A dimension that has to be there.
    pub(in crate::model) fn required(&self, keys: &[&'static str], what: &str) -> Result<u64> {
        self.size(keys)?.ok_or_else(|| self.missing(keys, what))
    }

    /// A number for each layer: one for all of them, or a list.
    pub(in crate::model) fn per_layer(
        &self,
        keys: &[&'static str],
        layers: usize,
        most: u64,
    ) -> Result<Option<Vec<u64>>> {
        match self.get(keys) {
            Some((key, Value::Array(list))) => {
                self.same_length(key, list.len(), layers)?;
                list.iter().map(|value| self.whole(key, value, 0, most)).collect::<Result<Vec<_>>>().map(Some)
            }
            _ => Ok(self.number(keys, most)?.map(|number| vec![number; layers])),
        }
    }

    /// A yes or no; 0 and 1 are accepted, as some configurations write them.
    pub(in crate::model) fn flag(&self, keys: &[&'static str]) -> Result<Option<bool>> {
        self.flag_of(self.get(keys), keys)
    }

    /// As [`Config::flag`], looking into the wrappers as well.
    pub(in crate::model) fn flag_anywhere(&self, keys: &[&'static str]) -> Result<Option<bool>> {
        self.flag_of(self.get_anywhere(keys), keys)
    }

    fn flag_of(&self, found: Option<(&'static str, &Value)>, keys: &[&'static str]) -> Result<Option<bool>> {
        match found {
            Some((_, Value::Bool(flag))) => Ok(Some(*flag)),
            Some((_, value)) if matches!(value.as_u64(), Some(0 | 1)) => Ok(value.as_u64().map(|n| n == 1)),
            Some((key, value)) => {
                Err(self.broken(format!("{}{key} is {}, wanted true or false", self.place, short(value))))
            }
            None => Ok(match self.default(keys) {
                Some(ClassDefault::Flag(flag)) => Some(*flag),
                _ => None,
            }),
        }
    }

    /// A list of texts, such as `layer_types`.
    pub(in crate::model) fn texts(
        &self,
        keys: &[&'static str],
    ) -> Result<Option<(&'static str, Vec<&'a str>)>> {
        let Some((key, value)) = self.get(keys) else { return Ok(None) };
        let list =
            value.as_array().and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        list.map(|list| Some((key, list))).ok_or_else(|| {
            self.broken(format!("{}{key} is {}, wanted a list of texts", self.place, short(value)))
        })
    }

    /// A list of whole numbers, such as `mlp_only_layers`; true and false count as 1 and 0.
    pub(in crate::model) fn numbers(
        &self,
        keys: &[&'static str],
        most: u64,
    ) -> Result<Option<(&'static str, Vec<u64>)>> {
        let Some((key, value)) = self.get(keys) else { return Ok(None) };
        let Some(list) = value.as_array() else {
            return Err(self.broken(format!(
                "{}{key} is {}, wanted a list of whole numbers",
                self.place,
                short(value)
            )));
        };
        let one = |value: &Value| match value {
            Value::Bool(flag) => Ok(u64::from(*flag)),
            other => self.whole(key, other, 0, most),
        };
        Ok(Some((key, list.iter().map(one).collect::<Result<Vec<_>>>()?)))
    }

    /// Says so when a list that has an entry for each layer has another length.
    pub(in crate::model) fn same_length(&self, key: &str, got: usize, layers: usize) -> Result<()> {
        if got == layers {
            return Ok(());
        }
        Err(self.contradiction(
            format!("{}{key} with {got} entries", self.place),
            format!("{layers} layers"),
            "give one entry for each layer, or correct the number of layers",
        ))
    }

    /// Reads one number.
    pub(in crate::model) fn whole(&self, key: &str, value: &Value, least: u64, most: u64) -> Result<u64> {
        // 2.0 is what some writers make of 2.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let number = value.as_u64().or_else(|| {
            value.as_f64().filter(|f| f.fract() == 0.0 && (0.0..=1e15).contains(f)).map(|f| f as u64)
        });
        match number {
            Some(number) if (least..=most).contains(&number) => Ok(number),
            _ => Err(self.broken(format!(
                "{}{key} is {}, wanted a whole number from {least} to {most}",
                self.place,
                short(value)
            ))),
        }
    }

    /// The error for keys that are not there.
    pub(in crate::model) fn missing(&self, keys: &[&str], what: &str) -> Error {
        self.broken(format!(
            "{what} is missing for model_type \"{}\": looked for {}{}; found {}; add it, or give the \
             model's own config.json",
            self.architecture,
            if self.place.is_empty() {
                String::new()
            } else {
                format!("in {} ", self.place.trim_end_matches('.'))
            },
            quoted(keys),
            some_keys(self.map)
        ))
    }

    pub(in crate::model) fn broken(&self, problem: impl Into<String>) -> Error {
        broken(self.name, problem)
    }

    pub(in crate::model) fn contradiction(
        &self,
        left: impl Into<String>,
        right: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Error {
        Error::Contradiction {
            source_name: self.name.to_owned(),
            left: left.into(),
            right: right.into(),
            remedy: remedy.into(),
        }
    }
}

fn broken(name: &str, problem: impl Into<String>) -> Error {
    Error::BrokenHeader { path: PathBuf::from(name), format: "config", problem: problem.into() }
}

/// Keys in quotes, with commas.
pub(in crate::model) fn quoted(keys: &[&str]) -> String {
    keys.iter().map(|key| format!("\"{key}\"")).collect::<Vec<_>>().join(", ")
}

/// The first keys of an object, so that one sees at once what was given instead.
fn some_keys(map: &Map<String, Value>) -> String {
    if map.is_empty() {
        return "no keys at all".to_owned();
    }
    let first = map.keys().take(8).map(|key| short_text(key)).collect::<Vec<_>>().join(", ");
    if map.len() > 8 { format!("{first} and {} more", map.len() - 8) } else { first }
}

fn short_text(text: &str) -> String {
    if text.chars().count() <= 60 {
        format!("\"{text}\"")
    } else {
        format!("\"{}...\"", text.chars().take(57).collect::<String>())
    }
}

/// A value as a message may show it, however large it is.
pub(in crate::model) fn short(value: &Value) -> String {
    match value {
        Value::String(text) => short_text(text),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(map) => format!("an object of {} keys", map.len()),
        other => other.to_string(),
    }
}
