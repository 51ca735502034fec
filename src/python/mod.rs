//! The Python face's native half, `tp_rs._native`: it converts, checks and calls, and decides nothing.
//!
//! Everything that may take time runs with the interpreter released and behind [`errors::guarded`], which
//! turns the crate's errors, and even a panic, into the exception classes of `tp_rs.errors`.

mod arguments;
mod communicator;
mod dlpack;
mod errors;
mod plan;
mod plan_parts;
mod rank_view;
mod shape;
mod streams;
mod tensors;

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::split::RankBudget;

/// Plan how `shape` is divided over `ranks`.
///
/// A rank is `(device, GiB, speed)`; `speed` is `None` where all ranks count as equally fast.
#[pyfunction]
#[pyo3(name = "plan", signature = (shape, ranks, *, context=None, batch=None, chunk=None, cache="fp16",
    strategy="balanced", splits=None, duplicate_kv=false, experts="inside", attention_footprint=None))]
#[allow(clippy::too_many_arguments)]
fn make_plan(
    py: Python<'_>,
    shape: &shape::ModelShape,
    ranks: Vec<(String, f64, Option<f64>)>,
    context: Option<&Bound<'_, PyAny>>,
    batch: Option<&Bound<'_, PyAny>>,
    chunk: Option<&Bound<'_, PyAny>>,
    cache: &str,
    strategy: &str,
    splits: Option<&Bound<'_, PyDict>>,
    duplicate_kv: bool,
    experts: &str,
    attention_footprint: Option<Vec<u64>>,
) -> PyResult<plan::Plan> {
    let options =
        arguments::options(py, context, batch, chunk, cache, strategy, splits, duplicate_kv, experts)?;
    let options = crate::split::Options { attention_footprint, ..options };
    let budgets: Vec<RankBudget> = arguments::budgets(ranks);
    let inner = errors::guarded(py, || crate::plan(&shape.inner, &budgets, &options))?;
    Ok(plan::Plan { inner })
}

/// Divide `total` units in proportion to `ratios` (`ExLlamaV2`'s `integer_split`).
#[pyfunction]
#[pyo3(signature = (total, ratios, minimum=None))]
fn integer_split(
    py: Python<'_>,
    total: &Bound<'_, PyAny>,
    ratios: &Bound<'_, PyAny>,
    minimum: Option<&Bound<'_, PyAny>>,
) -> PyResult<Vec<u64>> {
    let total = arguments::whole(total, "total")?;
    let ratios = arguments::floats(ratios, "ratios")?;
    let minimum = minimum.map_or(Ok(0), |minimum| arguments::whole(minimum, "minimum"))?;
    errors::guarded(py, || crate::split::integer_split(total, &ratios, minimum))
}

/// The safetensors files that planning reads at `path`, so that loading reads the same.
#[pyfunction]
fn safetensors_files(py: Python<'_>, path: PathBuf) -> PyResult<Vec<PathBuf>> {
    errors::guarded(py, move || crate::model::checkpoint::safetensors_files(&path))
}

/// A CUDA device that the driver shows to this process.
#[pyclass(module = "tp_rs._native", frozen, get_all)]
struct CudaDevice {
    /// Index among the visible devices, in the order of `CUDA_VISIBLE_DEVICES`.
    index: usize,
    /// Name as the driver tells it.
    name: String,
    /// Bytes of memory.
    total_bytes: u64,
    /// Bytes that nobody uses now.
    free_bytes: u64,
    /// Peak memory bandwidth in GB/s, where the driver tells it.
    bandwidth_gb_s: Option<f64>,
}

#[pymethods]
impl CudaDevice {
    fn __repr__(&self) -> String {
        format!(
            "CudaDevice(index={}, name={:?}, free_bytes={}, total_bytes={})",
            self.index, self.name, self.free_bytes, self.total_bytes
        )
    }
}

/// The CUDA devices that the driver shows to this process; empty where there is no driver.
#[pyfunction]
fn cuda_devices(py: Python<'_>) -> PyResult<Vec<CudaDevice>> {
    let devices = errors::guarded(py, crate::device::cuda_devices)?;
    Ok(devices
        .into_iter()
        .map(|device| CudaDevice {
            index: device.index,
            name: device.name,
            total_bytes: device.total_bytes,
            free_bytes: device.free_bytes,
            bandwidth_gb_s: device.bandwidth_gb_s,
        })
        .collect())
}

#[pymodule(name = "_native")]
fn native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(make_plan, module)?)?;
    module.add_function(wrap_pyfunction!(integer_split, module)?)?;
    module.add_function(wrap_pyfunction!(safetensors_files, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_devices, module)?)?;
    module.add_class::<CudaDevice>()?;
    module.add_class::<shape::ModelShape>()?;
    module.add_class::<shape::Tensor>()?;
    module.add_class::<shape::Part>()?;
    module.add_class::<shape::Unsplittable>()?;
    module.add_class::<plan::Plan>()?;
    module.add_class::<plan_parts::PlannedModel>()?;
    module.add_class::<plan_parts::RankPlan>()?;
    module.add_class::<plan_parts::Shortfall>()?;
    module.add_class::<plan_parts::StepTime>()?;
    module.add_class::<rank_view::Baton>()?;
    module.add_class::<communicator::Communicator>()?;
    module.add_class::<rank_view::RankView>()?;
    Ok(())
}
