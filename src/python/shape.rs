//! `ModelShape` and what it is made of.

use std::path::PathBuf;

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyType};
use serde::Serialize;
use serde_json::{Map, Value};

use super::errors::{guarded, invalid};
use crate::model;

/// The name that serde gives a value without fields.
pub(super) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(text)) => text,
        Ok(Value::Object(fields)) => fields.keys().next().cloned().unwrap_or_default(),
        _ => String::new(),
    }
}

/// JSON text as Python objects.
pub(super) fn loads<'py>(py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyAny>> {
    py.import("json")?.call_method1("loads", (text,))
}

/// Python objects as JSON. What JSON has no word for (a `torch.dtype`) is written as its `str`.
pub(super) fn dumps(value: &Bound<'_, PyAny>, argument: &str) -> PyResult<String> {
    let py = value.py();
    let keywords = PyDict::new(py);
    keywords.set_item("default", py.get_type::<pyo3::types::PyString>())?;
    keywords.set_item("allow_nan", false)?;
    match py.import("json")?.call_method("dumps", (value,), Some(&keywords)).and_then(|text| text.extract()) {
        Err(error) if error.is_instance_of::<PyException>(py) => {
            let got = format!("what cannot be written as JSON ({})", error.value(py));
            Err(invalid(py, argument, got, "dicts, lists, text, finite numbers, True, False and None"))
        }
        outcome => outcome,
    }
}

fn parse(py: Python<'_>, text: &str, argument: &str) -> PyResult<Value> {
    serde_json::from_str(text)
        .map_err(|error| invalid(py, argument, format!("broken JSON: {error}"), "a JSON object"))
}

/// What a split must know of a model: dimensions and the exact bytes of every tensor, never weights.
#[pyclass(module = "tp_rs", frozen)]
pub(super) struct ModelShape {
    pub(super) inner: model::ModelShape,
}

#[pymethods]
impl ModelShape {
    /// Reads a checkpoint's headers: a folder, a GGUF file, a safetensors file or a `config.json`.
    #[classmethod]
    fn from_path(_class: &Bound<'_, PyType>, py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        guarded(py, move || model::ModelShape::open(path)).map(|inner| Self { inner })
    }

    /// Takes the dimensions of a transformers configuration.
    #[classmethod]
    #[pyo3(signature = (config, name="config"))]
    fn from_config(class: &Bound<'_, PyType>, config: &Bound<'_, PyDict>, name: &str) -> PyResult<Self> {
        Self::from_config_json(class, config.py(), &dumps(config, "config")?, name)
    }

    /// The same from the text of a `config.json`.
    #[classmethod]
    #[pyo3(signature = (text, name="config"))]
    fn from_config_json(
        _class: &Bound<'_, PyType>,
        py: Python<'_>,
        text: &str,
        name: &str,
    ) -> PyResult<Self> {
        let config = parse(py, text, "config")?;
        guarded(py, || model::ModelShape::from_config(&config, name)).map(|inner| Self { inner })
    }

    /// Takes the attributes of an ExLlamaV2-like configuration object.
    #[classmethod]
    #[pyo3(signature = (attributes, name="exllamav2"))]
    fn from_exllamav2(
        _class: &Bound<'_, PyType>,
        attributes: &Bound<'_, PyDict>,
        name: &str,
    ) -> PyResult<Self> {
        let py = attributes.py();
        let attributes = parse(py, &dumps(attributes, "model")?, "model")?;
        guarded(py, || model::ModelShape::from_exllamav2(&attributes, name)).map(|inner| Self { inner })
    }

    /// Reads what `to_json` wrote.
    #[classmethod]
    fn from_json(_class: &Bound<'_, PyType>, py: Python<'_>, text: &str) -> PyResult<Self> {
        serde_json::from_str(text).map(|inner| Self { inner }).map_err(|error| {
            invalid(py, "shape", format!("broken JSON: {error}"), "what ModelShape.to_json() wrote")
        })
    }

    /// The same model with every weight a plain element of this type, as a loader holds it that decodes
    /// quantised weights or converts floats.
    fn held_as(&self, py: Python<'_>, dtype: &str) -> PyResult<Self> {
        guarded(py, || self.inner.held_as(dtype.parse()?)).map(|inner| Self { inner })
    }

    /// Everything as JSON text.
    fn to_json(&self, py: Python<'_>) -> PyResult<String> {
        to_json(py, &self.inner)
    }

    /// Path or name.
    #[getter]
    fn name(&self) -> &str {
        &self.inner.name
    }

    /// What was read: `"config"`, `"safetensors"`, `"gguf"` or `"exllamav2"`.
    #[getter]
    fn source(&self) -> &'static str {
        match self.inner.source {
            model::Source::Config => "config",
            model::Source::Safetensors => "safetensors",
            model::Source::Gguf => "gguf",
            model::Source::ExLlamaV2 => "exllamav2",
        }
    }

    /// `model_type` of a configuration or `general.architecture` of a GGUF file.
    #[getter]
    fn architecture(&self) -> &str {
        &self.inner.dimensions.architecture
    }

    /// Columns of the residual stream.
    #[getter]
    fn hidden_size(&self) -> u64 {
        self.inner.dimensions.hidden
    }

    /// Vocabulary rows.
    #[getter]
    fn vocab_size(&self) -> u64 {
        self.inner.dimensions.vocabulary
    }

    /// Query heads.
    #[getter]
    fn num_attention_heads(&self) -> u64 {
        self.inner.dimensions.query_heads
    }

    /// KV heads.
    #[getter]
    fn num_key_value_heads(&self) -> u64 {
        self.inner.dimensions.kv_heads
    }

    /// Elements of a head.
    #[getter]
    fn head_dim(&self) -> u64 {
        self.inner.dimensions.head_dim
    }

    /// Columns of the MLPs that the `id` split divides.
    #[getter]
    fn intermediate_size(&self) -> u64 {
        self.inner.dimensions.intermediate
    }

    /// Layers.
    #[getter]
    fn num_hidden_layers(&self) -> usize {
        self.inner.dimensions.layers.len()
    }

    /// Positions that the model was made for.
    #[getter]
    fn max_position_embeddings(&self) -> Option<u64> {
        self.inner.dimensions.max_positions
    }

    /// Whether the output head is the embedding.
    #[getter]
    fn tie_word_embeddings(&self) -> bool {
        self.inner.dimensions.tied_embeddings
    }

    /// How positions are rotated, as the fields of a `config.json` say it, where that is known.
    #[getter]
    fn rotary<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        fields(py, self.inner.dimensions.rotary.as_ref())
    }

    /// Bytes of all tensors, each once.
    #[getter]
    fn total_bytes(&self) -> u128 {
        self.inner.tensors.iter().map(|tensor| u128::from(tensor.bytes)).sum()
    }

    /// Every tensor, with its role and how it may be cut.
    #[getter]
    fn tensors(&self) -> Vec<Tensor> {
        self.inner.tensors.iter().cloned().map(|inner| Tensor { inner }).collect()
    }

    /// What cannot be split, with reasons.
    #[getter]
    fn unsplittable(&self) -> Vec<Unsplittable> {
        let entry = |entry: &model::Unsplittable| Unsplittable {
            what: entry.what.clone(),
            reason: entry.reason.clone(),
            bytes: entry.bytes,
        };
        self.inner.unsplittable.iter().map(entry).collect()
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().inner == self.inner)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (String,))> {
        Ok((py.get_type::<Self>().getattr("from_json")?, (self.to_json(py)?,)))
    }

    fn __repr__(&self) -> String {
        format!(
            "ModelShape({:?}, {}, {} layers, {} query and {} KV heads of {}, hidden {}, intermediate {}, \
             vocabulary {}, {} tensors, {} bytes)",
            self.inner.name,
            self.inner.dimensions.architecture,
            self.num_hidden_layers(),
            self.inner.dimensions.query_heads,
            self.inner.dimensions.kv_heads,
            self.inner.dimensions.head_dim,
            self.inner.dimensions.hidden,
            self.inner.dimensions.intermediate,
            self.inner.dimensions.vocabulary,
            self.inner.tensors.len(),
            self.total_bytes(),
        )
    }
}

/// A JSON object as a dict.
pub(super) fn fields<'py>(
    py: Python<'py>,
    fields: Option<&Map<String, Value>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    fields.map(|fields| loads(py, &to_json(py, fields)?)).transpose()
}

pub(super) fn to_json<T: Serialize>(py: Python<'_>, value: &T) -> PyResult<String> {
    serde_json::to_string(value).map_err(|error| invalid(py, "to_json", error, "finite numbers"))
}

/// A tensor of the checkpoint.
#[pyclass(module = "tp_rs._native", frozen)]
pub(super) struct Tensor {
    inner: model::Tensor,
}

#[pymethods]
impl Tensor {
    /// Name as the checkpoint writes it.
    #[getter]
    fn name(&self) -> &str {
        &self.inner.name
    }

    /// Element type as the checkpoint writes it.
    #[getter]
    fn dtype(&self) -> &str {
        &self.inner.dtype
    }

    /// Shape, outermost dimension first.
    #[getter]
    fn shape(&self) -> Vec<u64> {
        self.inner.shape.clone()
    }

    /// Bytes of the whole tensor.
    #[getter]
    fn bytes(&self) -> u64 {
        self.inner.bytes
    }

    /// What it does: `"attention_in"`, `"mlp_out"`, `"embedding"`, `"replicated"`, ...
    #[getter]
    fn role(&self) -> String {
        word(&self.inner.role)
    }

    /// How its bytes follow the splits.
    #[getter]
    fn parts(&self) -> Vec<Part> {
        self.inner.parts.iter().map(Part::of).collect()
    }

    /// Why it is held whole, where one might have expected a cut.
    #[getter]
    fn reason(&self) -> Option<&str> {
        self.inner.reason.as_deref()
    }

    fn __repr__(&self) -> String {
        format!(
            "Tensor({:?}, {}, {:?}, {} bytes, {})",
            self.inner.name,
            self.inner.dtype,
            self.inner.shape,
            self.inner.bytes,
            self.role()
        )
    }
}

/// A part of a tensor's bytes and what it follows.
#[pyclass(module = "tp_rs._native", frozen, get_all)]
pub(super) struct Part {
    /// What the bytes are proportional to: `"query_heads"`, `"kv_heads"`, `"intermediate"`, `"experts"`,
    /// `"vocabulary"`, `"whole_with_attention"` or `"whole"`.
    along: String,
    /// Columns of the MLP or of one expert.
    width: Option<u64>,
    /// Experts.
    count: Option<u64>,
    /// Bytes of the whole part.
    bytes: u64,
    /// The cut must fall on a multiple of this many elements.
    grid: u64,
}

impl Part {
    fn of(part: &model::Part) -> Self {
        let (width, count) = match part.along {
            model::CutAlong::Intermediate { width } => (Some(width), None),
            model::CutAlong::Experts { count, width } => (Some(width), Some(count)),
            _ => (None, None),
        };
        Self { along: word(&part.along), width, count, bytes: part.bytes, grid: part.grid }
    }
}

#[pymethods]
impl Part {
    fn __repr__(&self) -> String {
        format!("Part({}, {} bytes, cut in {}s)", self.along, self.bytes, self.grid)
    }
}

/// Something that cannot be split, with the reason.
#[pyclass(module = "tp_rs._native", frozen, get_all)]
pub(super) struct Unsplittable {
    /// What: a tensor, a layer or a part of the model.
    what: String,
    /// Why.
    reason: String,
    /// Bytes that every rank holds for it.
    bytes: u64,
}

#[pymethods]
impl Unsplittable {
    fn __repr__(&self) -> String {
        format!("Unsplittable({:?}, {:?}, {} bytes)", self.what, self.reason, self.bytes)
    }
}
