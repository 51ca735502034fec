//! Modules, functions and launches.

use std::ffi::{CStr, c_char, c_void};
use std::sync::Arc;

use super::{driver, store};
use crate::codes::{INVALID_HANDLE, INVALID_VALUE, NOT_SUPPORTED, Result};
use crate::kernels::Launch;
use crate::report::{misuse, violation};
use crate::{device, graph, ptx, stream};

driver! {
    fn cuModuleLoadData(place: *mut usize, image: *const c_char) {
        let device = device::current("cuModuleLoadData")?;
        graph::allowed()?;
        // SAFETY: the caller's text ends with a NUL, as PTX has to.
        let text = unsafe { CStr::from_ptr(image) }.to_str().map_err(|_| crate::codes::INVALID_PTX)?;
        store(place, ptx::load(device, device::handle(device), text)?)
    }

    fn cuModuleGetFunction(place: *mut usize, module: usize, name: *const c_char) {
        device::current("cuModuleGetFunction")?;
        // SAFETY: the caller's name ends with a NUL.
        let name = unsafe { CStr::from_ptr(name) }.to_str().map_err(|_| INVALID_VALUE)?;
        store(place, ptx::function("cuModuleGetFunction", module, name)?)
    }

    fn cuModuleGetGlobal_v2(address: *mut u64, bytes: *mut usize, module: usize, name: *const c_char) {
        device::current("cuModuleGetGlobal_v2")?;
        // SAFETY: as above.
        let name = unsafe { CStr::from_ptr(name) }.to_str().map_err(|_| INVALID_VALUE)?;
        let (at, length) = ptx::global("cuModuleGetGlobal_v2", module, name)?;
        store(address, at)?;
        store(bytes, length)
    }

    fn cuFuncGetAttribute(value: *mut i32, which: i32, function: usize) {
        device::current("cuFuncGetAttribute")?;
        ptx::kernel("cuFuncGetAttribute", function)?;
        store(value, match which {
            0 => 1024, // threads of a block
            4 => 32,   // registers
            _ => 0,
        })
    }

    fn cuLaunchKernel(
        function: usize, across: u32, down: u32, deep: u32, threads: u32, threads_y: u32, threads_z: u32,
        shared: u32, on: usize, parameters: *const *const c_void, extra: *const *const c_void
    ) {
        let shape = Shape { grid: (across, down, deep), threads: (threads, threads_y, threads_z), shared, on };
        launch("cuLaunchKernel", function, &shape, parameters, extra)
    }

    fn cuLaunchKernelEx(
        config: *const Config, function: usize, parameters: *const *const c_void, extra: *const *const c_void
    ) {
        let call = "cuLaunchKernelEx";
        // SAFETY: the caller's structure, as the function is declared.
        let config = unsafe { config.read() };
        let kernel = ptx::kernel(call, function)?;
        // Zero or one: more are never told.
        let attribute = match config.count {
            0 => None,
            // SAFETY: the caller has as many as it says.
            1 => Some(unsafe { config.attributes.read() }),
            count => return Err(misuse(INVALID_VALUE, format!("{call} with {count} attributes"))),
        };
        match attribute {
            Some(Attribute { id: STARTS_EARLY, value: [1, ..], .. }) => {
                if device::with(kernel.device, |device| device.capability)? < 9 {
                    return Err(NOT_SUPPORTED);
                }
                if !kernel.entry.waits {
                    let name = &kernel.entry.name;
                    violation(format!("{call}: {name} starts early and does not wait for the kernel before"));
                }
            }
            None => {}
            Some(Attribute { id, .. }) => {
                return Err(misuse(INVALID_VALUE, format!("{call} with an attribute {id} that the stub does not know")));
            }
        }
        launch(call, function, &config.shape(), parameters, extra)
    }
}

/// The attribute by which a kernel may start while the one before it ends: its number in cuda.h.
const STARTS_EARLY: u32 = 6;

/// As cuda.h has it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Attribute {
    id: u32,
    pad: u32,
    /// 64 bytes of which the first four are the number that counts here.
    value: [i32; 16],
}

/// As cuda.h has it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    grid: [u32; 3],
    threads: [u32; 3],
    shared: u32,
    on: usize,
    attributes: *const Attribute,
    count: u32,
}

impl Config {
    fn shape(&self) -> Shape {
        let ([across, down, deep], [x, y, z]) = (self.grid, self.threads);
        Shape { grid: (across, down, deep), threads: (x, y, z), shared: self.shared, on: self.on }
    }
}

/// What a launch says beside its kernel.
struct Shape {
    grid: (u32, u32, u32),
    threads: (u32, u32, u32),
    shared: u32,
    on: usize,
}

fn launch(
    call: &str,
    function: usize,
    shape: &Shape,
    parameters: *const *const c_void,
    extra: *const *const c_void,
) -> Result {
    let device = device::current(call)?;
    let queue = stream::find(call, shape.on, device)?;
    let kernel = ptx::kernel(call, function)?;
    if kernel.device != device {
        let text = format!("{call}: {} of device {} on device {device}", kernel.entry.name, kernel.device);
        return Err(misuse(INVALID_HANDLE, text));
    }
    let (across, down, deep) = shape.grid;
    let fits = deep == 1 && matches!(shape.threads, (1..=1024, 1, 1));
    if !fits || shape.shared > 48 << 10 || !extra.is_null() {
        return Err(misuse(
            INVALID_VALUE,
            format!("{call}: a launch of {} that no card takes", kernel.entry.name),
        ));
    }
    let mut copies = Vec::with_capacity(kernel.entry.parameters.len());
    for (index, bytes) in kernel.entry.parameters.iter().enumerate() {
        let mut copy = vec![0_u8; *bytes];
        // SAFETY: the caller has a place of as many bytes for each parameter of the kernel.
        unsafe { parameters.add(index).read().cast::<u8>().copy_to(copy.as_mut_ptr(), *bytes) };
        copies.push(copy);
    }
    let launch = Launch { kernel, blocks: across, members: down, parameters: copies };
    launch.check()?;
    queue.give(Arc::new(move || launch.run()))
}

driver! {
    give_back fn cuModuleUnload(module: usize) {
        let device = device::holder("cuModuleUnload")?;
        stream::drain(device);
        ptx::unload("cuModuleUnload", module)
    }
}
