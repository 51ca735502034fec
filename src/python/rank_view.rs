//! `RankView`, and the `Baton` that it lays down while it waits.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::arguments::{number, whole};
use super::communicator::{
    columns, released, tensor, tensor_or_none, tensor_or_none_to_write, tensor_to_write,
};
use super::errors::invalid;
use super::streams::Streams;
use crate::comm::{self, Device, LaidDown, Stream};
use crate::error::Result;

/// Whose turn it is among threads that run Python: the holder's.
#[pyclass(module = "tp_rs._native", frozen)]
pub(super) struct Baton {
    inner: Arc<comm::Baton>,
}

#[pymethods]
impl Baton {
    #[new]
    fn new(threads: &Bound<'_, PyAny>) -> PyResult<Self> {
        let threads = usize::try_from(whole(threads, "threads")?).unwrap_or(usize::MAX);
        Ok(Self { inner: Arc::new(comm::Baton::new(threads)) })
    }

    /// Waits for the baton and takes it.
    fn take(&self, py: Python<'_>) {
        if !self.inner.try_take() {
            py.detach(|| self.inner.take());
        }
    }

    /// Lets the next one take it. Only for who holds it.
    fn lay_down(&self) {
        self.inner.lay_down();
    }

    fn __enter__(&self, py: Python<'_>) {
        self.take(py);
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, _error: &Bound<'_, PyTuple>) {
        self.lay_down();
    }
}

/// A communicator from one rank's point of view. Every rank makes the same calls, from a thread of its own.
#[pyclass(module = "tp_rs", frozen)]
pub(super) struct RankView {
    inner: Arc<comm::Communicator>,
    streams: Arc<Streams>,
    rank: usize,
    baton: Option<Arc<comm::Baton>>,
}

impl RankView {
    /// The view of a rank that there is.
    pub(super) fn new(
        inner: Arc<comm::Communicator>,
        streams: Arc<Streams>,
        rank: usize,
        baton: Option<&Baton>,
    ) -> Self {
        Self { inner, streams, rank, baton: baton.map(|baton| Arc::clone(&baton.inner)) }
    }

    fn stream(&self, py: Python<'_>) -> PyResult<Stream> {
        let device = self.inner.devices().get(self.rank).copied().unwrap_or(Device::Cpu);
        self.streams.of(py, self.rank, device)
    }

    /// At once: the ranks would only find out when all have come, or the others' timeout has passed.
    fn check_root(&self, py: Python<'_>, root: usize) -> PyResult<()> {
        let ranks = self.inner.devices().len();
        if root < ranks {
            return Ok(());
        }
        Err(invalid(py, "root", root, format!("0 to {}", ranks.saturating_sub(1))))
    }

    /// Does `work`, which meets the other ranks, without the interpreter and without the baton.
    fn meet(&self, py: Python<'_>, work: impl FnOnce() -> Result<()> + Send) -> PyResult<()> {
        released(py, || {
            let _laid_down = self.baton.as_deref().map(LaidDown::new);
            work()
        })
    }
}

#[pymethods]
impl RankView {
    /// The rank.
    #[getter]
    fn rank(&self) -> usize {
        self.rank
    }

    /// Its device.
    #[getter]
    fn device(&self) -> String {
        self.inner.devices().get(self.rank).map(ToString::to_string).unwrap_or_default()
    }

    /// Waits until every rank has come.
    fn barrier(&self, py: Python<'_>) -> PyResult<()> {
        let stream = self.stream(py)?;
        self.meet(py, || self.inner.rank_barrier(self.rank, stream))
    }

    /// `tensor` becomes the sum of all ranks' tensors, in place. `None` for a rank without a part.
    #[pyo3(signature = (tensor))]
    fn all_reduce(&self, py: Python<'_>, tensor: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let tensor = tensor_or_none_to_write(tensor, "tensor")?;
        let stream = self.stream(py)?;
        // SAFETY: the caller's frame holds the tensor, and the call returns when the work is done.
        self.meet(py, || unsafe { self.inner.rank_all_reduce(self.rank, &tensor, stream) })
    }

    /// `tensor` becomes the sum of the other ranks' tensors; this rank adds nothing.
    fn receive_sum(&self, py: Python<'_>, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
        let tensor = tensor_to_write(tensor, "tensor")?;
        let stream = self.stream(py)?;
        // SAFETY: as for `all_reduce`.
        self.meet(py, || unsafe { self.inner.rank_receive_sum(self.rank, &tensor, stream) })
    }

    /// `tensor` becomes a copy of the one that rank `root` passes.
    #[pyo3(signature = (tensor, root=0))]
    fn broadcast(
        &self,
        py: Python<'_>,
        tensor: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = number)] root: usize,
    ) -> PyResult<()> {
        self.check_root(py, root)?;
        let given = root == self.rank;
        let tensor = if given { self::tensor(tensor, "tensor") } else { tensor_to_write(tensor, "tensor") }?;
        let stream = self.stream(py)?;
        // SAFETY: as for `all_reduce`.
        self.meet(py, || unsafe { self.inner.rank_broadcast(self.rank, root, &tensor, stream) })
    }

    /// Writes all ranks' parts side by side to the target that rank `root` passes.
    #[pyo3(signature = (part, split, target=None, *, root=0, dim=None))]
    fn gather(
        &self,
        py: Python<'_>,
        part: Option<&Bound<'_, PyAny>>,
        split: &Bound<'_, PyAny>,
        target: Option<&Bound<'_, PyAny>>,
        #[pyo3(from_py_with = number)] root: usize,
        dim: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        self.check_root(py, root)?;
        let part = tensor_or_none(part, "part")?;
        let (split, dim) = columns(split, dim)?;
        let target = target.map(|target| tensor_to_write(target, "target")).transpose()?;
        let stream = self.stream(py)?;
        self.meet(py, || {
            // SAFETY: as for `all_reduce`.
            unsafe { self.inner.rank_gather(self.rank, root, &part, &split, dim, target.as_ref(), stream) }
        })
    }

    /// Writes all ranks' parts side by side to every rank's `target`.
    #[pyo3(signature = (part, split, target, *, dim=None))]
    fn all_gather(
        &self,
        py: Python<'_>,
        part: Option<&Bound<'_, PyAny>>,
        split: &Bound<'_, PyAny>,
        target: Option<&Bound<'_, PyAny>>,
        dim: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (part, target) = (tensor_or_none(part, "part")?, tensor_or_none_to_write(target, "target")?);
        let (split, dim) = columns(split, dim)?;
        let stream = self.stream(py)?;
        // SAFETY: as for `all_reduce`.
        self.meet(py, || unsafe {
            self.inner.rank_all_gather(self.rank, &part, &split, dim, &target, stream)
        })
    }

    /// `target` becomes this rank's columns of the sum of all ranks' sources.
    #[pyo3(signature = (source, target, split, *, dim=None))]
    fn reduce_scatter(
        &self,
        py: Python<'_>,
        source: Option<&Bound<'_, PyAny>>,
        target: Option<&Bound<'_, PyAny>>,
        split: &Bound<'_, PyAny>,
        dim: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (source, target) =
            (tensor_or_none(source, "source")?, tensor_or_none_to_write(target, "target")?);
        let (split, dim) = columns(split, dim)?;
        let stream = self.stream(py)?;
        self.meet(py, || {
            // SAFETY: as for `all_reduce`.
            unsafe { self.inner.rank_reduce_scatter(self.rank, &source, &target, &split, dim, stream) }
        })
    }

    /// Adds to `target` this rank's columns of `source`. Waits for nobody.
    #[pyo3(signature = (target, source, split, *, dim=None))]
    fn add_residual(
        &self,
        py: Python<'_>,
        target: &Bound<'_, PyAny>,
        source: &Bound<'_, PyAny>,
        split: &Bound<'_, PyAny>,
        dim: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (target, source) = (tensor_to_write(target, "target")?, tensor(source, "source")?);
        let (split, dim) = columns(split, dim)?;
        let stream = self.stream(py)?;
        released(py, || {
            // SAFETY: as for `all_reduce`.
            unsafe { self.inner.rank_add_residual(self.rank, &target, &source, &split, dim, stream) }
        })
    }

    fn __repr__(&self) -> String {
        format!("RankView(rank={}, device={:?})", self.rank, self.device())
    }
}
