//! Streams and events.

use std::sync::Arc;

use super::{driver, store};
use crate::codes::{CAPTURE_IMPLICIT, CAPTURE_ISOLATION, INVALID_HANDLE, INVALID_VALUE};
use crate::report::misuse;
use crate::stream::{self, Recorded};
use crate::{device, graph};

driver! {
    fn cuStreamCreate(place: *mut usize, flags: u32) {
        let device = device::current("cuStreamCreate")?;
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        store(place, stream::create(device, flags == 0, false))
    }

    fn cuStreamSynchronize(on: usize) {
        let device = device::holder("cuStreamSynchronize")?;
        stream::find("cuStreamSynchronize", on, device)?.synchronize()
    }

    fn cuStreamWaitEvent(on: usize, event: usize, flags: u32) {
        let call = "cuStreamWaitEvent";
        let device = device::current(call)?;
        let queue = stream::find(call, on, device)?;
        let event = stream::find_event(call, event)?;
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        match event.get() {
            Recorded::Never => Ok(()),
            Recorded::Captured(place) => graph::join(&queue, &place),
            // What is captured cannot wait for what is not.
            Recorded::At(_) if queue.capture().is_some() => Err(CAPTURE_ISOLATION),
            Recorded::At(mark) => queue.give(Arc::new(move || mark.wait())),
        }
    }

    fn cuStreamIsCapturing(on: usize, status: *mut u32) {
        let device = device::current("cuStreamIsCapturing")?;
        let queue = stream::find("cuStreamIsCapturing", on, device)?;
        if queue.implicit() {
            return Err(CAPTURE_IMPLICIT);
        }
        store(status, graph::status(&queue))
    }

    fn cuEventCreate(place: *mut usize, flags: u32) {
        let device = device::current("cuEventCreate")?;
        if flags & !7 != 0 {
            return Err(INVALID_VALUE);
        }
        store(place, stream::create_event(device))
    }

    fn cuEventRecord(event: usize, on: usize) {
        let call = "cuEventRecord";
        let device = device::current(call)?;
        let queue = stream::find(call, on, device)?;
        let event = stream::find_event(call, event)?;
        if event.device != device {
            let text = format!("{call}: an event of device {} on a stream of device {device}", event.device);
            return Err(misuse(INVALID_HANDLE, text));
        }
        if queue.implicit() {
            return Err(CAPTURE_IMPLICIT);
        }
        event.set(queue.capture().map_or_else(|| Recorded::At(queue.mark()), Recorded::Captured));
        Ok(())
    }

    fn cuEventSynchronize(event: usize) {
        device::current("cuEventSynchronize")?;
        match stream::find_event("cuEventSynchronize", event)?.get() {
            Recorded::Never => Ok(()),
            Recorded::At(mark) => {
                mark.wait();
                Ok(())
            }
            Recorded::Captured(_) => Err(crate::codes::CAPTURE_UNSUPPORTED),
        }
    }
}

driver! {
    give_back fn cuStreamDestroy_v2(on: usize) {
        device::holder("cuStreamDestroy_v2")?;
        stream::destroy("cuStreamDestroy_v2", on)
    }

    give_back fn cuEventDestroy_v2(event: usize) {
        device::holder("cuEventDestroy_v2")?;
        stream::destroy_event("cuEventDestroy_v2", event)
    }
}
