//! Modules, functions and launches.

use std::ffi::{CStr, c_char, c_void};
use std::sync::Arc;

use super::{driver, store};
use crate::codes::{INVALID_HANDLE, INVALID_VALUE};
use crate::kernels::Launch;
use crate::report::misuse;
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
        let call = "cuLaunchKernel";
        let device = device::current(call)?;
        let queue = stream::find(call, on, device)?;
        let kernel = ptx::kernel(call, function)?;
        if kernel.device != device {
            let text = format!("{call}: {} of device {} on device {device}", kernel.name, kernel.device);
            return Err(misuse(INVALID_HANDLE, text));
        }
        let shape = deep == 1 && threads_y == 1 && threads_z == 1 && threads > 0 && threads <= 1024;
        if !shape || shared > 48 << 10 || !extra.is_null() {
            return Err(misuse(INVALID_VALUE, format!("{call}: a launch of {} that no card takes", kernel.name)));
        }
        let mut copies = Vec::with_capacity(kernel.parameters.len());
        for (index, bytes) in kernel.parameters.iter().enumerate() {
            let mut copy = vec![0_u8; *bytes];
            // SAFETY: the caller has a place of as many bytes for each parameter of the kernel.
            unsafe { parameters.add(index).read().cast::<u8>().copy_to(copy.as_mut_ptr(), *bytes) };
            copies.push(copy);
        }
        let launch = Launch { kernel, blocks: across, members: down, parameters: copies };
        launch.check()?;
        queue.give(Arc::new(move || launch.run()))
    }
}

driver! {
    give_back fn cuModuleUnload(module: usize) {
        let device = device::holder("cuModuleUnload")?;
        stream::drain(device);
        ptx::unload("cuModuleUnload", module)
    }
}
