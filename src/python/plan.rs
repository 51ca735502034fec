//! `Plan` and what it is made of.

use std::collections::BTreeMap;

use pyo3::prelude::*;
use pyo3::types::PyType;

use super::errors::{invalid, to_python};
use super::plan_parts::{PlannedModel, RankPlan, Shortfall, StepTime};
use super::shape::{dumps, loads, to_json};
use crate::error::Error;
use crate::split::{self, PLAN_VERSION};

type Triples = Vec<(usize, u64, u64)>;

fn triples(split: &split::Split) -> Triples {
    split.0.iter().map(|share| (share.rank, share.start, share.end)).collect()
}

/// Who holds what, and what it takes.
#[pyclass(module = "tp_rs", frozen)]
pub(super) struct Plan {
    pub(super) inner: split::Plan,
}

#[pymethods]
impl Plan {
    /// Reads what `to_dict` made.
    #[classmethod]
    fn from_dict(class: &Bound<'_, PyType>, data: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::from_json(class, data.py(), &dumps(data, "plan")?)
    }

    /// Reads what `to_json` wrote.
    #[classmethod]
    fn from_json(_class: &Bound<'_, PyType>, py: Python<'_>, text: &str) -> PyResult<Self> {
        let wanted = "what Plan.to_dict() or Plan.to_json() gave";
        let value: serde_json::Value = serde_json::from_str(text)
            .map_err(|error| invalid(py, "plan", format!("broken JSON: {error}"), wanted))?;
        // Before the fields: a plan of another version may lack or rename any of them.
        let version = value.get("version").and_then(serde_json::Value::as_u64);
        if version != Some(u64::from(PLAN_VERSION)) {
            let got = value.get("version").map_or_else(|| "no version".to_owned(), ToString::to_string);
            let wanted = format!("{PLAN_VERSION}; make the plan again with this version of tp_rs");
            return Err(invalid(py, "plan[\"version\"]", got, wanted));
        }
        let inner: split::Plan =
            serde_json::from_value(value).map_err(|error| invalid(py, "plan", error, wanted))?;
        inner.check().map_err(|problem| invalid(py, "plan", problem, wanted))?;
        Ok(Self { inner })
    }

    /// Everything as JSON text.
    fn to_json(&self, py: Python<'_>) -> PyResult<String> {
        to_json(py, &self.inner)
    }

    /// Everything as plain dicts, lists and numbers.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        loads(py, &self.to_json(py)?)
    }

    /// Raises `DoesNotFit` where a rank would exceed its budget.
    fn require_fit(&self, py: Python<'_>) -> PyResult<()> {
        match &self.inner.shortfall {
            Some(shortfall) if !self.inner.fits => {
                Err(to_python(py, &Error::DoesNotFit(Box::new(shortfall.clone()))))
            }
            _ => Ok(()),
        }
    }

    /// Version of the JSON form.
    #[getter]
    fn version(&self) -> u32 {
        self.inner.version
    }

    /// The model in a few numbers.
    #[getter]
    fn model(&self) -> PlannedModel {
        PlannedModel { inner: self.inner.model.clone() }
    }

    /// `"balanced"` or `"exllamav2"`.
    #[getter]
    fn strategy(&self) -> &'static str {
        self.inner.strategy.name()
    }

    /// Tokens a sequence.
    #[getter]
    fn context(&self) -> u64 {
        self.inner.context
    }

    /// Sequences at once.
    #[getter]
    fn batch(&self) -> u64 {
        self.inner.batch
    }

    /// Tokens of a prompt that are computed at once.
    #[getter]
    fn chunk(&self) -> u64 {
        self.inner.chunk
    }

    /// How keys and values are stored.
    #[getter]
    fn cache(&self) -> &'static str {
        self.inner.cache.name()
    }

    /// Whether every rank stays within its budget.
    #[getter]
    fn fits(&self) -> bool {
        self.inner.fits
    }

    /// Why it does not fit, if it does not.
    #[getter]
    fn shortfall(&self) -> Option<Shortfall> {
        self.inner.shortfall.clone().map(|inner| Shortfall { inner })
    }

    /// The largest context that fits, 0 if none.
    #[getter]
    fn max_context(&self) -> u64 {
        self.inner.max_context
    }

    /// Every rank, those with nothing included.
    #[getter]
    fn ranks(&self) -> Vec<RankPlan> {
        self.inner.ranks.iter().cloned().map(|inner| RankPlan { inner }).collect()
    }

    /// KV heads as (rank, start, end).
    #[getter]
    fn kv_split(&self) -> Triples {
        triples(&self.inner.splits.kv)
    }

    /// Query heads as (rank, start, end).
    #[getter]
    fn q_split(&self) -> Triples {
        triples(&self.inner.splits.q)
    }

    /// Intermediate columns as (rank, start, end).
    #[getter]
    fn id_split(&self) -> Triples {
        triples(&self.inner.splits.id)
    }

    /// Vocabulary rows as (rank, start, end).
    #[getter]
    fn vc_split(&self) -> Triples {
        triples(&self.inner.splits.vc)
    }

    /// Residual columns as (rank, start, end).
    #[getter]
    fn rs_split(&self) -> Triples {
        triples(&self.inner.splits.rs)
    }

    /// Whole experts as (rank, start, end), where they are divided so.
    #[getter]
    fn experts_split(&self) -> Option<Triples> {
        self.inner.splits.experts.as_ref().map(triples)
    }

    /// Columns of MLPs whose width is not that of `id_split`, by width.
    #[getter]
    fn width_splits(&self) -> BTreeMap<u64, Triples> {
        self.inner.splits.widths.iter().map(|(&width, split)| (width, triples(split))).collect()
    }

    /// What a decode step at the full context waits for.
    #[getter]
    fn step_time(&self) -> StepTime {
        StepTime { inner: self.inner.step_time }
    }

    /// Whether the speeds were known; if not they count as equal.
    #[getter]
    fn speeds_known(&self) -> bool {
        self.inner.speeds_known
    }

    /// Bytes of each of the two buffers in host memory that gathered tensors go to.
    #[getter]
    fn buffer_bytes(&self) -> u64 {
        self.inner.buffer_bytes
    }

    /// Bytes of pinned host memory: both buffers, and what ranks stage messages through.
    #[getter]
    fn pinned_bytes(&self) -> u64 {
        self.inner.pinned_bytes
    }

    /// What a reader should know.
    #[getter]
    fn notes(&self) -> Vec<String> {
        self.inner.notes.clone()
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().inner == self.inner)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (String,))> {
        Ok((py.get_type::<Self>().getattr("from_json")?, (self.to_json(py)?,)))
    }

    fn __repr__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("tp_rs.render")?.call_method1("plain", (slf,))
    }
}
