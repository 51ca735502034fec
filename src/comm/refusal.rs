//! Why a call is refused, in a form that every rank can be given.

use crate::error::Error;

/// Why a call is refused. Every rank of the call gets the same one, so it can be copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) argument: String,
    pub(crate) got: String,
    pub(crate) wanted: String,
}

impl Refusal {
    pub(crate) fn new(
        argument: impl Into<String>,
        got: impl std::fmt::Display,
        wanted: impl std::fmt::Display,
    ) -> Self {
        Self { argument: argument.into(), got: got.to_string(), wanted: wanted.to_string() }
    }
}

impl From<Refusal> for Error {
    fn from(Refusal { argument, got, wanted }: Refusal) -> Self {
        Self::InvalidArgument { argument, got, wanted }
    }
}
