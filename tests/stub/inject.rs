//! Lets every driver call of a scenario fail in turn, with every error that it can give, and looks at what comes of it.

use std::collections::{BTreeMap, BTreeSet};

use tp_rs::comm::{CommOptions, Communicator, Device, Stream};
use tp_rs::{Error, Result};

use super::Stub;

/// Errors that a function of the driver can give; those of every function for functions that are not listed, so that
/// a new one is covered at once.
pub(crate) fn errors_of(call: &str) -> &'static [i32] {
    match call {
        "cuInit" => &[100, 803, 999],
        "cuDeviceGet"
        | "cuDeviceGetCount"
        | "cuDeviceGetName"
        | "cuDeviceGetAttribute"
        | "cuDeviceTotalMem_v2"
        | "cuDeviceCanAccessPeer" => &[3, 101, 999],
        "cuDevicePrimaryCtxRetain" => &[2, 46, 101, 201, 700, 999],
        "cuDevicePrimaryCtxRelease_v2" => &[4, 101, 700, 999],
        "cuCtxGetCurrent" => &[3, 4, 999],
        "cuCtxPushCurrent_v2" | "cuCtxPopCurrent_v2" => &[201, 700, 719, 999],
        "cuCtxSynchronize" => &[201, 700, 702, 719, 999],
        "cuCtxEnablePeerAccess" => &[201, 217, 700, 704, 711, 800, 999],
        "cuMemAlloc_v2" => &[2, 201, 700, 719, 900, 999],
        "cuMemHostAlloc" => &[2, 201, 700, 800, 999],
        "cuMemFree_v2" | "cuMemFreeHost" => &[1, 201, 700, 719, 999],
        "cuMemHostGetDevicePointer_v2" => &[1, 201, 700, 999],
        "cuMemsetD8Async" | "cuMemcpyHtoDAsync_v2" | "cuMemcpyDtoHAsync_v2" | "cuMemcpy2DAsync_v2" => {
            &[1, 201, 400, 700, 719, 999]
        }
        "cuPointerGetAttributes" => &[1, 101, 201, 700, 999],
        "cuStreamCreate" | "cuEventCreate" => &[2, 201, 700, 999],
        "cuStreamDestroy_v2" | "cuEventDestroy_v2" | "cuEventRecord" | "cuModuleUnload" => {
            &[201, 400, 700, 999]
        }
        "cuStreamSynchronize" => &[201, 214, 400, 700, 702, 716, 719, 999],
        "cuStreamWaitEvent" => &[201, 400, 700, 905, 999],
        "cuStreamIsCapturing" => &[201, 400, 700, 906, 999],
        "cuModuleLoadData" => &[2, 201, 209, 218, 222, 700, 999],
        "cuModuleGetFunction" | "cuModuleGetGlobal_v2" => &[201, 400, 500, 700, 999],
        "cuFuncGetAttribute" => &[1, 2, 201, 400, 700, 999],
        // Not 801, after which it is not called again; tests/stub_launches.rs has that.
        "cuLaunchKernel" | "cuLaunchKernelEx" => &[1, 2, 201, 400, 700, 701, 702, 719, 999],
        _ => &[1, 2, 201, 700, 719, 800, 999],
    }
}

/// Errors for the `nth` of some calls. Where a function is called very often, every place gets two of them in turn.
pub(crate) fn codes_at(calls: &[String], nth: usize) -> Vec<i32> {
    let call = &calls[nth - 1];
    let errors = errors_of(call);
    let before = calls[..nth - 1].iter().filter(|other| *other == call).count();
    let often = calls.iter().filter(|other| *other == call).count() > 16;
    let taken = |index: &usize| !often || (*index + before) % errors.len() < 2;
    (0..errors.len()).filter(taken).map(|index| errors[index]).collect()
}

/// Whether a context gives nothing but this error after it.
pub(crate) fn is_sticky(code: i32) -> bool {
    matches!(code, 214 | 220 | 700 | 702 | 710 | 714..=719)
}

/// Whether a function gives something back.
pub(crate) fn is_release(call: &str) -> bool {
    ["Pop", "Free", "Destroy", "Release", "Unload"].iter().any(|word| call.contains(word))
}

/// What came of an injected error.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Outcome {
    /// Nothing is lost by it: the results are right.
    Tolerated,
    /// The call said so, and the next one works.
    Works,
    /// The call said so, and so does every later one until the communicator is reset.
    Stopped,
    /// The context is broken, and every call says so.
    Broken,
    /// It was logged, since nobody could act upon it; all was given back.
    Logged,
}

impl Outcome {
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Tolerated => "tolerated",
            Self::Works => "error; the next call works",
            Self::Stopped => "error; the communicator says that it stopped, and works after a reset",
            Self::Broken => "error; the context is broken and every call says so",
            Self::Logged => "logged; all is given back",
        }
    }
}

#[derive(Default)]
struct Row {
    positions: BTreeSet<usize>,
    outcomes: BTreeMap<Outcome, BTreeSet<i32>>,
    injections: usize,
}

/// What came of everything.
#[derive(Default)]
pub(crate) struct Report {
    rows: BTreeMap<(String, String), Row>,
}

impl Report {
    pub(crate) fn add(&mut self, scenario: &str, call: &str, nth: usize, code: i32, outcome: Outcome) {
        let row = self.rows.entry((scenario.to_owned(), call.to_owned())).or_default();
        row.positions.insert(nth);
        row.outcomes.entry(outcome).or_default().insert(code);
        row.injections += 1;
    }

    pub(crate) fn injections(&self) -> usize {
        self.rows.values().map(|row| row.injections).sum()
    }

    /// Lines of a table: scenario, call, how often it was made, what came of which errors.
    pub(crate) fn lines(&self) -> Vec<String> {
        let line = |((scenario, call), row): (&(String, String), &Row)| {
            let outcomes: Vec<_> = row
                .outcomes
                .iter()
                .map(|(outcome, codes)| {
                    let codes: Vec<_> = codes.iter().map(ToString::to_string).collect();
                    format!("{}: {}", codes.join(" "), outcome.words())
                })
                .collect();
            let outcomes = outcomes.join("<br>");
            format!("| {scenario} | `{call}` | {} | {} | {outcomes} |", row.positions.len(), row.injections)
        };
        self.rows.iter().map(line).collect()
    }
}

/// A communicator on devices of the stub, made anew whenever it was broken.
pub(crate) struct Bench {
    pub(crate) stub: &'static Stub,
    pub(crate) devices: Vec<u32>,
    pub(crate) options: CommOptions,
    comm: Option<(Communicator, Vec<Stream>)>,
}

impl Bench {
    pub(crate) fn new(stub: &'static Stub, devices: &[u32], options: &CommOptions) -> Self {
        let mut bench = Self { stub, devices: devices.to_vec(), options: options.clone(), comm: None };
        // The kernels stay loaded for good: what is held besides has to be given back.
        bench.comm();
        bench.renew();
        bench
    }

    pub(crate) fn make(&self) -> Result<Communicator> {
        let devices: Vec<_> = self.devices.iter().map(|index| Device::Cuda(*index)).collect();
        Communicator::new(&devices, &self.options)
    }

    /// The communicator and a stream for each rank.
    pub(crate) fn comm(&mut self) -> (&Communicator, &[Stream]) {
        if self.comm.is_none() {
            let comm = self.make().unwrap();
            let streams = comm.streams();
            self.comm = Some((comm, streams));
        }
        self.comm.as_ref().map(|(comm, streams)| (comm, &streams[..])).unwrap()
    }

    /// Gives the communicator back, and mends what is broken as a new process would.
    pub(crate) fn renew(&mut self) {
        drop(self.comm.take());
        self.stub.stub_heal();
    }

    /// Takes a communicator that was made.
    pub(crate) fn keep(&mut self, comm: Communicator) {
        let streams = comm.streams();
        self.comm = Some((comm, streams));
    }

    /// Lets operations go to these streams.
    pub(crate) fn streams(&mut self, streams: &[Stream]) {
        if let Some((_, place)) = &mut self.comm {
            *place = streams.to_vec();
        }
    }

    /// Gives the communicator back.
    pub(crate) fn give_back(&mut self) {
        drop(self.comm.take());
    }

    /// Waits for all work of the devices, whatever became of it.
    pub(crate) fn drain(&self) {
        self.devices.iter().for_each(|device| self.stub.stub_drain(*device));
    }

    /// Lets one call of `work` fail. Gives what it returned and the name of the call, `None` if it made too few; the
    /// thread's current context has to be what it was.
    pub(crate) fn fail<T>(
        &mut self,
        nth: usize,
        code: i32,
        work: impl FnOnce(&mut Self) -> T,
    ) -> (T, Option<String>) {
        let before = self.stub.current();
        self.stub.arm(nth, code);
        let result = work(self);
        let (calls, _) = self.stub.disarm();
        assert_eq!(self.stub.current(), before, "the current context after {code} from call {nth}");
        (result, nth.checked_sub(1).and_then(|index| calls.into_iter().nth(index)))
    }

    /// The calls that `work` makes when nothing fails.
    pub(crate) fn calls(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Vec<String> {
        self.stub.arm(0, 0);
        let result = work(self);
        let (calls, _) = self.stub.disarm();
        result.unwrap();
        calls
    }
}

/// Checks that an error says what failed and where.
pub(crate) fn names(error: &Error, call: &str, code: i32) {
    match error {
        Error::Driver { call: named, device, rank, code: given, remedy, .. } => {
            // These are only made for a rank.
            let of_rank = ["cuMemcpy2DAsync_v2", "cuStreamIsCapturing", "cuStreamWaitEvent", "cuEventRecord"];
            assert!(rank.is_some() || !of_rank.contains(named), "{error}");
            // What fails while something is given back is logged; a context that it breaks tells the next call.
            let given_back = is_sticky(code) && (is_release(call) || call.starts_with("cuCtx"));
            assert!(*given == code && (*named == call || given_back), "{call} gave {code}: {error}");
            assert!(device.starts_with("cuda:") || device == "the driver", "{error}");
            assert!(!remedy.is_empty(), "{error}");
        }
        // A machine whose driver has no device.
        Error::InvalidArgument { .. } if code == 100 => {}
        // Who waited for the rank whose call failed, or came after it.
        Error::Aborted { .. } | Error::CollectiveTimeout { .. } => {}
        _ => panic!("{call} gave {code}, and the error is {error:?}"),
    }
}
