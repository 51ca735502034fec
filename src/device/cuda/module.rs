//! Kernels from the text that cuda/ holds.

use std::ffi::{CStr, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys::{self, CUfunction, CUlaunchAttributeID, CUmodule, CUresult, CUstream};

use super::calls::log_failure;
use super::context::Context;
use crate::error::Result;

/// A module, loaded on one device.
#[derive(Debug)]
pub(crate) struct Module {
    context: Arc<Context>,
    handle: CUmodule,
    /// Whether `launch_early` starts kernels early.
    overlaps: AtomicBool,
}

// SAFETY: a module handle may be used from every thread.
unsafe impl Send for Module {}
// SAFETY: as above; the driver does its own locking.
unsafe impl Sync for Module {}

/// A kernel. It lives as long as its module.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Function(CUfunction);

// SAFETY: a function handle may be used from every thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Module {
    /// Compiles PTX for the device, or takes what the driver has kept from before. `overlaps`: its kernels for `launch_early`
    /// wait for the one before by themselves, and the device can start them early.
    pub(crate) fn load(context: &Arc<Context>, text: &CStr, overlaps: bool) -> Result<Self> {
        let _current = context.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is a valid place for one and the text ends with a NUL; unloaded in Drop.
        let code = unsafe { sys::cuModuleLoadData(&raw mut handle, text.as_ptr().cast()) };
        context.check("cuModuleLoadData", code)?;
        Ok(Self { context: Arc::clone(context), handle, overlaps: AtomicBool::new(overlaps) })
    }

    /// A kernel by its name, loaded now: loading it at its first launch would wait for kernels that wait for it.
    pub(crate) fn function(&self, name: &CStr) -> Result<Function> {
        let _current = self.context.enter()?;
        let mut function = std::ptr::null_mut();
        // SAFETY: `function` is a valid place for a handle; the module is loaded.
        let code = unsafe { sys::cuModuleGetFunction(&raw mut function, self.handle, name.as_ptr()) };
        self.context.check("cuModuleGetFunction", code)?;
        let mut registers = 0;
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS;
        // SAFETY: `registers` is a valid place for an int. Asking for an attribute loads the code.
        let code = unsafe { sys::cuFuncGetAttribute(&raw mut registers, which, function) };
        self.context.check("cuFuncGetAttribute", code)?;
        Ok(Function(function))
    }

    /// Address and bytes of a variable.
    pub(crate) fn variable(&self, name: &CStr) -> Result<(u64, usize)> {
        let _current = self.context.enter()?;
        let (mut address, mut bytes) = (0, 0);
        // SAFETY: both are valid places; the module is loaded.
        let code = unsafe {
            sys::cuModuleGetGlobal_v2(&raw mut address, &raw mut bytes, self.handle, name.as_ptr())
        };
        self.context.check("cuModuleGetGlobal_v2", code)?;
        Ok((address, bytes))
    }

    /// Launches a kernel of this module.
    ///
    /// # Safety
    /// `parameters` are those that the kernel takes; what they point to is valid until the kernel has run; the
    /// stream is one of this context and alive.
    pub(crate) unsafe fn launch(
        &self,
        function: Function,
        blocks: (u32, u32),
        threads: u32,
        stream: CUstream,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        let _current = self.context.enter()?;
        let (across, down) = blocks;
        // SAFETY: the caller's promise; the driver copies the parameters before it returns.
        let code = unsafe {
            sys::cuLaunchKernel(
                function.0,
                across,
                down,
                1,
                threads,
                1,
                1,
                0,
                stream,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        self.context.check("cuLaunchKernel", code)
    }

    /// Launches a kernel so that the device may start it while the one before it on the stream ends (programmatic dependent
    /// launch), where it can; elsewhere as `launch` does.
    ///
    /// # Safety
    /// As for `launch`. Where the module was loaded with `overlaps`, the kernel executes `griddepcontrol.wait` before it uses
    /// memory.
    pub(crate) unsafe fn launch_early(
        &self,
        function: Function,
        blocks: (u32, u32),
        threads: u32,
        stream: CUstream,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        if self.overlaps.load(Ordering::Relaxed) {
            let _current = self.context.enter()?;
            let (across, down) = blocks;
            // SAFETY: a number of an attribute to ignore, and a union of numbers: zeros are values of both.
            let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
            attribute.id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attribute.value.programmaticStreamSerializationAllowed = 1;
            let shape = sys::CUlaunchConfig {
                gridDimX: across,
                gridDimY: down,
                gridDimZ: 1,
                blockDimX: threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: 0,
                hStream: stream,
                attrs: &raw mut attribute,
                numAttrs: 1,
            };
            let (kept, none) = (parameters.as_mut_ptr(), std::ptr::null_mut());
            // SAFETY: the caller's promise; the driver copies shape, attribute and parameters before it returns.
            let code = unsafe { sys::cuLaunchKernelEx(&raw const shape, function.0, kept, none) };
            if code != CUresult::CUDA_ERROR_NOT_SUPPORTED {
                return self.context.check("cuLaunchKernelEx", code);
            }
            tracing::info!("cuda:{} starts no kernel early: the driver refuses it", self.context.index());
            self.overlaps.store(false, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { self.launch(function, blocks, threads, stream, parameters) }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _current = self.context.enter_to_free();
        // SAFETY: the module is this object's, and its owner has waited for its kernels.
        let code = unsafe { sys::cuModuleUnload(self.handle) };
        log_failure(self.context.check("cuModuleUnload", code));
    }
}
