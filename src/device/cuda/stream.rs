//! Streams and events.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUstream, CUstream_flags, CUstreamCaptureStatus};

use super::calls::log_failure;
use super::context::Context;
use crate::error::Result;

/// Whether a graph is being captured on a stream of this context.
pub(crate) fn capturing(context: &Context, stream: CUstream) -> Result<bool> {
    let _current = context.enter()?;
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: `status` is a valid place, and the caller's stream is one of this context.
    let code = unsafe { sys::cuStreamIsCapturing(stream, &raw mut status) };
    context.check("cuStreamIsCapturing", code)?;
    Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// A stream of our own, which waits for no default stream.
#[derive(Debug)]
pub(crate) struct OwnStream {
    context: Arc<Context>,
    stream: CUstream,
}

// SAFETY: a stream handle may be used from every thread.
unsafe impl Send for OwnStream {}
// SAFETY: as above; the driver does its own locking.
unsafe impl Sync for OwnStream {}

impl OwnStream {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        let _current = context.enter()?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: `stream` is a valid place for a handle; destroyed in Drop.
        let code =
            unsafe { sys::cuStreamCreate(&raw mut stream, CUstream_flags::CU_STREAM_NON_BLOCKING as u32) };
        context.check("cuStreamCreate", code)?;
        Ok(Self { context: Arc::clone(context), stream })
    }

    pub(crate) fn raw(&self) -> CUstream {
        self.stream
    }

    /// Waits for all work on it.
    pub(crate) fn synchronize(&self) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: the stream is alive.
        let code = unsafe { sys::cuStreamSynchronize(self.stream) };
        self.context.check("cuStreamSynchronize", code)
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        let _current = self.context.enter_to_free();
        // SAFETY: the stream is this object's; work on it goes on.
        let code = unsafe { sys::cuStreamDestroy_v2(self.stream) };
        log_failure(self.context.check("cuStreamDestroy_v2", code));
    }
}

/// A mark in a stream.
#[derive(Debug)]
pub(crate) struct Event {
    context: Arc<Context>,
    event: CUevent,
}

// SAFETY: an event handle may be used from every thread.
unsafe impl Send for Event {}
// SAFETY: as above; the driver does its own locking.
unsafe impl Sync for Event {}

impl Event {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        let _current = context.enter()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: `event` is a valid place for a handle; destroyed in Drop.
        let code =
            unsafe { sys::cuEventCreate(&raw mut event, CUevent_flags::CU_EVENT_DISABLE_TIMING as u32) };
        context.check("cuEventCreate", code)?;
        Ok(Self { context: Arc::clone(context), event })
    }

    /// Marks all that is on the stream by now.
    ///
    /// # Safety
    /// The stream is one of this event's context and alive.
    pub(crate) unsafe fn record(&self, stream: CUstream) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: the caller's promise.
        self.context.check("cuEventRecord", unsafe { sys::cuEventRecord(self.event, stream) })
    }

    /// Lets a stream wait for the mark.
    ///
    /// # Safety
    /// The stream is alive.
    pub(crate) unsafe fn hold(&self, stream: CUstream) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: the caller's promise.
        self.context.check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream, self.event, 0) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _current = self.context.enter_to_free();
        // SAFETY: the event is this object's.
        let code = unsafe { sys::cuEventDestroy_v2(self.event) };
        log_failure(self.context.check("cuEventDestroy_v2", code));
    }
}
