//! Every driver call may fail. Each one of every scenario does in turn, with each of the errors that it can give: that
//! ends in an error that names call and device, or is tolerated; nothing is lost, nothing hangs, and what is not
//! broken for good works on.
//!
//! `make faults` writes what comes of it to docs/faults.md.

// Where something is missing the test has to fail.
#![allow(clippy::panic, clippy::unwrap_used, clippy::print_stdout)]

mod stub;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use stub::inject::{Bench, Outcome, Report, codes_at, names};
use stub::jobs::{Job, Kind as Operation, Order};
use stub::operate::{How, LONG, capture, creation, dropping, kernels, moving, operation, run};
use stub::place::Memory;
use stub::{Ledger, Stub, again, on_stub};
use tp_rs::comm::{CommOptions, Communicator, DType, Device, Peers};

fn options() -> CommOptions {
    CommOptions { timeout: LONG, ..CommOptions::default() }
}

fn order(kind: Operation, ranks: usize) -> Order {
    let counts = (1..=ranks as u64).collect();
    let (memory, guest) = (vec![Memory::Plain; ranks], Memory::Plain);
    Order {
        kind,
        dtype: DType::F32,
        rows: 3,
        dim: 4,
        counts,
        memory,
        guest,
        silent: None,
        receives: false,
        seed: 7,
    }
}

/// Runs scenarios on the stub, and prints their part of the table.
fn inject(test: &str, devices: u32, scenarios: impl FnOnce(&'static Stub, &mut Report)) {
    on_stub(test, |stub| {
        stub.stub_devices(devices);
        // The caller's own context, which everything leaves as it is.
        stub.make_current(Some(devices - 1));
        let mut report = Report::default();
        scenarios(stub, &mut report);
        print_report(&report);
    });
}

/// What `make faults` gathers.
fn print_report(report: &Report) {
    println!();
    for line in report.lines() {
        println!("{line}");
    }
    println!("{} injections", report.injections());
    assert!(report.injections() > 0);
}

#[test]
fn list_calls() {
    inject("list_calls", 3, |stub, report| {
        for kind in Operation::ALL {
            let mut bench = Bench::new(stub, &[0, 1], &options());
            operation(&mut bench, &format!("{kind:?}, list call"), &order(kind, 2), How::List, report);
        }
    });
}

#[test]
fn rank_calls() {
    inject("rank_calls", 3, |stub, report| {
        for kind in Operation::ALL {
            let mut bench = Bench::new(stub, &[0, 1], &options());
            operation(&mut bench, &format!("{kind:?}, rank calls"), &order(kind, 2), How::Ranks, report);
        }
    });
}

/// Copy engines carry everything that they can, between two ranks of a device.
fn engines() -> CommOptions {
    CommOptions { peers: Peers::Staged, engines_above: Some(0), ..options() }
}

/// An operation of three chunks, with gaps between its rows.
fn carried(kind: Operation) -> Order {
    Order { dim: 300, ..order(kind, 2) }
}

#[test]
fn list_calls_by_copy_engines() {
    inject("list_calls_by_copy_engines", 3, |stub, report| {
        let mut bench = Bench::new(stub, &[0, 0], &engines());
        let scenario = "AllReduce by copy engines, list call";
        operation(&mut bench, scenario, &carried(Operation::AllReduce), How::List, report);
    });
}

#[test]
fn rank_calls_by_copy_engines() {
    inject("rank_calls_by_copy_engines", 3, |stub, report| {
        let mut bench = Bench::new(stub, &[0, 1], &engines());
        let scenario = "AllReduce by copy engines, rank calls";
        operation(&mut bench, scenario, &carried(Operation::AllReduce), How::Ranks, report);
    });
}

#[test]
fn captured_calls_by_copy_engines() {
    inject("captured_calls_by_copy_engines", 3, |stub, report| {
        let mut bench = Bench::new(stub, &[0, 1], &engines());
        let scenario = "AllGather by copy engines, captured";
        capture(&mut bench, scenario, &carried(Operation::AllGather), report);
    });
}

#[test]
fn creation_and_end_with_copy_engines() {
    inject("creation_and_end_with_copy_engines", 3, |stub, report| {
        let mut bench = Bench::new(stub, &[0, 1], &engines());
        creation(&mut bench, "creation with copy engines", &carried(Operation::AllReduce), report);
        dropping(&mut bench, "end with copy engines", &carried(Operation::AllReduce), report);
    });
}

#[test]
fn kernels_of_copy_engines_that_fail() {
    inject("kernels_of_copy_engines_that_fail", 3, |stub, report| {
        let mut bench = Bench::new(stub, &[0, 1], &engines());
        let scenario = "AllReduce by copy engines, list call";
        // The first kernels may run before the last copies are enqueued.
        let told_by = [
            "cuStreamSynchronize",
            "cuLaunchKernel",
            "cuEventRecord",
            "cuStreamWaitEvent",
            "cuMemcpyDtoHAsync_v2",
            "cuMemcpyHtoDAsync_v2",
        ];
        kernels(&mut bench, scenario, &carried(Operation::AllReduce), &told_by, report);
    });
}

#[test]
fn creation_and_end() {
    inject("creation_and_end", 3, |stub, report| {
        let order = order(Operation::AllReduce, 2);
        let mut bench = Bench::new(stub, &[0, 1], &options());
        creation(&mut bench, "creation", &order, report);
        dropping(&mut bench, "end", &order, report);
        let mut staged = Bench::new(stub, &[0, 0], &CommOptions { peers: Peers::Staged, ..options() });
        creation(&mut staged, "creation, two ranks of a device", &order, report);
        dropping(&mut staged, "end, two ranks of a device", &order, report);
    });
}

#[test]
fn other_streams() {
    inject("other_streams", 3, |stub, report| {
        let order = order(Operation::AllReduce, 2);
        let mut bench = Bench::new(stub, &[0, 1], &options());
        moving(&mut bench, "list call on other streams", &order, How::List, report);
        moving(&mut bench, "rank calls on other streams", &order, How::Ranks, report);
    });
}

/// The driver's calls before anything is loaded, in a process each: the kernels are loaded once in a process.
#[test]
fn first_creation() {
    const FAULT: &str = "TP_RS_FAULT";
    const CALLED: &str = "called ";
    on_stub("first_creation", |stub| {
        stub.stub_devices(2);
        stub.make_current(Some(1));
        if let Ok(fault) = std::env::var(FAULT) {
            let (nth, code) = fault.split_once(' ').unwrap();
            let (nth, code): (usize, i32) = (nth.parse().unwrap(), code.parse().unwrap());
            let before = stub.current();
            stub.arm(nth, code);
            let made =
                tp_rs::device::cuda_devices().and_then(|_| Communicator::new(&[Device::Cuda(0)], &options()));
            let (calls, _) = stub.disarm();
            assert_eq!(stub.current(), before);
            // Behind the test's name.
            println!();
            for call in &calls {
                println!("{CALLED}{call}");
            }
            let failed = made.is_err();
            if let Err(error) = &made {
                names(error, &calls[nth - 1], code);
            }
            drop(made);
            // What is loaded stays, with its context.
            let modules = stub.ledger().modules;
            let kept = Ledger { modules, context_references: modules, ..Ledger::default() };
            assert_eq!(stub.settled(kept), kept);
            stub.stub_heal();
            drop(Communicator::new(&[Device::Cuda(0)], &options()).unwrap());
            let kept = Ledger { modules: 1, context_references: 1, ..Ledger::default() };
            assert_eq!(stub.settled(kept), kept);
            println!("outcome {failed}");
            return;
        }
        let child = |nth: usize, code: i32| {
            let output = again("first_creation").env(FAULT, format!("{nth} {code}")).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{code} from call {nth}:\n{text}\n{errors}");
            let calls: Vec<String> =
                text.lines().filter_map(|line| line.strip_prefix(CALLED)).map(str::to_owned).collect();
            (calls, text.contains("outcome true"))
        };
        let (calls, failed) = child(0, 0);
        assert!(!failed && calls.len() > 100, "{calls:?}");
        let faults: Vec<(usize, i32)> = (1..=calls.len())
            .flat_map(|nth| codes_at(&calls, nth).into_iter().map(move |code| (nth, code)))
            .collect();
        let report = Mutex::new(Report::default());
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while let Some((nth, code)) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let (_, failed) = child(*nth, *code);
                        let outcome = if failed { Outcome::Works } else { Outcome::Tolerated };
                        report.lock().unwrap().add("first creation", &calls[nth - 1], *nth, *code, outcome);
                    }
                });
            }
        });
        print_report(&report.into_inner().unwrap());
    });
}

#[test]
fn captured_calls() {
    inject("captured_calls", 3, |stub, report| {
        for kind in [Operation::AllReduce, Operation::AllGather, Operation::Gather, Operation::AddResidual] {
            let mut bench = Bench::new(stub, &[0, 1], &options());
            capture(&mut bench, &format!("{kind:?}, captured"), &order(kind, 2), report);
        }
    });
}

#[test]
fn copies_of_host_memory() {
    inject("copies_of_host_memory", 3, |stub, report| {
        for kind in [Operation::Gather, Operation::Broadcast] {
            for (guest, dim) in [(Memory::Pinned, 4), (Memory::Pageable, 4), (Memory::Pinned, 20_000)] {
                let order = Order { dim, guest, ..order(kind, 2) };
                let size = if dim > 4 { "large" } else { "small" };
                let scenario = format!("{kind:?}, {size}, {guest:?}");
                let mut bench = Bench::new(stub, &[0, 1], &options());
                operation(&mut bench, &scenario, &order, How::List, report);
            }
        }
    });
}

#[test]
fn host_memory_is_free_after_a_failed_copy() {
    on_stub("host_memory_is_free_after_a_failed_copy", |stub| {
        stub.stub_devices(3);
        let devices = [0, 1, 2];
        let mut bench = Bench::new(stub, &devices, &options());
        let order = Order { dim: 4000, guest: Memory::Pinned, ..order(Operation::Broadcast, 3) };
        let mut job = Job::new(stub, &devices, &order);
        bench.comm();
        let calls = bench.calls(|bench| run(bench, &mut job, How::List));
        let copies: Vec<usize> =
            (1..=calls.len()).filter(|nth| calls[nth - 1].starts_with("cuMemcpy2DAsync")).collect();
        assert_eq!(copies.len(), 3);
        drop(job);
        // Copies take their time.
        stub.stub_stall(60_000, 1);
        for nth in copies {
            bench.renew();
            bench.comm();
            let mut job = Job::new(stub, &devices, &order);
            let (result, _) = bench.fail(nth, 999, |bench| run(bench, &mut job, How::List));
            let error = result.unwrap_err().to_string();
            assert!(error.contains("cuMemcpy2DAsync_v2"), "{error}");
            // Frees the source; the stub tells of a copy that still reads it.
            drop(job);
            bench.drain();
        }
        stub.stub_stall(0, 0);
    });
}

#[test]
fn kernels_that_fail() {
    inject("kernels_that_fail", 3, |stub, report| {
        for kind in Operation::ALL {
            let mut bench = Bench::new(stub, &[0, 1], &options());
            let told_by = ["cuStreamSynchronize"];
            kernels(&mut bench, &format!("{kind:?}, list call"), &order(kind, 2), &told_by, report);
        }
    });
}
