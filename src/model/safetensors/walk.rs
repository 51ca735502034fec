//! Reads a header entry by entry and keeps nothing, so that a header can be measured before it is stored.

use std::fmt;

use ::safetensors::Dtype;
use serde::Deserialize;
use serde::de::value::{Error as ValueError, StrDeserializer};
use serde::de::{self, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::model::header::quoted;
use crate::model::visitors::{Text, seed, wants};

/// Most dimensions of a tensor. Frameworks stop at a handful; a header that has more is made to cost memory.
const MAX_DIMENSIONS: usize = 8;
/// Longest name of a type that is looked up.
const MAX_DTYPE: usize = 32;
/// The entry for free text, which is no tensor.
const METADATA: &str = "__metadata__";

/// One tensor as the header writes it.
pub(super) struct Entry<'a> {
    pub(super) name: &'a str,
    pub(super) dtype: Dtype,
    pub(super) offsets: (u64, u64),
    shape: Numbers,
}

impl Entry<'_> {
    pub(super) fn shape(&self) -> &[u64] {
        self.shape.as_slice()
    }
}

/// Calls `visit` for every tensor of a header, in the order of the text. Takes no memory but for names that have
/// escapes in them.
///
/// # Errors
///
/// Text that is not as the format has it, or what `visit` returned, with line and column.
pub(super) fn walk(text: &str, mut visit: impl FnMut(Entry<'_>) -> Result<(), String>) -> Result<(), String> {
    let mut parser = serde_json::Deserializer::from_str(text);
    parser
        .deserialize_any(Header { visit: &mut visit })
        .and_then(|()| parser.end())
        .map_err(|error| error.to_string())
}

struct Header<'f, F> {
    visit: &'f mut F,
}

impl<'de, F: FnMut(Entry<'_>) -> Result<(), String>> Visitor<'de> for Header<'_, F> {
    type Value = ();

    wants!("an object with an entry for each tensor");

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut has_metadata = false;
        while let Some(name) = map.next_key_seed(Text)? {
            if name == METADATA {
                if std::mem::replace(&mut has_metadata, true) {
                    return Err(A::Error::custom("two entries __metadata__"));
                }
                map.next_value_seed(Metadata)?;
                continue;
            }
            let fields = map
                .next_value_seed(Tensor)
                .map_err(|error| A::Error::custom(format_args!("tensor {}: {error}", quoted(&name))))?;
            let entry =
                Entry { name: &name, dtype: fields.dtype, shape: fields.shape, offsets: fields.offsets };
            (self.visit)(entry).map_err(A::Error::custom)?;
        }
        Ok(())
    }
}

struct Fields {
    dtype: Dtype,
    shape: Numbers,
    offsets: (u64, u64),
}

struct Tensor;
seed!(Tensor => Fields);

impl<'de> Visitor<'de> for Tensor {
    type Value = Fields;

    wants!("an object with dtype, shape and data_offsets");

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key_seed(Text)? {
            let again = match &*key {
                "dtype" => dtype.replace(map.next_value_seed(DtypeName)?).is_some(),
                "shape" => shape.replace(map.next_value_seed(Sizes)?).is_some(),
                "data_offsets" => {
                    let numbers = map.next_value_seed(Sizes)?;
                    let &[start, end] = numbers.as_slice() else {
                        let got = numbers.as_slice();
                        return Err(A::Error::custom(format_args!(
                            "data_offsets are {got:?}, wanted a start and an end"
                        )));
                    };
                    offsets.replace((start, end)).is_some()
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    false
                }
            };
            if again {
                return Err(A::Error::custom(format_args!("two fields {key}")));
            }
        }
        match (dtype, shape, offsets) {
            (Some(dtype), Some(shape), Some(offsets)) => Ok(Fields { dtype, shape, offsets }),
            (None, ..) => Err(A::Error::missing_field("dtype")),
            (_, None, _) => Err(A::Error::missing_field("shape")),
            (_, _, None) => Err(A::Error::missing_field("data_offsets")),
        }
    }
}

/// A few numbers, kept without allocating.
#[derive(Clone, Copy, Default)]
struct Numbers {
    values: [u64; MAX_DIMENSIONS],
    count: usize,
}

impl Numbers {
    fn as_slice(&self) -> &[u64] {
        self.values.get(..self.count).unwrap_or_default()
    }
}

struct Sizes;
seed!(Sizes => Numbers);

impl<'de> Visitor<'de> for Sizes {
    type Value = Numbers;

    wants!("a list of numbers");

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Numbers, A::Error> {
        let mut numbers = Numbers::default();
        while let Some(value) = sequence.next_element_seed(Size)? {
            let Some(slot) = numbers.values.get_mut(numbers.count) else {
                return Err(A::Error::custom(format_args!(
                    "more than {MAX_DIMENSIONS} numbers, which no tensor's shape has"
                )));
            };
            *slot = value;
            numbers.count += 1;
        }
        Ok(numbers)
    }
}

struct Size;
seed!(Size => u64);

impl Visitor<'_> for Size {
    type Value = u64;

    wants!("a whole number from 0 to 2^64 - 1");

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<u64, E> {
        Ok(value)
    }
}

struct DtypeName;
seed!(DtypeName => Dtype);

impl Visitor<'_> for DtypeName {
    type Value = Dtype;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the name of a type")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Dtype, E> {
        let known = if text.len() > MAX_DTYPE {
            None
        } else {
            Dtype::deserialize(StrDeserializer::<ValueError>::new(text)).ok()
        };
        known.ok_or_else(|| {
            E::custom(format_args!("unknown dtype {} (a newer tp_rs may know it)", quoted(text)))
        })
    }
}

/// The free text: strings by name, or `null`. Nothing of it is kept.
struct Metadata;
seed!(Metadata => ());

impl<'de> Visitor<'de> for Metadata {
    type Value = ();

    wants!("an object of strings");

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key::<IgnoredAny>()?.is_some() {
            map.next_value_seed(AnyText)?;
        }
        Ok(())
    }
}

struct AnyText;
seed!(AnyText => ());

impl Visitor<'_> for AnyText {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a string")
    }

    fn visit_str<E: de::Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
}
