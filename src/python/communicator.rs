//! `Communicator`, and what it shares with `RankView`.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;

use super::arguments::{self, whole};
use super::errors::{guarded, invalid, to_python};
use super::rank_view::{Baton, RankView};
use super::streams::Streams;
use super::tensors;
use crate::comm::{self, CommOptions, Device, Peers, Stream, Tensor};
use crate::error::{Error, Result};
use crate::split::{Share, Split};

thread_local! {
    /// The exception that a signal handler raised while this thread waited.
    static INTERRUPT: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// Lets Python's signal handlers run, which they do on the main thread only.
fn poll() -> Result<()> {
    let signals = Python::try_attach(|py| {
        py.check_signals().map_err(|error| {
            let reason = format!("a waiting rank was interrupted by {error}");
            INTERRUPT.with(|interrupt| interrupt.replace(Some(error)));
            Error::Aborted { operation: "wait", reason }
        })
    });
    // Without an interpreter there is nobody left to interrupt.
    signals.unwrap_or(Ok(()))
}

/// Does `work` with the interpreter released. An exception of a signal handler goes before any error of `work`.
pub(super) fn released<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    let result = guarded(py, work);
    match INTERRUPT.with(RefCell::take) {
        Some(interrupt) => Err(interrupt),
        None => result,
    }
}

pub(super) fn split(value: &Bound<'_, PyAny>, argument: &str) -> PyResult<Split> {
    let shares: Vec<(usize, u64, u64)> = value.extract().map_err(|_| {
        let got = value.repr().map_or_else(|_| "something else".to_owned(), |text| text.to_string());
        let wanted = "a list of (rank, start, end), such as [(0, 0, 6), (1, 6, 9)]";
        invalid(value.py(), argument, got, wanted)
    })?;
    Ok(Split(shares.into_iter().map(Share::from).collect()))
}

/// Whose columns are which: a split, and the columns of one of its units.
pub(super) fn columns(value: &Bound<'_, PyAny>, dim: Option<&Bound<'_, PyAny>>) -> PyResult<(Split, u64)> {
    Ok((split(value, "split")?, dim.map_or(Ok(1), |dim| whole(dim, "dim"))?))
}

pub(super) fn tensor(value: &Bound<'_, PyAny>, argument: &str) -> PyResult<Tensor> {
    tensors::one(value, || argument.to_owned())
}

/// The same for a tensor that the call writes.
pub(super) fn tensor_to_write(value: &Bound<'_, PyAny>, argument: &str) -> PyResult<Tensor> {
    let read = tensor(value, argument)?;
    tensors::check_gradient(value, || argument.to_owned())?;
    Ok(read)
}

/// The same, if there is one.
pub(super) fn tensor_or_none_to_write(value: Option<&Bound<'_, PyAny>>, argument: &str) -> PyResult<Tensor> {
    match value {
        Some(value) => tensor_to_write(value, argument),
        None => tensor_or_none(None, argument),
    }
}

pub(super) fn tensor_or_none(value: Option<&Bound<'_, PyAny>>, argument: &str) -> PyResult<Tensor> {
    match value {
        Some(value) => tensor(value, argument),
        None => Ok(Tensor::dense(0, Device::Cpu, comm::DType::U8, 0, 0)),
    }
}

/// Moves and sums tensors between ranks of this process.
#[pyclass(module = "tp_rs", frozen)]
pub(super) struct Communicator {
    inner: Arc<comm::Communicator>,
    streams: Arc<Streams>,
    timeout: f64,
}

impl Communicator {
    fn streams_now(&self, py: Python<'_>) -> PyResult<Vec<Stream>> {
        self.streams.of_all(py, self.inner.devices())
    }
}

#[pymethods]
impl Communicator {
    #[new]
    #[pyo3(signature = (devices, timeout=30.0, *, threads=None, streams=None, peers="proved", pushed_below=None, engines_above=None))]
    #[allow(clippy::too_many_arguments)] // Options by keyword.
    fn new(
        py: Python<'_>,
        devices: &Bound<'_, PyAny>,
        timeout: f64,
        threads: Option<&Bound<'_, PyAny>>,
        streams: Option<&Bound<'_, PyAny>>,
        peers: &str,
        pushed_below: Option<&Bound<'_, PyAny>>,
        engines_above: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let wanted = "a list with one device a rank, such as [\"cpu\", \"cpu\"]";
        let not_a_list = || invalid(py, "devices", devices.get_type(), wanted);
        if devices.is_instance_of::<pyo3::types::PyString>() {
            return Err(not_a_list());
        }
        let mut parsed: Vec<Device> = Vec::new();
        for device in devices.try_iter().map_err(|_| not_a_list())? {
            // A `torch.device` prints itself as its name.
            let name = device?.str()?.to_string();
            parsed.push(name.parse().map_err(|error| to_python(py, &error))?);
        }
        let duration = Duration::try_from_secs_f64(timeout).map_err(|_| {
            invalid(py, "timeout", format!("{timeout} s"), "a finite number of seconds above 0")
        })?;
        let threads = threads.map(|threads| whole(threads, "threads")).transpose()?;
        let threads = threads.map(|threads| usize::try_from(threads).unwrap_or(usize::MAX));
        let peers = match peers {
            "proved" => Peers::Proved,
            "staged" => Peers::Staged,
            "lying" => Peers::Lying,
            "one way" => Peers::OneWay,
            other => {
                return Err(invalid(py, "peers", format!("{other:?}"), "\"proved\" or \"staged\""));
            }
        };
        let bytes = |value: Option<&Bound<'_, PyAny>>, name: &str| -> PyResult<Option<usize>> {
            let bytes = value.map(|bytes| whole(bytes, name)).transpose()?;
            Ok(bytes.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX)))
        };
        let pushed_below = bytes(pushed_below, "pushed_below")?;
        let engines_above = bytes(engines_above, "engines_above")?;
        let own = streams.is_some_and(|streams| streams.extract::<&str>().is_ok_and(|name| name == "own"));
        let streams = if own { Streams::Current } else { Streams::read(streams, parsed.len())? };
        let options = CommOptions {
            timeout: duration,
            threads,
            poll: Some(Arc::new(poll)),
            peers,
            pushed_below,
            engines_above,
        };
        let inner = guarded(py, || comm::Communicator::new(&parsed, &options))?;
        let streams = Arc::new(if own { Streams::Fixed(inner.streams()) } else { streams });
        Ok(Self { inner: Arc::new(inner), streams, timeout })
    }

    /// The device of every rank.
    #[getter]
    fn devices(&self) -> Vec<String> {
        self.inner.devices().iter().map(ToString::to_string).collect()
    }

    /// Seconds that a rank waits for the others.
    #[getter]
    fn timeout(&self) -> f64 {
        self.timeout
    }

    /// Handles of a stream for each rank that belongs to the communicator; 0 on host memory.
    #[getter]
    fn streams(&self) -> Vec<usize> {
        self.inner.streams().into_iter().map(|stream| stream.0).collect()
    }

    /// Waits until the work of all ranks is done, on the streams that calls go to now.
    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        let streams = self.streams_now(py)?;
        released(py, || self.inner.wait(&streams))
    }

    /// The communicator as rank `rank` sees it, for a thread of its own. `baton` is laid down in every call
    /// that waits for others.
    #[pyo3(signature = (rank, *, baton=None))]
    fn rank(&self, rank: &Bound<'_, PyAny>, baton: Option<&Baton>) -> PyResult<RankView> {
        let rank = arguments::rank(rank, "rank", self.inner.devices().len())?;
        Ok(RankView::new(Arc::clone(&self.inner), Arc::clone(&self.streams), rank, baton))
    }

    /// Stops the communicator from any thread and wakes whoever waits.
    #[pyo3(signature = (reason="abort() was called"))]
    fn abort(&self, py: Python<'_>, reason: &str) {
        py.detach(|| self.inner.abort(reason));
    }

    /// Makes a stopped communicator usable again, once every rank is out of its calls.
    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        guarded(py, || self.inner.reset())
    }

    /// Raises `TPError` with the reason once the communicator was stopped.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        released(py, || self.inner.check())
    }

    /// Every tensor becomes the sum of all, in place.
    fn all_reduce(&self, py: Python<'_>, tensors: &Bound<'_, PyAny>) -> PyResult<()> {
        let tensors = tensors::list_to_write(tensors, "tensors")?;
        let views = &tensors.views;
        let streams = self.streams_now(py)?;
        // SAFETY: the tensors are held until the call returns, and it returns when the work is done.
        released(py, || unsafe { self.inner.all_reduce(views, &streams) })
    }

    /// Every target becomes a copy of `source`.
    fn broadcast(
        &self,
        py: Python<'_>,
        source: &Bound<'_, PyAny>,
        targets: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let targets = tensors::list_to_write(targets, "targets")?;
        let (source, views) = (tensor(source, "source")?, &targets.views);
        let streams = self.streams_now(py)?;
        // SAFETY: as for `all_reduce`; the caller's frame holds `source`.
        released(py, || unsafe { self.inner.broadcast(&source, views, &streams) })
    }

    /// Writes the parts side by side to `target`.
    #[pyo3(signature = (parts, split, target, *, dim=None, non_blocking=false))]
    #[allow(clippy::too_many_arguments)] // A gather has that many.
    fn gather(
        &self,
        py: Python<'_>,
        parts: &Bound<'_, PyAny>,
        split: &Bound<'_, PyAny>,
        target: &Bound<'_, PyAny>,
        dim: Option<&Bound<'_, PyAny>>,
        non_blocking: bool,
    ) -> PyResult<()> {
        let parts = tensors::list(parts, "parts")?;
        let (split, dim) = columns(split, dim)?;
        let (target, views) = (tensor_to_write(target, "target")?, &parts.views);
        if non_blocking {
            let streams = self.streams_now(py)?;
            // SAFETY: as for `broadcast`, but the caller has said that it keeps the tensors until the streams are done.
            return released(py, || unsafe {
                self.inner.gather_later(views, &split, dim, &target, &streams)
            });
        }
        let streams = self.streams_now(py)?;
        // SAFETY: as for `broadcast`.
        released(py, || unsafe { self.inner.gather(views, &split, dim, &target, &streams) })
    }

    /// Writes the parts side by side to every target.
    #[pyo3(signature = (parts, split, targets, target_split=None, *, dim=None))]
    fn all_gather(
        &self,
        py: Python<'_>,
        parts: &Bound<'_, PyAny>,
        split: &Bound<'_, PyAny>,
        targets: &Bound<'_, PyAny>,
        target_split: Option<&Bound<'_, PyAny>>,
        dim: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (parts, targets) = (tensors::list(parts, "parts")?, tensors::list_to_write(targets, "targets")?);
        let (split, dim) = columns(split, dim)?;
        let target_split = target_split.map_or_else(
            // Without one, every rank gets the result.
            || Ok(Split::from_counts(&vec![1; self.inner.devices().len()])),
            |target_split| self::split(target_split, "target_split"),
        )?;
        let (inputs, outputs) = (&parts.views, &targets.views);
        let streams = self.streams_now(py)?;
        // SAFETY: as for `all_reduce`.
        released(py, || unsafe {
            self.inner.all_gather(inputs, &split, outputs, &target_split, dim, &streams)
        })
    }

    /// Every output becomes its interval's columns of the sum of all inputs.
    #[pyo3(signature = (inputs, outputs, split, *, dim=None))]
    fn reduce_scatter(
        &self,
        py: Python<'_>,
        inputs: &Bound<'_, PyAny>,
        outputs: &Bound<'_, PyAny>,
        split: &Bound<'_, PyAny>,
        dim: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (inputs, outputs) =
            (tensors::list(inputs, "inputs")?, tensors::list_to_write(outputs, "outputs")?);
        let (split, dim) = columns(split, dim)?;
        let (inputs, outputs) = (&inputs.views, &outputs.views);
        let streams = self.streams_now(py)?;
        // SAFETY: as for `all_reduce`.
        released(py, || unsafe { self.inner.reduce_scatter(inputs, outputs, &split, dim, &streams) })
    }

    /// Adds to every target its interval's columns of the source of the same rank.
    #[pyo3(signature = (targets, sources, split, *, dim=None))]
    fn add_residual(
        &self,
        py: Python<'_>,
        targets: &Bound<'_, PyAny>,
        sources: &Bound<'_, PyAny>,
        split: &Bound<'_, PyAny>,
        dim: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (targets, sources) =
            (tensors::list_to_write(targets, "targets")?, tensors::list(sources, "sources")?);
        let (split, dim) = columns(split, dim)?;
        let (targets, sources) = (&targets.views, &sources.views);
        let streams = self.streams_now(py)?;
        // SAFETY: as for `all_reduce`.
        released(py, || unsafe { self.inner.add_residual(targets, sources, &split, dim, &streams) })
    }

    fn __repr__(&self) -> String {
        format!("Communicator({:?}, timeout={})", self.devices(), self.timeout)
    }
}
