//! Every driver call may fail. Each one of every scenario does in turn, with each of the errors that it can give: that
//! ends in an error that names call and device, or is tolerated; nothing is lost, nothing hangs, and what is not
//! broken for good works on.
//!
//! `make faults` writes what comes of it to docs/faults.md.

// Where something is missing the test has to fail.
#![allow(clippy::panic, clippy::unwrap_used, clippy::print_stdout)]

mod stub;

use stub::inject::{Bench, Report};
use stub::jobs::{Kind as Operation, Order};
use stub::operate::{How, LONG, capture, creation, dropping, kernels, operation};
use stub::place::Memory;
use stub::{Stub, on_stub};
use tp_rs::comm::{CommOptions, DType, Peers};

fn options() -> CommOptions {
    CommOptions { timeout: LONG, ..CommOptions::default() }
}

fn order(kind: Operation, ranks: usize) -> Order {
    let counts = (1..=ranks as u64).collect();
    let (memory, guest) = (vec![Memory::Plain; ranks], Memory::Plain);
    Order { kind, dtype: DType::F32, rows: 3, dim: 4, counts, memory, guest, seed: 7 }
}

/// Runs scenarios on the stub, and prints their part of the table.
fn inject(test: &str, devices: u32, scenarios: impl FnOnce(&'static Stub, &mut Report)) {
    on_stub(test, |stub| {
        stub.stub_devices(devices);
        // The caller's own context, which everything leaves as it is.
        stub.make_current(Some(devices - 1));
        let mut report = Report::default();
        scenarios(stub, &mut report);
        report.lines().iter().for_each(|line| println!("{line}"));
        println!("{} injections", report.injections());
        assert!(report.injections() > 0);
    });
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
                let order = Order { guest, dim, ..order(kind, 2) };
                let size = if dim > 4 { "large" } else { "small" };
                let scenario = format!("{kind:?}, {size}, {guest:?}");
                let mut bench = Bench::new(stub, &[0, 1], &options());
                operation(&mut bench, &scenario, &order, How::List, report);
            }
        }
    });
}

#[test]
fn kernels_that_fail() {
    inject("kernels_that_fail", 3, |stub, report| {
        for kind in Operation::ALL {
            let mut bench = Bench::new(stub, &[0, 1], &options());
            kernels(&mut bench, &format!("{kind:?}, list call"), &order(kind, 2), report);
        }
    });
}
