//! The one error type of the crate.
//!
//! Every message carries the values that led to it and what to do about them. [`Error::kind`] keeps what the
//! caller got wrong apart from a broken checkpoint and from a device that failed; the Python package raises
//! one exception class for each [`Kind`].

use std::path::PathBuf;

/// What went wrong, with the values that led to it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument is outside of what the call accepts.
    #[error("{argument}: got {got}, wanted {wanted}")]
    InvalidArgument {
        /// The argument's name as the caller wrote it, with an index where it is one entry of a list.
        argument: String,
        /// What was given.
        got: String,
        /// What would have been accepted, and what to do.
        wanted: String,
    },

    /// Nothing is left to divide by: the ratios of an apportionment add up to zero.
    ///
    /// `ExLlamaV2` ends here in a bare `ZeroDivisionError` once cache and attention have used up every budget.
    #[error(
        "{what}: the budgets left are {ratios:?}, which add up to {sum}; nothing can be apportioned by them: \
         give larger budgets or a shorter context, or use strategy=\"balanced\""
    )]
    NothingToApportion {
        /// What was to be apportioned.
        what: &'static str,
        /// The ratios.
        ratios: Vec<f64>,
        /// Their sum: zero or not a number.
        sum: f64,
    },

    /// The reference's arithmetic does not accept this model.
    #[error("strategy \"exllamav2\" refuses this model: {problem}; use strategy=\"balanced\"")]
    ReferenceRefuses {
        /// Why, with the values.
        problem: String,
    },

    /// The model does not fit the budgets.
    #[error("{0}")]
    DoesNotFit(Box<crate::split::Shortfall>),

    /// A file or folder could not be read. A missing one keeps [`std::io::ErrorKind::NotFound`].
    #[error("cannot read {}: {source}", path.display())]
    File {
        /// The path that was tried.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },

    /// A folder holds nothing that describes a model.
    #[error("{}: no model here: found {found}; wanted {wanted}", path.display())]
    NoModel {
        /// The folder or file.
        path: PathBuf,
        /// What is there instead.
        found: String,
        /// What would have been read.
        wanted: String,
    },

    /// A header or configuration is broken: truncated, overlapping, of an unknown version, hostile.
    #[error("{}: broken {format}: {problem}", path.display())]
    BrokenHeader {
        /// The file.
        path: PathBuf,
        /// `"safetensors header"`, `"GGUF header"`, `"config"` or `"index"`.
        format: &'static str,
        /// What is wrong, with offsets and values, and what to do.
        problem: String,
    },

    /// An index of shards names a file that is not there.
    #[error(
        "{}: the index names the shard {shard} for the tensor {tensor}, and there is no such file; \
         download the missing shard or correct the index", index.display()
    )]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The shard as the index writes it.
        shard: String,
        /// A tensor that should be in it.
        tensor: String,
    },

    /// The architecture is not known and there are no tensor headers to plan from.
    #[error(
        "unknown architecture {found}: its tensors cannot be told from a configuration alone; give the \
         checkpoint's folder, whose headers are enough, or one of: {known}"
    )]
    UnknownArchitecture {
        /// `model_type` or `general.architecture` as found.
        found: String,
        /// The architectures whose tensors are known.
        known: String,
    },

    /// Two statements about one model cannot both be true.
    #[error("{source_name}: {left} contradicts {right}; {remedy}")]
    Contradiction {
        /// The file or object that says so.
        source_name: String,
        /// One statement, with its value.
        left: String,
        /// The other, with its value.
        right: String,
        /// What to do.
        remedy: String,
    },

    /// Ranks did not come to a collective call in time. The communicator is broken from then on.
    #[error(
        "{operation} on rank {rank} ({device}): ranks {missing:?} did not come within {seconds} s; every rank has to make \
         the same calls in the same order: find out what kept them, then make a new communicator, with a \
         longer timeout if they were only slow. One thread that launches many calls of one GPU rank before those of \
         the others fills the driver's queue: interleave the ranks, give each a thread, or capture graphs"
    )]
    CollectiveTimeout {
        /// The call that waited.
        operation: &'static str,
        /// The rank that waited.
        rank: usize,
        /// Where it is.
        device: crate::device::Device,
        /// The ranks that had not come.
        missing: Vec<usize>,
        /// How long was waited, in seconds.
        seconds: f64,
    },

    /// The communicator was stopped: by a call of `abort`, by an interrupt, or by a timeout in an earlier call.
    #[error("{operation}: the communicator was stopped: {reason}; make a new communicator")]
    Aborted {
        /// The call that was waiting, or that came later.
        operation: &'static str,
        /// Who stopped it and why.
        reason: String,
    },

    /// The CUDA driver refused a call.
    #[error(
        "{call} failed on {device}{}: {name} ({code}): {remedy}",
        rank.map_or_else(String::new, |rank| format!(" for rank {rank}"))
    )]
    Driver {
        /// The driver function.
        call: &'static str,
        /// The device, or `the driver` where the call concerns none.
        device: String,
        /// The rank of a communicator that the call was made for, the first of those that share a launch; `None` where
        /// it concerns none.
        rank: Option<usize>,
        /// The driver's name of the error.
        name: String,
        /// The driver's code.
        code: i32,
        /// What to do.
        remedy: String,
    },
}

/// Whose fault an [`Error`] is, which decides the exception that Python raises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The caller passed something that cannot be used (`tp_rs.InvalidInput`).
    InvalidInput,
    /// The model does not fit (`tp_rs.DoesNotFit`).
    DoesNotFit,
    /// The checkpoint is broken or cannot be split (`tp_rs.ModelError`).
    Model,
    /// A file is missing (`FileNotFoundError`).
    MissingFile,
    /// A file cannot be read (`OSError`).
    File,
    /// A device or its driver failed (`tp_rs.CudaError`).
    Device,
    /// A rank did not come in time (`tp_rs.CollectiveTimeout`).
    Timeout,
    /// The communicator was stopped (`tp_rs.TPError`).
    Aborted,
}

impl Error {
    /// Whose fault it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::InvalidArgument { .. }
            | Self::NothingToApportion { .. }
            | Self::ReferenceRefuses { .. } => Kind::InvalidInput,
            Self::DoesNotFit(_) => Kind::DoesNotFit,
            Self::File { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Kind::MissingFile,
            Self::File { .. } => Kind::File,
            Self::NoModel { .. }
            | Self::BrokenHeader { .. }
            | Self::MissingShard { .. }
            | Self::UnknownArchitecture { .. }
            | Self::Contradiction { .. } => Kind::Model,
            Self::Driver { .. } => Kind::Device,
            Self::CollectiveTimeout { .. } => Kind::Timeout,
            Self::Aborted { .. } => Kind::Aborted,
        }
    }

    /// The same error, saying which rank a driver's call was made for.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_rank(mut self, of: usize) -> Self {
        if let Self::Driver { rank, .. } = &mut self {
            rank.get_or_insert(of);
        }
        self
    }

    /// Shorthand for [`Error::InvalidArgument`].
    pub(crate) fn invalid(
        argument: impl Into<String>,
        got: impl std::fmt::Display,
        wanted: impl Into<String>,
    ) -> Self {
        Self::InvalidArgument { argument: argument.into(), got: got.to_string(), wanted: wanted.into() }
    }
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
