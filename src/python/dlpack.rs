//! `DLPack`'s exchange API in C: what a tensor is, in one call and without a Python object in between.
//!
//! Layouts and the meaning of the fields are those of `dlpack.h`, version 1.3. Tensor types offer the functions
//! as a capsule in the attribute `__dlpack_c_exchange_api__`, as torch does from version 2.10 on.

use std::ffi::{c_int, c_void};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyType};

/// The header's version that the layouts below are of. Minor versions only add behind them.
const MAJOR: u32 = 1;
/// `kDLCUDA`.
pub(super) const CUDA: i32 = 2;
const CAPSULE: &std::ffi::CStr = c"dlpack_exchange_api";
/// Types that are remembered. Programs have a handful; one that makes types on the fly must not fill memory.
const REMEMBERED: usize = 32;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct DlDataType {
    pub(super) code: u8,
    pub(super) bits: u8,
    pub(super) lanes: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct DlDevice {
    pub(super) kind: i32,
    pub(super) index: i32,
}

/// `DLTensor`. Shape and strides belong to the tensor that it was taken from.
#[repr(C)]
pub(super) struct DlTensor {
    pub(super) data: *mut c_void,
    pub(super) device: DlDevice,
    pub(super) dimensions: i32,
    pub(super) dtype: DlDataType,
    pub(super) shape: *const i64,
    pub(super) strides: *const i64,
    pub(super) byte_offset: u64,
}

type FromObject = unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> c_int;

type CurrentWorkStream = unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int;

/// What a type offers.
#[derive(Clone, Copy)]
struct Functions {
    view: FromObject,
    stream: Option<CurrentWorkStream>,
}

#[repr(C)]
struct ExchangeApi {
    major: u32,
    minor: u32,
    previous: *const ExchangeApi,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_object: *const c_void,
    managed_tensor_to_object: *const c_void,
    tensor_from_object: Option<FromObject>,
    current_work_stream: Option<CurrentWorkStream>,
}

/// A type that was asked, and its function if it has one. The type is held, so its address stays its own.
struct Remembered {
    class: Py<PyType>,
    functions: Option<Functions>,
}

static REMEMBER: Mutex<Vec<Remembered>> = Mutex::new(Vec::new());

/// What `tensor` is, or `None` where its type does not offer this way.
///
/// The view holds as long as the tensor is alive and its metadata is not changed, which is certain only until
/// Python code runs again.
///
/// # Errors
/// The exception with which the type refuses: it is not an ordinary strided tensor.
pub(super) fn view(tensor: &Bound<'_, PyAny>) -> PyResult<Option<DlTensor>> {
    let Some(Functions { view: function, .. }) = functions_of(&tensor.get_type()) else { return Ok(None) };
    let mut view = std::mem::MaybeUninit::<DlTensor>::zeroed();
    // SAFETY: the function is the one that the tensor's own type gives for its instances; the object is alive and
    // this thread is attached to the interpreter.
    let status = unsafe { function(tensor.as_ptr().cast(), view.as_mut_ptr()) };
    if status != 0 {
        return Err(PyErr::fetch(tensor.py()));
    }
    // SAFETY: the function reported success, so it has filled the view in; all zeros are valid for it besides.
    Ok(Some(unsafe { view.assume_init() }))
}

/// The stream on which this thread's work for a CUDA device goes, by the types of tensors seen so far; `None` where
/// none of them says it.
///
/// # Errors
/// The exception with which the tensor library refuses, as where it has no such device.
pub(super) fn current_stream(py: Python<'_>, device: u32) -> PyResult<Option<usize>> {
    let functions = {
        let remember = REMEMBER.lock().unwrap_or_else(PoisonError::into_inner);
        remember.iter().find_map(|it| it.functions.and_then(|functions| functions.stream))
    };
    let Some(function) = functions else { return Ok(None) };
    let mut stream = std::ptr::null_mut();
    let device = i32::try_from(device).unwrap_or(i32::MAX);
    // SAFETY: the function is one that a tensor type gives for this; `stream` is a valid place for a handle, and this
    // thread is attached to the interpreter.
    let status = unsafe { function(CUDA, device, &raw mut stream) };
    if status != 0 {
        return Err(PyErr::fetch(py));
    }
    Ok(Some(stream.expose_provenance()))
}

fn functions_of(class: &Bound<'_, PyType>) -> Option<Functions> {
    let address = class.as_ptr();
    let known = || {
        let remember = REMEMBER.lock().unwrap_or_else(PoisonError::into_inner);
        remember.iter().find(|it| it.class.as_ptr() == address).map(|it| it.functions)
    };
    if let Some(functions) = known() {
        return functions;
    }
    // Without the lock: this runs Python code, in which other threads may come here.
    let functions = ask(class);
    let mut remember = REMEMBER.lock().unwrap_or_else(PoisonError::into_inner);
    if remember.len() < REMEMBERED && remember.iter().all(|it| it.class.as_ptr() != address) {
        remember.push(Remembered { class: class.clone().unbind(), functions });
    }
    functions
}

fn ask(class: &Bound<'_, PyType>) -> Option<Functions> {
    let attribute = class.getattr("__dlpack_c_exchange_api__").ok()?;
    let capsule = attribute.cast::<PyCapsule>().ok()?;
    let api: NonNull<ExchangeApi> = capsule.pointer_checked(Some(CAPSULE)).ok()?.cast();
    // SAFETY: a capsule of this name points to the struct, which by the header's rules is static; version and
    // place of the older struct come first in every version of it.
    let (major, mut older) = unsafe { ((*api.as_ptr()).major, (*api.as_ptr()).previous) };
    let mut found = (major == MAJOR).then_some(api.as_ptr().cast_const());
    // A type of a later major version may offer the older struct beside its own.
    while found.is_none() && !older.is_null() {
        // SAFETY: as above.
        let (major, next) = unsafe { ((*older).major, (*older).previous) };
        found = (major == MAJOR).then_some(older);
        older = next;
    }
    // SAFETY: of major version 1, so it has the layout above.
    let (view, stream) = unsafe { found.map(|api| ((*api).tensor_from_object, (*api).current_work_stream)) }?;
    Some(Functions { view: view?, stream })
}
