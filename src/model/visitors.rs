//! What visitors of hostile JSON share.
//!
//! Where a value is of the wrong kind, serde's own message repeats it whole, so a string of a gigabyte would be
//! copied several times just to be refused. These visitors word their refusals themselves and cut what they quote.

use std::borrow::Cow;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, Visitor};

/// What a visitor wants, in its own words, and its refusal of strings.
macro_rules! wants {
    ($what:literal) => {
        fn expecting(&self, formatter: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
            formatter.write_str($what)
        }

        fn visit_str<E: ::serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
            let text = $crate::model::header::quoted(text);
            Err(E::custom(format_args!("got the string {text}, wanted {}", $what)))
        }
    };
}

/// Makes a visitor a seed that reads whatever comes. `serde_json` words the refusal itself where it is asked for
/// something definite.
macro_rules! seed {
    ($name:ty => $value:ty) => {
        impl<'de> ::serde::de::DeserializeSeed<'de> for $name {
            type Value = $value;

            fn deserialize<D: ::serde::de::Deserializer<'de>>(
                self,
                deserializer: D,
            ) -> Result<$value, D::Error> {
                deserializer.deserialize_any(self)
            }
        }
    };
}

pub(super) use {seed, wants};

/// A string, copied only where it has escapes.
pub(super) struct Text;

impl<'de> DeserializeSeed<'de> for Text {
    type Value = Cow<'de, str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Cow<'de, str>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Text {
    type Value = Cow<'de, str>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a string")
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}
