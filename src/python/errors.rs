//! From the crate's errors to the exception classes of `tp_rs.errors`.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::call::PyCallArgs;
use pyo3::exceptions::{PyFileNotFoundError, PyOSError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::error::{Error, Kind, Result};

/// Runs `work` with the interpreter released. A panic becomes `TPError`: PyO3's own `PanicException` derives
/// from `BaseException`, so that a user's `except Exception` would miss it.
pub(super) fn guarded<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    match py.detach(|| catch_unwind(AssertUnwindSafe(work))) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(to_python(py, &error)),
        Err(panic) => Err(internal(py, panic.as_ref())),
    }
}

/// `InvalidInput` for an argument that only the Python side sees.
pub(super) fn invalid(
    py: Python<'_>,
    argument: impl Into<String>,
    got: impl std::fmt::Display,
    wanted: impl Into<String>,
) -> PyErr {
    to_python(py, &Error::invalid(argument, got, wanted))
}

/// The exception for `error`.
pub(super) fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    let message = error.to_string();
    match (error.kind(), error) {
        (Kind::MissingFile | Kind::File, Error::File { path, source }) => {
            let missing = error.kind() == Kind::MissingFile;
            match source.raw_os_error() {
                // `OSError(errno, text, filename)` fills in the attributes that callers look at.
                Some(code) => PyOSError::new_err((code, os_text(py, code), path.clone())),
                None if missing => PyFileNotFoundError::new_err(message),
                None => PyOSError::new_err(message),
            }
        }
        (_, Error::DoesNotFit(shortfall)) => {
            let shortfall = super::plan_parts::Shortfall { inner: shortfall.as_ref().clone() };
            raise(py, "DoesNotFit", (message, shortfall))
        }
        (_, Error::Driver { call, code, .. }) => raise(py, "CudaError", (message, *call, *code)),
        (_, Error::CollectiveTimeout { missing, .. }) => {
            raise(py, "CollectiveTimeout", (message, missing.clone()))
        }
        (Kind::Timeout | Kind::Aborted, _) => raise(py, "TPError", (message,)),
        (Kind::Model, _) => raise(py, "ModelError", (message,)),
        (Kind::Device, _) => raise(py, "CudaError", (message,)),
        (Kind::MissingFile, _) => PyFileNotFoundError::new_err(message),
        (Kind::File, _) => PyOSError::new_err(message),
        (Kind::InvalidInput | Kind::DoesNotFit, _) => raise(py, "InvalidInput", (message,)),
    }
}

/// The system's words for an error number, as Python's own `open` would give them.
fn os_text(py: Python<'_>, code: i32) -> String {
    py.import("os")
        .and_then(|os| os.call_method1("strerror", (code,)))
        .and_then(|text| text.extract())
        .unwrap_or_else(|_| format!("error {code}"))
}

fn internal(py: Python<'_>, panic: &(dyn Any + Send)) -> PyErr {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned());
    let version = env!("CARGO_PKG_VERSION");
    let message = format!(
        "internal error in tp_rs {version}: {text}; this is a bug in tp_rs, please report it with the call that led here"
    );
    raise(py, "TPError", (message,))
}

/// An instance of a class of `tp_rs.errors`, imported at first need: that module must not be needed to import
/// this one.
fn raise<'py>(py: Python<'py>, class: &str, arguments: impl PyCallArgs<'py>) -> PyErr {
    static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let instance = (|| {
        let module = MODULE.get_or_try_init(py, || py.import("tp_rs.errors").map(Bound::unbind))?;
        module.bind(py).getattr(class)?.call1(arguments)
    })();
    match instance {
        Ok(instance) => PyErr::from_value(instance),
        Err(error) => error,
    }
}
