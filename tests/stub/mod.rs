//! The stub driver of tests/stub-cuda, built and loaded for a test.
//!
//! A driver is loaded once in a process, so every test runs in one of its own: `on_stub` starts this binary again,
//! with the stub before whatever driver the machine has, for that test alone.

// Each test binary uses some of it. The functions have the names that the library gives them.
#![allow(
    dead_code,
    non_snake_case,
    clippy::cast_possible_truncation,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used
)]

#[path = "../common/mod.rs"]
pub(crate) mod common;
pub(crate) mod inject;
pub(crate) mod jobs;
pub(crate) mod life;
pub(crate) mod operate;
pub(crate) mod place;

use std::ffi::c_char;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use libloading::{Library, Symbol};

/// Set in a process that runs on the stub.
const HERE: &str = "TP_RS_ON_STUB";
/// A test that takes so much longer than it was told to hangs.
const LONGEST: u64 = 900;

/// Whether one device can use another's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Peer {
    Absent,
    Works,
    /// The driver says so, and what is written does not arrive.
    Lies,
}

/// What the crate holds of the driver.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) device_allocations: u64,
    pub(crate) device_bytes: u64,
    pub(crate) pinned_allocations: u64,
    pub(crate) streams: u64,
    pub(crate) events: u64,
    pub(crate) modules: u64,
    pub(crate) context_references: u64,
    pub(crate) graphs: u64,
}

/// The loaded driver.
pub(crate) struct Stub {
    library: Library,
}

fn manifest() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stub-cuda/Cargo.toml")
}

/// The folder of the stub, which is built at the first need.
fn build() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(build_now).clone()
}

fn build_now() -> PathBuf {
    // A process on the stub finds it where its parent did.
    if let Some(folder) = std::env::var_os(HERE) {
        return folder.into();
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stub-cuda");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--locked", "--offline", "--manifest-path"]).arg(manifest());
    // Whatever flags this test was built with (coverage, sanitizers), the stub needs none.
    command.arg("--target-dir").arg(&target).env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    let built = command.output().unwrap();
    assert!(built.status.success(), "the stub driver: {}", String::from_utf8_lossy(&built.stderr));
    let folder = target.join("debug");
    // Both names that the driver is looked for by.
    match std::os::unix::fs::symlink("libcuda.so", folder.join("libcuda.so.1")) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => panic!("libcuda.so.1: {error}"),
        _ => {}
    }
    folder
}

/// This binary once more, for one test, on the stub.
pub(crate) fn again(test: &str) -> Command {
    let folder = build();
    let mut path = folder.clone().into_os_string();
    if let Some(others) = std::env::var_os("LD_LIBRARY_PATH") {
        path.push(":");
        path.push(others);
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--include-ignored", "--test-threads=1"]);
    command.env("LD_LIBRARY_PATH", path).env(HERE, folder).env_remove("CUDA_VISIBLE_DEVICES");
    command
}

/// Runs a test on the stub. `test` is its name.
pub(crate) fn on_stub(test: &str, body: impl FnOnce(&'static Stub)) {
    if std::env::var_os(HERE).is_none() {
        let output = again(test).output().unwrap();
        let read = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, errors) = (read(&output.stdout), read(&output.stderr));
        assert!(output.status.success(), "{test} on the stub: {}\n{out}\n{errors}", output.status);
        assert!(out.contains("1 passed"), "{test} did not run on the stub:\n{out}\n{errors}");
        print!("{out}");
        return;
    }
    std::thread::spawn(|| {
        let told = std::env::var("SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(0);
        std::thread::sleep(Duration::from_secs(LONGEST + told));
        eprintln!("this test hangs");
        std::process::abort();
    });
    let stub: &'static Stub = Box::leak(Box::new(Stub::load()));
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        told(panic);
        for violation in stub.violations() {
            eprintln!("before that: {violation}");
        }
    }));
    body(stub);
    assert_eq!(stub.violations(), Vec::<String>::new());
}

macro_rules! functions {
    ($($name:ident($($arg:ident: $type:ty),*) $(-> $back:ty)?;)*) => {
        impl Stub {
            $(pub(crate) fn $name(&self, $($arg: $type),*) $(-> $back)? {
                // SAFETY: as the stub declares it.
                unsafe {
                    let function: Symbol<'_, unsafe extern "C" fn($($type),*) $(-> $back)?> =
                        self.library.get(stringify!($name).as_bytes()).unwrap();
                    function($($arg),*)
                }
            })*
        }
    };
}

functions! {
    stub_devices(count: u32);
    stub_set_memory(device: u32, bytes: u64);
    stub_set_multiprocessors(device: u32, count: u32);
    stub_set_capability(device: u32, major: u32);
    stub_set_version(version: i32);
    stub_set_peer(from: u32, to: u32, kind: u32);
    stub_forget_peers();
    stub_heal();
    stub_arm(nth: u64, code: i32, nth_kernel: u64, kernel_code: i32);
    stub_disarm(text: *mut c_char, room: usize, kernels: *mut u64) -> usize;
    stub_stall(chances: u32, seed: u64);
    stub_allocate(device: u32, bytes: u64, kind: u32) -> u64;
    stub_free(address: u64);
    stub_peek(address: u64, bytes: usize, into: *mut u8) -> i32;
    stub_poke(address: u64, bytes: usize, from: *const u8) -> i32;
    stub_stream(device: u32, blocking: u32) -> usize;
    stub_destroy_stream(stream: usize);
    stub_drain(device: u32);
    stub_context(device: u32) -> usize;
    stub_depth() -> u32;
    stub_ledger(ledger: *mut Ledger);
    stub_violations(text: *mut c_char, room: usize) -> usize;
    cuCtxSetCurrent(context: usize) -> i32;
    cuCtxGetCurrent(context: *mut usize) -> i32;
    cuStreamBeginCapture_v2(stream: usize, mode: u32) -> i32;
    cuStreamEndCapture(stream: usize, graph: *mut usize) -> i32;
    cuGraphInstantiateWithFlags(executable: *mut usize, graph: usize, flags: u64) -> i32;
    cuGraphLaunch(executable: usize, stream: usize) -> i32;
    cuGraphExecDestroy(executable: usize) -> i32;
    cuGraphDestroy(graph: usize) -> i32;
    cuStreamSynchronize(stream: usize) -> i32;
    cuStreamWaitEvent(stream: usize, event: usize, flags: u32) -> i32;
    cuEventCreate(event: *mut usize, flags: u32) -> i32;
    cuEventRecord(event: usize, stream: usize) -> i32;
    cuEventDestroy_v2(event: usize) -> i32;
}

impl Stub {
    fn load() -> Self {
        // SAFETY: the stub has no initialisers.
        let library = unsafe { Library::new("libcuda.so.1") }.unwrap();
        // SAFETY: only asked for.
        let ours = unsafe { library.get::<unsafe extern "C" fn()>(b"stub_devices") }.is_ok();
        assert!(ours, "another driver was found before the stub");
        Self { library }
    }

    /// Lines of a text that the stub writes.
    fn lines(give: impl Fn(*mut c_char, usize) -> usize) -> Vec<String> {
        let mut buffer = vec![0_u8; 4 << 20];
        let length = give(buffer.as_mut_ptr().cast(), buffer.len()).min(buffer.len());
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        text.lines().map(str::to_owned).collect()
    }

    /// What was done wrong since the last time.
    pub(crate) fn violations(&self) -> Vec<String> {
        Self::lines(|text, room| self.stub_violations(text, room))
    }

    pub(crate) fn set_peer(&self, from: u32, to: u32, peer: Peer) {
        self.stub_set_peer(from, to, peer as u32);
    }

    /// Counts calls, of which the `nth` gives `code`.
    pub(crate) fn arm(&self, nth: usize, code: i32) {
        self.stub_arm(nth as u64, code, 0, 0);
    }

    /// Counts no more, and gives the names of the calls and the number of kernels.
    pub(crate) fn disarm(&self) -> (Vec<String>, u64) {
        let mut kernels = 0;
        let ran = &raw mut kernels;
        let calls = Self::lines(|text, room| self.stub_disarm(text, room, ran));
        (calls, kernels)
    }

    pub(crate) fn ledger(&self) -> Ledger {
        let mut ledger = Ledger::default();
        self.stub_ledger(&raw mut ledger);
        ledger
    }

    /// What the tested code holds, once that is as much as `wanted`, or after some seconds: where devices were at work, a
    /// communicator's memory is freed a little after its end.
    pub(crate) fn settled(&self, wanted: Ledger) -> Ledger {
        let until = Instant::now() + Duration::from_secs(10);
        while self.ledger() != wanted && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.ledger()
    }

    /// Makes a device's context current on this thread; `None` for none.
    pub(crate) fn make_current(&self, device: Option<u32>) {
        let context = device.map_or(0, |device| self.stub_context(device));
        assert_eq!(self.cuCtxSetCurrent(context), 0);
    }

    /// Makes current what was.
    pub(crate) fn restore(&self, (context, _): (usize, u32)) {
        assert_eq!(self.cuCtxSetCurrent(context), 0);
    }

    /// What is current on this thread, and how much lies below it.
    pub(crate) fn current(&self) -> (usize, u32) {
        let mut context = 0;
        assert_eq!(self.cuCtxGetCurrent(&raw mut context), 0);
        (context, self.stub_depth())
    }
}
