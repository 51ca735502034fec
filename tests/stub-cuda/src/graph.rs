//! Capture of streams, and graphs that do again what was captured.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::codes::{
    CAPTURE_INVALIDATED, CAPTURE_UNJOINED, CAPTURE_UNMATCHED, CAPTURE_UNSUPPORTED, INVALID_HANDLE,
    INVALID_VALUE, Result,
};
use crate::report::misuse;
use crate::stream::{Stream, Work, do_it, fresh};

/// How strict other calls are while something is captured (`CUstreamCaptureMode`).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Global,
    ThreadLocal,
    Relaxed,
}

/// Work that was captured, in the lane of the stream that it came by.
struct Node {
    lane: usize,
    device: u32,
    after: Vec<usize>,
    work: Work,
}

pub(crate) struct Capture {
    origin: usize,
    mode: Mode,
    thread: std::thread::ThreadId,
    valid: AtomicBool,
    over: AtomicBool,
    nodes: Mutex<Vec<Node>>,
    /// Streams that joined.
    joined: Mutex<Vec<Arc<Stream>>>,
}

/// A stream's place in a capture: the nodes that its next one comes after.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) capture: Arc<Capture>,
    after: Vec<usize>,
}

/// What was captured, ready to be done.
type Graph = Arc<Vec<Node>>;

static CAPTURES: Mutex<Vec<Arc<Capture>>> = Mutex::new(Vec::new());
static GRAPHS: Mutex<Option<HashMap<usize, Graph>>> = Mutex::new(None);

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fails where a call may not be made because something is being captured.
pub(crate) fn allowed() -> Result {
    let here = std::thread::current().id();
    for capture in lock(&CAPTURES).iter() {
        let forbids = match capture.mode {
            Mode::Global => true,
            Mode::ThreadLocal => capture.thread == here,
            Mode::Relaxed => false,
        };
        if forbids {
            capture.valid.store(false, Ordering::Release);
            return Err(CAPTURE_UNSUPPORTED);
        }
    }
    Ok(())
}

pub(crate) fn begin(stream: &Arc<Stream>, mode: u32) -> Result {
    // The default stream cannot be captured, and no stream twice.
    if stream.handle == 0 || stream.capture().is_some() {
        return Err(CAPTURE_UNSUPPORTED);
    }
    let mode = match mode {
        0 => Mode::Global,
        1 => Mode::ThreadLocal,
        2 => Mode::Relaxed,
        _ => return Err(INVALID_VALUE),
    };
    let capture = Arc::new(Capture {
        origin: stream.handle,
        mode,
        thread: std::thread::current().id(),
        valid: AtomicBool::new(true),
        over: AtomicBool::new(false),
        nodes: Mutex::default(),
        joined: Mutex::default(),
    });
    lock(&CAPTURES).push(Arc::clone(&capture));
    stream.set_capture(Some(Place { capture, after: Vec::new() }));
    Ok(())
}

/// Adds work to a capture by a stream that takes part in it.
pub(crate) fn add(stream: &Arc<Stream>, place: &Place, work: Work) -> Result {
    if !place.capture.valid.load(Ordering::Acquire) {
        return Err(CAPTURE_INVALIDATED);
    }
    let mut nodes = lock(&place.capture.nodes);
    nodes.push(Node { lane: stream.handle, device: stream.device, after: place.after.clone(), work });
    let after = vec![nodes.len() - 1];
    stream.set_capture(Some(Place { capture: Arc::clone(&place.capture), after }));
    Ok(())
}

/// Lets a stream come after what an event of a capture marks; one that takes no part yet joins.
pub(crate) fn join(stream: &Arc<Stream>, event: &Place) -> Result {
    let mut after = event.after.clone();
    match stream.capture() {
        Some(place) if Arc::ptr_eq(&place.capture, &event.capture) => after.extend(place.after),
        Some(_) => return Err(crate::codes::CAPTURE_ISOLATION),
        None if event.capture.over.load(Ordering::Acquire) => return Err(INVALID_VALUE),
        None => lock(&event.capture.joined).push(Arc::clone(stream)),
    }
    after.sort_unstable();
    after.dedup();
    stream.set_capture(Some(Place { capture: Arc::clone(&event.capture), after }));
    Ok(())
}

pub(crate) fn invalidate(place: &Place) {
    place.capture.valid.store(false, Ordering::Release);
}

/// 0 not captured, 1 captured, 2 captured in vain (`CUstreamCaptureStatus`).
pub(crate) fn status(stream: &Stream) -> u32 {
    stream.capture().map_or(0, |place| if place.capture.valid.load(Ordering::Acquire) { 1 } else { 2 })
}

/// Ends a capture and gives the graph's handle.
pub(crate) fn end(stream: &Arc<Stream>) -> Result<usize> {
    let Some(place) = stream.capture() else { return Err(INVALID_VALUE) };
    let capture = place.capture;
    if capture.origin != stream.handle {
        return Err(CAPTURE_UNMATCHED);
    }
    lock(&CAPTURES).retain(|other| !Arc::ptr_eq(other, &capture));
    capture.over.store(true, Ordering::Release);
    let mut joined_back = true;
    for other in lock(&capture.joined).drain(..) {
        // Its last work has to come before the origin's end.
        let last = other.capture().map(|place| place.after).unwrap_or_default();
        joined_back &= last.iter().all(|node| reaches(&lock(&capture.nodes), &place.after, *node));
        other.set_capture(None);
    }
    stream.set_capture(None);
    if !capture.valid.load(Ordering::Acquire) {
        return Err(CAPTURE_INVALIDATED);
    }
    if !joined_back {
        return Err(CAPTURE_UNJOINED);
    }
    let handle = fresh();
    let nodes = std::mem::take(&mut *lock(&capture.nodes));
    lock(&GRAPHS).get_or_insert_default().insert(handle, Arc::new(nodes));
    Ok(handle)
}

/// Whether `node` comes before or is one of `from`.
fn reaches(nodes: &[Node], from: &[usize], node: usize) -> bool {
    from.iter().any(|start| {
        *start == node || nodes.get(*start).is_some_and(|next| reaches(nodes, &next.after, node))
    })
}

/// Another handle for the same work.
pub(crate) fn instantiate(call: &str, graph: usize) -> Result<usize> {
    let work = find(call, graph)?;
    let handle = fresh();
    lock(&GRAPHS).get_or_insert_default().insert(handle, work);
    Ok(handle)
}

fn find(call: &str, graph: usize) -> Result<Graph> {
    let found = lock(&GRAPHS).get_or_insert_default().get(&graph).cloned();
    found.ok_or_else(|| misuse(INVALID_HANDLE, format!("{call} of graph {graph:#x}, which is not there")))
}

pub(crate) fn destroy(call: &str, graph: usize) -> Result {
    find(call, graph)?;
    lock(&GRAPHS).get_or_insert_default().remove(&graph);
    Ok(())
}

pub(crate) fn live() -> u64 {
    lock(&GRAPHS).get_or_insert_default().len() as u64
}

/// Queues all of a graph on a stream.
pub(crate) fn launch(call: &str, graph: usize, stream: &Arc<Stream>) -> Result {
    let graph = find(call, graph)?;
    stream.give(Arc::new(move || replay(&graph)))
}

/// Does the nodes of each lane in order, all lanes at once: kernels in different lanes may wait for each other.
fn replay(graph: &Graph) {
    let mut lanes: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (index, node) in graph.iter().enumerate() {
        lanes.entry(node.lane).or_default().push(index);
    }
    let done = Mutex::new(vec![false; graph.len()]);
    let bell = Condvar::new();
    let run = |lane: &[usize]| {
        for index in lane {
            let Some(node) = graph.get(*index) else { continue };
            let mut flags = lock(&done);
            while !node.after.iter().all(|before| flags.get(*before).copied().unwrap_or(true)) {
                let waited = bell.wait_timeout(flags, Duration::from_millis(500));
                flags = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            drop(flags);
            do_it(node.device, &node.work);
            if let Some(flag) = lock(&done).get_mut(*index) {
                *flag = true;
            }
            bell.notify_all();
        }
    };
    let run = &run;
    std::thread::scope(|scope| {
        for lane in lanes.values() {
            scope.spawn(move || run(lane));
        }
    });
}
