//! What a `Plan` is made of: the model in numbers, ranks, times, shortfalls.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyType};

use super::errors::{guarded, invalid};
use super::shape::{fields, to_json, word};
use crate::split;

/// The model that a plan is for, in a few numbers.
#[pyclass(module = "tp_rs._native", frozen)]
pub(super) struct PlannedModel {
    pub(super) inner: split::PlannedModel,
}

#[pymethods]
impl PlannedModel {
    /// Path or name.
    #[getter]
    fn name(&self) -> &str {
        &self.inner.name
    }

    /// `model_type` or GGUF architecture.
    #[getter]
    fn architecture(&self) -> &str {
        &self.inner.architecture
    }

    /// Layers.
    #[getter]
    fn layers(&self) -> u64 {
        self.inner.layers
    }

    /// Query heads.
    #[getter]
    fn query_heads(&self) -> u64 {
        self.inner.query_heads
    }

    /// KV heads.
    #[getter]
    fn kv_heads(&self) -> u64 {
        self.inner.kv_heads
    }

    /// Elements of a head.
    #[getter]
    fn head_dim(&self) -> u64 {
        self.inner.head_dim
    }

    /// Columns of the residual stream.
    #[getter]
    fn hidden(&self) -> u64 {
        self.inner.hidden
    }

    /// Intermediate columns.
    #[getter]
    fn intermediate(&self) -> u64 {
        self.inner.intermediate
    }

    /// Vocabulary rows.
    #[getter]
    fn vocabulary(&self) -> u64 {
        self.inner.vocabulary
    }

    /// Bytes of all weights, each tensor once.
    #[getter]
    fn weight_bytes(&self) -> u64 {
        self.inner.weight_bytes
    }

    /// How positions are rotated, as the fields of a `config.json` say it, where that is known.
    #[getter]
    fn rotary<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        fields(py, self.inner.rotary.as_ref())
    }

    fn __repr__(&self) -> String {
        format!(
            "PlannedModel({:?}, {}, {} layers, {} bytes)",
            self.inner.name, self.inner.architecture, self.inner.layers, self.inner.weight_bytes
        )
    }
}

/// What a decode step waits for: bytes read over the slowest rank's speed, at each sum over the ranks.
///
/// Nanoseconds where speeds are in GB/s.
#[pyclass(module = "tp_rs._native", frozen)]
pub(super) struct StepTime {
    pub(super) inner: split::StepTime,
}

#[pymethods]
impl StepTime {
    /// Attention weights and cache.
    #[getter]
    fn attention(&self) -> f64 {
        self.inner.attention
    }

    /// MLP and experts.
    #[getter]
    fn mlp(&self) -> f64 {
        self.inner.mlp
    }

    /// Output head.
    #[getter]
    fn head(&self) -> f64 {
        self.inner.head
    }

    /// All three.
    #[getter]
    fn total(&self) -> f64 {
        self.inner.total()
    }

    fn __repr__(&self) -> String {
        let split::StepTime { attention, mlp, head } = self.inner;
        format!("StepTime(attention={attention}, mlp={mlp}, head={head})")
    }
}

/// One rank of a plan.
#[pyclass(module = "tp_rs._native", frozen)]
pub(super) struct RankPlan {
    pub(super) inner: split::RankPlan,
}

#[pymethods]
impl RankPlan {
    /// The rank.
    #[getter]
    fn rank(&self) -> usize {
        self.inner.rank
    }

    /// Its device.
    #[getter]
    fn device(&self) -> &str {
        &self.inner.device
    }

    /// Bytes that it may use.
    #[getter]
    fn budget(&self) -> u64 {
        self.inner.budget
    }

    /// Relative speed.
    #[getter]
    fn speed(&self) -> f64 {
        self.inner.speed
    }

    /// Bytes by item, in the order of the tables; items of 0 bytes are left out.
    #[getter]
    fn items<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let items = PyDict::new(py);
        for (item, bytes) in &self.inner.items {
            items.set_item(word(item), bytes)?;
        }
        Ok(items)
    }

    /// Bytes in all.
    #[getter]
    fn total(&self) -> u64 {
        self.inner.total
    }

    /// Bytes left of the budget; negative where it is exceeded.
    #[getter]
    fn free(&self) -> i128 {
        i128::from(self.inner.budget) - i128::from(self.inner.total)
    }

    /// Bytes of weights and cache that one decode step reads at the full context.
    #[getter]
    fn read_per_token(&self) -> u64 {
        self.inner.read_per_token
    }

    fn __repr__(&self) -> String {
        format!(
            "RankPlan({}, {:?}, {} of {} bytes)",
            self.inner.rank, self.inner.device, self.inner.total, self.inner.budget
        )
    }
}

/// Why a plan does not fit.
#[pyclass(module = "tp_rs._native", frozen)]
pub(super) struct Shortfall {
    pub(super) inner: split::Shortfall,
}

#[pymethods]
impl Shortfall {
    #[classmethod]
    fn _from_json(_class: &Bound<'_, PyType>, py: Python<'_>, text: &str) -> PyResult<Self> {
        serde_json::from_str(text)
            .map(|inner| Self { inner })
            .map_err(|error| invalid(py, "shortfall", error, "a pickled Shortfall"))
    }

    /// The rank that misses the most.
    #[getter]
    fn rank(&self) -> usize {
        self.inner.rank
    }

    /// Its device.
    #[getter]
    fn device(&self) -> &str {
        &self.inner.device
    }

    /// Bytes that it misses.
    #[getter]
    fn missing_bytes(&self) -> u64 {
        self.inner.missing
    }

    /// Bytes that all ranks together miss.
    #[getter]
    fn missing_total_bytes(&self) -> u64 {
        self.inner.missing_total
    }

    /// The item that could give way.
    #[getter]
    fn item(&self) -> String {
        word(&self.inner.item)
    }

    /// What to do, with numbers.
    #[getter]
    fn advice(&self) -> &str {
        &self.inner.advice
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().inner == self.inner)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (String,))> {
        Ok((py.get_type::<Self>().getattr("_from_json")?, (to_json(py, &self.inner)?,)))
    }

    fn __str__(&self, py: Python<'_>) -> PyResult<String> {
        guarded(py, || Ok(self.inner.to_string()))
    }

    fn __repr__(&self) -> String {
        format!(
            "Shortfall(rank={}, device={:?}, missing_bytes={}, item={:?})",
            self.inner.rank,
            self.inner.device,
            self.inner.missing,
            self.item()
        )
    }
}
