//! How a communicator's memory is freed: not before the devices are done with it, and without keeping others waiting.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::Cuda;

/// The longest that the end of a communicator keeps its caller.
const PATIENCE: Duration = Duration::from_millis(100);

/// Lets a thread wait for the devices, and waits for that thread as long as it is no harm. A kernel of another
/// communicator may be under way that waits for a rank of the calling thread, or of one that waits for Python's lock,
/// which the caller holds where it collects garbage.
pub(super) fn begin(ending: &Arc<Cuda>) {
    let (tell, told) = mpsc::channel();
    let theirs = Arc::clone(ending);
    let waiting = thread::Builder::new().name("tp_rs end".into()).spawn(move || {
        theirs.settle();
        // Before it is told: who frees the memory is known then.
        drop(theirs);
        // The caller may be gone.
        let _ = tell.send(());
    });
    match waiting {
        Ok(_) => {
            if told.recv_timeout(PATIENCE).is_err() {
                tracing::debug!("a communicator's memory is freed later: its devices are at work");
            }
        }
        Err(error) => {
            tracing::debug!(%error, "no thread could be started, so the end of a communicator waits itself");
        }
    }
}

impl Cuda {
    /// Waits until no device uses the memory any more. Kernels that still wait leave at once, and tell their peers.
    fn settle(&self) {
        if self.settled.swap(true, Ordering::Relaxed) {
            return;
        }
        self.rooms.stop();
        for machine in &self.machines {
            // Once more: a wait that failed has not waited.
            let waited = machine.context().synchronize().or_else(|_| machine.context().synchronize());
            if let Err(error) = waited {
                tracing::warn!(%error, "could not wait for a device before its memory is freed");
            }
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Freeing the memory of one device would wait for that device only, while others still write there.
        self.settle();
    }
}
