//! From Python tensors to the communicator's views of memory.

use std::borrow::Cow;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyString, PyTuple};

use super::dlpack::{self, CUDA, DlTensor};
use super::errors::invalid;
use crate::comm::{DType, Device, Tensor};

const CPU: i32 = 1;
const CUDA_HOST: i32 = 3;

/// Tensors of a call and the views of them. The tensors are held: another thread may drop the last reference
/// to one while the interpreter is released.
pub(super) struct Tensors<'py> {
    pub(super) views: Vec<Tensor>,
    owners: Vec<Bound<'py, PyAny>>,
}

/// Reads a list of tensors. `None` in it stands for a tensor without elements.
pub(super) fn list<'py>(tensors: &Bound<'py, PyAny>, argument: &str) -> PyResult<Tensors<'py>> {
    let owners: Vec<Bound<'py, PyAny>> = if let Ok(list) = tensors.cast::<PyList>() {
        list.iter().collect()
    } else if let Ok(tuple) = tensors.cast::<PyTuple>() {
        tuple.iter().collect()
    } else {
        let got = format!("a {}", name_of_type(tensors));
        return Err(invalid(tensors.py(), argument, got, "a list of tensors"));
    };
    let read = |(index, tensor)| one_or_none(tensor, || format!("{argument}[{index}]"));
    let views = owners.iter().enumerate().map(read).collect::<PyResult<_>>()?;
    Ok(Tensors { views, owners })
}

/// The same for tensors that the call writes.
pub(super) fn list_to_write<'py>(tensors: &Bound<'py, PyAny>, argument: &str) -> PyResult<Tensors<'py>> {
    let read = list(tensors, argument)?;
    for (index, tensor) in read.owners.iter().enumerate() {
        check_gradient(tensor, || format!("{argument}[{index}]"))?;
    }
    Ok(read)
}

/// Refuses to write what gradients are recorded for: torch would not know of it, and derive from values that are
/// gone. Its own in-place operations raise too, or record themselves.
pub(super) fn check_gradient(tensor: &Bound<'_, PyAny>, argument: impl Fn() -> String) -> PyResult<()> {
    let py = tensor.py();
    let asks = tensor.getattr_opt(intern!(py, "requires_grad"))?;
    let recorded = asks.is_some_and(|asks| asks.is_truthy().unwrap_or(false))
        && py.import("torch")?.call_method0("is_grad_enabled")?.is_truthy()?;
    if recorded {
        let wanted = "one that does not, or the call under torch.no_grad(): torch would not see it change";
        return Err(invalid(py, argument(), "a tensor to write that requires grad".to_owned(), wanted));
    }
    Ok(())
}

/// Reads a tensor; `None` is one without elements.
pub(super) fn one_or_none(tensor: &Bound<'_, PyAny>, argument: impl Fn() -> String) -> PyResult<Tensor> {
    if tensor.is_none() {
        return Ok(Tensor::dense(0, Device::Cpu, DType::U8, 0, 0));
    }
    one(tensor, argument)
}

/// Reads a tensor as rows of adjacent elements.
///
/// # Errors
/// `InvalidInput` for what is no tensor, has no memory of its own to read (meta, fake, sparse), has a type that
/// the communicator does not know, or elements that do not lie side by side.
pub(super) fn one(tensor: &Bound<'_, PyAny>, argument: impl Fn() -> String) -> PyResult<Tensor> {
    let refused = |got: String, wanted: &str| invalid(tensor.py(), argument(), got, wanted);
    let view = dlpack::view(tensor);
    let described = match &view {
        Ok(Some(view)) => from_view(view),
        Ok(None) => from_attributes(tensor),
        // The reason is in C++ words and may hold a whole stack; what the tensor is says more.
        Err(_) => None,
    };
    let Some(described) = described else {
        return Err(refused(shown(tensor), "a strided torch tensor in host or GPU memory"));
    };
    let Some(dtype) = described.dtype else {
        let names: Vec<_> = DType::ALL.iter().map(|dtype| dtype.name()).collect();
        return Err(refused(shown(tensor), &format!("a tensor of {}", names.join(", "))));
    };
    let Some(device) = described.device else {
        return Err(refused(shown(tensor), "a tensor on \"cpu\" or \"cuda:N\""));
    };
    let Some(rows) = Rows::of(&described.shape, &described.strides) else {
        // Before `shown`, which runs Python: shape and strides may be gone after that.
        let strides = format!("{:?}", described.strides);
        let got = format!("{} with strides {strides}", shown(tensor));
        return Err(refused(got, "rows of adjacent elements at even distances: make the tensor contiguous"));
    };
    if rows.count > 0 && rows.columns > 0 {
        if described.data == 0 {
            return Err(refused(shown(tensor), "a tensor that has memory: this one is fake or a wrapper"));
        }
        // The sign is a flag of the view, which no address tells. Views with that flag come from complex
        // tensors' parts, which are never dense.
        if (!rows.dense || rows.count * rows.columns == 1) && is_negative_view(tensor) {
            let wanted = "its values in memory: call resolve_neg() on it";
            return Err(refused(format!("a negative view, {}", shown(tensor)), wanted));
        }
    }
    Ok(Tensor {
        data: described.data,
        device,
        dtype,
        rows: rows.count,
        columns: rows.columns,
        row_stride: rows.stride,
    })
}

/// Borrowed where the tensor's own memory can be read: a list call reads every tensor anew, and small messages take
/// no longer than a few allocations.
struct Described<'a> {
    data: usize,
    device: Option<Device>,
    dtype: Option<DType>,
    shape: Cow<'a, [i64]>,
    strides: Cow<'a, [i64]>,
}

fn from_view(view: &DlTensor) -> Option<Described<'_>> {
    let dimensions = usize::try_from(view.dimensions).ok()?;
    let numbers = |pointer: *const i64| -> Option<Cow<'_, [i64]>> {
        if dimensions == 0 {
            return Some(Cow::Borrowed(&[]));
        }
        if pointer.is_null() {
            return None;
        }
        // SAFETY: by the header, shape and strides have one number a dimension. They stay until the tensor changes,
        // for which Python would have to run, and `one` is done with them before it does.
        Some(Cow::Borrowed(unsafe { std::slice::from_raw_parts(pointer, dimensions) }))
    };
    let shape = numbers(view.shape)?;
    let strides =
        if view.strides.is_null() { Cow::Owned(dense_strides(&shape)?) } else { numbers(view.strides)? };
    let device = match view.device.kind {
        CPU | CUDA_HOST => Some(Device::Cpu),
        CUDA => u32::try_from(view.device.index).ok().map(Device::Cuda),
        _ => None,
    };
    let dtype = match (view.dtype.code, view.dtype.bits, view.dtype.lanes) {
        (0, 8, 1) => Some(DType::I8),
        (0, 32, 1) => Some(DType::I32),
        (0, 64, 1) => Some(DType::I64),
        (1, 8, 1) => Some(DType::U8),
        (2, 16, 1) => Some(DType::F16),
        (2, 32, 1) => Some(DType::F32),
        (2, 64, 1) => Some(DType::F64),
        (4, 16, 1) => Some(DType::BF16),
        (6, 8, 1) => Some(DType::Bool),
        (10, 8, 1) => Some(DType::F8E4M3),
        (12, 8, 1) => Some(DType::F8E5M2),
        _ => None,
    };
    let data = view.data.expose_provenance();
    let data = if data == 0 { 0 } else { data.checked_add(usize::try_from(view.byte_offset).ok()?)? };
    Some(Described { data, device, dtype, shape, strides })
}

fn from_attributes(tensor: &Bound<'_, PyAny>) -> Option<Described<'static>> {
    let py = tensor.py();
    let get = |name| tensor.getattr(name).ok();
    let layout = get(intern!(py, "layout"))?.str().ok()?;
    if layout != "torch.strided" {
        return None;
    }
    let place = get(intern!(py, "device"))?;
    let kind: String = place.getattr(intern!(py, "type")).ok()?.extract().ok()?;
    let device = match kind.as_str() {
        "cpu" => Some(Device::Cpu),
        "cuda" => Some(Device::Cuda(place.getattr(intern!(py, "index")).ok()?.extract().ok()?)),
        "meta" => return None,
        _ => None,
    };
    let dtype = get(intern!(py, "dtype"))?.str().ok()?.to_string();
    let dtype = dtype.strip_prefix("torch.").and_then(DType::from_name);
    let shape = Cow::Owned(get(intern!(py, "shape"))?.extract().ok()?);
    let strides = Cow::Owned(tensor.call_method0(intern!(py, "stride")).ok()?.extract().ok()?);
    let data = tensor.call_method0(intern!(py, "data_ptr")).ok()?.extract().ok()?;
    Some(Described { data, device, dtype, shape, strides })
}

fn dense_strides(shape: &[i64]) -> Option<Vec<i64>> {
    let mut strides = vec![1; shape.len()];
    let mut step = 1_i64;
    for (stride, size) in strides.iter_mut().zip(shape).rev() {
        *stride = step;
        step = step.checked_mul((*size).max(1))?;
    }
    Some(strides)
}

/// All dimensions but the last as rows.
struct Rows {
    count: usize,
    columns: usize,
    stride: usize,
    dense: bool,
}

impl Rows {
    /// `None` where elements of a row are not side by side, or rows are not evenly apart.
    fn of(shape: &[i64], strides: &[i64]) -> Option<Self> {
        if shape.len() != strides.len() {
            return None;
        }
        let count = shape.iter().try_fold(1_i64, |count, size| count.checked_mul(*size))?;
        let (Some((columns, outer)), Some((step, outer_strides))) =
            (shape.split_last(), strides.split_last())
        else {
            return Some(Self { count: 1, columns: 1, stride: 1, dense: true });
        };
        let columns_count = usize::try_from(*columns).ok()?;
        if count == 0 {
            let rows: i64 = outer.iter().try_fold(1_i64, |rows, size| rows.checked_mul(*size))?;
            let rows = usize::try_from(rows).ok()?;
            return Some(Self { count: rows, columns: columns_count, stride: columns_count, dense: true });
        }
        if *columns > 1 && *step != 1 {
            return None;
        }
        // From the innermost of the rows' dimensions outwards, each has to go on where the one inside ends.
        let (mut rows, mut stride) = (1_i64, None);
        for (size, step) in outer.iter().zip(outer_strides).rev().filter(|(size, _)| **size > 1) {
            match stride {
                None => stride = Some(*step),
                Some(inner) if rows.checked_mul(inner) == Some(*step) => {}
                Some(_) => return None,
            }
            rows = rows.checked_mul(*size)?;
        }
        let stride = usize::try_from(stride.unwrap_or(*columns)).ok()?;
        let rows = usize::try_from(rows).ok()?;
        let dense = rows == 1 || stride == columns_count;
        Some(Self { count: rows, columns: columns_count, stride, dense })
    }
}

fn is_negative_view(tensor: &Bound<'_, PyAny>) -> bool {
    let answer = tensor.call_method0(intern!(tensor.py(), "is_neg"));
    answer.and_then(|answer| answer.extract()).unwrap_or(false)
}

fn name_of_type(value: &Bound<'_, PyAny>) -> String {
    value.get_type().name().map_or_else(|_| "value".to_owned(), |name| name.to_string())
}

/// What a value is, for a message. Never its elements.
fn shown(value: &Bound<'_, PyAny>) -> String {
    let text = |name: &str| {
        let attribute = value.getattr(name).ok()?;
        let text: Bound<'_, PyString> = attribute.str().ok()?;
        Some(text.to_string())
    };
    let mut words = vec![format!("a {}", name_of_type(value))];
    if let Some(dtype) = text("dtype") {
        words.push(format!("of {}", dtype.trim_start_matches("torch.")));
    }
    if let Ok(shape) = value.getattr("shape").and_then(|shape| shape.extract::<Vec<i64>>()) {
        words.push(format!("{shape:?}"));
    }
    if let Some(device) = text("device") {
        words.push(format!("on {device}"));
    }
    if let Some(layout) = text("layout").filter(|layout| layout != "torch.strided") {
        words.push(format!("with layout {layout}"));
    }
    words.join(" ")
}
