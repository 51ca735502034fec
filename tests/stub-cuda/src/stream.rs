//! Streams as ordered queues with a thread each, and events as marks in them.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::codes::{CAPTURE_IMPLICIT, CAPTURE_UNSUPPORTED, INVALID_HANDLE, LAUNCH_FAILED, Result};
use crate::device;
use crate::graph::{self, Place};
use crate::report::{hang, misuse, violation};

/// After so long nothing is coming any more.
pub(crate) const PATIENCE: Duration = Duration::from_mins(2);

/// Something that a stream does. Graphs do it any number of times.
pub(crate) type Work = Arc<dyn Fn() + Send + Sync>;

pub(crate) struct Stream {
    pub(crate) device: u32,
    pub(crate) handle: usize,
    /// Whether the default stream waits for it, and it for the default stream.
    blocking: bool,
    /// Made by a test, not by the code that is tested.
    pub(crate) of_test: bool,
    state: Mutex<State>,
    bell: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Work>,
    submitted: u64,
    completed: u64,
    destroyed: bool,
    capture: Option<Place>,
}

/// The end of what a stream had been given at some time.
#[derive(Clone)]
pub(crate) struct Mark {
    stream: Arc<Stream>,
    count: u64,
}

impl Mark {
    pub(crate) fn wait(&self) {
        let begin = Instant::now();
        let mut state = self.stream.lock();
        while state.completed < self.count {
            if begin.elapsed() > PATIENCE {
                hang(&format!("work on a stream of device {}", self.stream.device));
            }
            let waited = self.stream.bell.wait_timeout(state, Duration::from_millis(500));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// An event: nothing yet, a mark in a stream, or one in a graph that is being captured.
#[derive(Default, Clone)]
pub(crate) enum Recorded {
    #[default]
    Never,
    At(Mark),
    Captured(Place),
}

pub(crate) struct Event {
    pub(crate) device: u32,
    pub(crate) recorded: Mutex<Recorded>,
}

static STREAMS: Mutex<Option<HashMap<usize, Arc<Stream>>>> = Mutex::new(None);
static DEFAULTS: Mutex<Option<HashMap<u32, Arc<Stream>>>> = Mutex::new(None);
/// Destroyed while they had work left.
static LEAVING: Mutex<Vec<Arc<Stream>>> = Mutex::new(Vec::new());
static EVENTS: Mutex<Option<HashMap<usize, Arc<Event>>>> = Mutex::new(None);

/// A number for a new handle.
pub(crate) fn fresh() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0x5_0000);
    NEXT.fetch_add(16, Ordering::Relaxed)
}

fn table<T>(of: &'static Mutex<Option<T>>) -> MutexGuard<'static, Option<T>> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn create(device: u32, blocking: bool, of_test: bool) -> usize {
    let handle = fresh();
    let stream = Stream::start(device, handle, blocking, of_test);
    table(&STREAMS).get_or_insert_default().insert(handle, stream);
    handle
}

/// The stream of a handle, as it is called on the current device.
pub(crate) fn find(call: &str, handle: usize, current: u32) -> Result<Arc<Stream>> {
    // 1 is the default stream by its other name.
    if handle <= 1 {
        return Ok(default_of(current));
    }
    let Some(stream) = table(&STREAMS).get_or_insert_default().get(&handle).cloned() else {
        let text = format!("{call} on stream {handle:#x}, which was destroyed or never was");
        return Err(misuse(INVALID_HANDLE, text));
    };
    if stream.device != current {
        let text =
            format!("{call} on a stream of device {} in the context of device {current}", stream.device);
        return Err(misuse(INVALID_HANDLE, text));
    }
    Ok(stream)
}

fn default_of(device: u32) -> Arc<Stream> {
    let mut defaults = table(&DEFAULTS);
    let known = defaults.get_or_insert_default().entry(device);
    Arc::clone(known.or_insert_with(|| Stream::start(device, 0, true, true)))
}

pub(crate) fn destroy(call: &str, handle: usize) -> Result {
    let Some(stream) = table(&STREAMS).get_or_insert_default().remove(&handle) else {
        let text = format!("{call} of stream {handle:#x}, which was destroyed or never was");
        return Err(misuse(INVALID_HANDLE, text));
    };
    let mut state = stream.lock();
    if state.capture.is_some() {
        violation(format!("{call} of a stream that is being captured"));
    }
    state.destroyed = true;
    stream.bell.notify_all();
    drop(state);
    let mut leaving = LEAVING.lock().unwrap_or_else(PoisonError::into_inner);
    leaving.retain(|other| !other.is_done());
    leaving.push(stream);
    Ok(())
}

/// Streams and events that the tested code has not given back.
pub(crate) fn live() -> (u64, u64) {
    let streams = table(&STREAMS).get_or_insert_default().values().filter(|stream| !stream.of_test).count();
    (streams as u64, table(&EVENTS).get_or_insert_default().len() as u64)
}

/// Waits for everything on a device.
pub(crate) fn drain(device: u32) {
    for stream in on(device) {
        stream.mark().wait();
    }
}

fn on(device: u32) -> Vec<Arc<Stream>> {
    let mut all: Vec<_> = table(&STREAMS).get_or_insert_default().values().cloned().collect();
    all.extend(table(&DEFAULTS).get_or_insert_default().values().cloned());
    all.extend(LEAVING.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned());
    all.retain(|stream| stream.device == device);
    all
}

impl Stream {
    fn start(device: u32, handle: usize, blocking: bool, of_test: bool) -> Arc<Self> {
        let state = Mutex::new(State::default());
        let stream = Arc::new(Self { device, handle, blocking, of_test, state, bell: Condvar::new() });
        let worker = Arc::clone(&stream);
        std::thread::spawn(move || worker.work());
        stream
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(work) = state.queue.pop_front() {
                drop(state);
                do_it(self.device, &work);
                drop(work);
                state = self.lock();
                state.completed += 1;
                self.bell.notify_all();
            } else if state.destroyed {
                return;
            } else {
                state = self.bell.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn is_done(&self) -> bool {
        let state = self.lock();
        state.completed == state.submitted
    }

    /// All that it has been given by now.
    pub(crate) fn mark(self: &Arc<Self>) -> Mark {
        Mark { stream: Arc::clone(self), count: self.lock().submitted }
    }

    /// Where a capture on it is.
    pub(crate) fn capture(&self) -> Option<Place> {
        self.lock().capture.clone()
    }

    pub(crate) fn set_capture(&self, place: Option<Place>) {
        self.lock().capture = place;
    }

    /// Whether a graph is being captured on a stream that the default stream would wait for.
    pub(crate) fn implicit(&self) -> bool {
        let others = |stream: &Arc<Self>| stream.blocking && stream.handle != 0 && stream.capture().is_some();
        self.handle == 0 && on(self.device).iter().any(others)
    }

    /// Queues work, or adds it to the graph that is being captured.
    pub(crate) fn give(self: &Arc<Self>, work: Work) -> Result {
        if self.implicit() {
            return Err(CAPTURE_IMPLICIT);
        }
        if let Some(place) = self.capture() {
            return graph::add(self, &place, work);
        }
        // The default stream and blocking streams wait for each other.
        let before: Vec<Mark> = match (self.handle, self.blocking) {
            (0, _) => {
                let others = on(self.device).into_iter();
                others.filter(|stream| stream.blocking && stream.handle != 0).map(|it| it.mark()).collect()
            }
            (_, true) => vec![default_of(self.device).mark()],
            (_, false) => Vec::new(),
        };
        let work: Work = if before.is_empty() {
            work
        } else {
            Arc::new(move || {
                before.iter().for_each(Mark::wait);
                work();
            })
        };
        let mut state = self.lock();
        state.queue.push_back(work);
        state.submitted += 1;
        self.bell.notify_all();
        Ok(())
    }

    /// Waits for all that it has been given.
    pub(crate) fn synchronize(self: &Arc<Self>) -> Result {
        if self.implicit() {
            return Err(CAPTURE_IMPLICIT);
        }
        if let Some(place) = self.capture() {
            graph::invalidate(&place);
            return Err(CAPTURE_UNSUPPORTED);
        }
        self.mark().wait();
        match device::broken(self.device) {
            0 => Ok(()),
            code => Err(code),
        }
    }
}

/// Does work of a device, unless its context is broken. A panic breaks it: a test has to hear of that.
pub(crate) fn do_it(device: u32, work: &Work) {
    if device::broken(device) != 0 {
        return;
    }
    if catch_unwind(AssertUnwindSafe(|| work())).is_err() {
        violation(format!("work on device {device} panicked inside the stub"));
        device::break_it(device, LAUNCH_FAILED);
    }
}

pub(crate) fn create_event(device: u32) -> usize {
    let handle = fresh();
    let event = Event { device, recorded: Mutex::default() };
    table(&EVENTS).get_or_insert_default().insert(handle, Arc::new(event));
    handle
}

pub(crate) fn find_event(call: &str, handle: usize) -> Result<Arc<Event>> {
    table(&EVENTS).get_or_insert_default().get(&handle).cloned().ok_or_else(|| {
        misuse(INVALID_HANDLE, format!("{call} of event {handle:#x}, which was destroyed or never was"))
    })
}

pub(crate) fn destroy_event(call: &str, handle: usize) -> Result {
    find_event(call, handle)?;
    table(&EVENTS).get_or_insert_default().remove(&handle);
    Ok(())
}

impl Event {
    pub(crate) fn set(&self, recorded: Recorded) {
        *self.recorded.lock().unwrap_or_else(PoisonError::into_inner) = recorded;
    }

    pub(crate) fn get(&self) -> Recorded {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
