//! Capture and replay. `tp_rs` only meets streams that are being captured; its tests do the capturing.

use super::{driver, store};
use crate::stream;
use crate::{device, graph};

driver! {
    fn cuStreamBeginCapture_v2(on: usize, mode: u32) {
        let device = device::current("cuStreamBeginCapture_v2")?;
        graph::begin(&stream::find("cuStreamBeginCapture_v2", on, device)?, mode)
    }

    fn cuStreamEndCapture(on: usize, place: *mut usize) {
        let device = device::holder("cuStreamEndCapture")?;
        store(place, graph::end(&stream::find("cuStreamEndCapture", on, device)?)?)
    }

    fn cuGraphInstantiateWithFlags(place: *mut usize, captured: usize, flags: u64) {
        device::current("cuGraphInstantiateWithFlags")?;
        let _ = flags;
        store(place, graph::instantiate("cuGraphInstantiateWithFlags", captured)?)
    }

    fn cuGraphLaunch(executable: usize, on: usize) {
        let device = device::current("cuGraphLaunch")?;
        graph::launch("cuGraphLaunch", executable, &stream::find("cuGraphLaunch", on, device)?)
    }
}

driver! {
    give_back fn cuGraphExecDestroy(executable: usize) {
        graph::destroy("cuGraphExecDestroy", executable)
    }

    give_back fn cuGraphDestroy(captured: usize) {
        graph::destroy("cuGraphDestroy", captured)
    }
}
