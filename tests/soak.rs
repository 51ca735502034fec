//! Random operations on the stub driver with random connections, faults and stalls, for as long as one likes:
//!
//! ```console
//! $ make soak SECONDS=60
//! $ make soak SEED=1234        # one round again, as a failure names it
//! ```
//!
//! Threads come in another order every time, so that a seed may need several runs.

// Sizes of tests are small and known; where something is missing the test has to fail.
#![allow(clippy::cast_possible_truncation, clippy::panic, clippy::print_stdout, clippy::unwrap_used)]

mod stub;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use stub::common::next;
use stub::inject::Bench;
use stub::jobs::{Job, Order};
use stub::operate::{How, LONG, SHORT, run};
use stub::{Peer, Stub, on_stub};
use tp_rs::comm::{CommOptions, Peers};
use tp_rs::{Error, Kind};

const DEVICES: u32 = 5;

/// Random choices, all from one seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        (next(&mut self.0) % limit as u64) as usize
    }

    fn one_in(&mut self, limit: usize) -> bool {
        self.below(limit) == 0
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// What a call may end in once something was made to fail.
fn expected(error: &Error) -> bool {
    matches!(error.kind(), Kind::Device | Kind::Timeout | Kind::Aborted)
}

/// One communicator from its creation to its end.
fn round(stub: &'static Stub, seed: u64) -> usize {
    let mut dice = Dice(seed);
    for (from, to) in (0..DEVICES).flat_map(|from| (0..DEVICES).map(move |to| (from, to))) {
        let peer = dice.of(&[Peer::Works, Peer::Works, Peer::Works, Peer::Absent, Peer::Lies]);
        stub.set_peer(from, to, peer);
    }
    stub.stub_forget_peers();
    let chances = dice.of(&[0, 0, 500, 5000]);
    stub.stub_stall(chances, next(&mut dice.0));
    // Two are special: copy engines may carry what they send.
    let ranks = if dice.one_in(3) { 2 } else { 1 + dice.below(5) };
    let devices: Vec<u32> = (0..ranks).map(|_| dice.below(DEVICES as usize) as u32).collect();
    let options = CommOptions {
        timeout: LONG,
        peers: dice.of(&[Peers::Proved, Peers::Proved, Peers::Staged]),
        pushed_below: dice.of(&[None, Some(0), Some(300)]),
        engines_above: dice.of(&[None, Some(0), Some(3000)]),
        ..CommOptions::default()
    };
    let before = stub.ledger();
    let mut bench = Bench::new(stub, &devices, &options);
    let mut operations = 0;
    for _ in 0..dice.below(12) {
        let how = dice.of(&[How::List, How::Ranks]);
        let order = Order::random(ranks, if dice.one_in(10) { 60_000 } else { 2000 }, next(&mut dice.0));
        let order = if how == How::Ranks { order.on_devices() } else { order };
        let mut job = Job::new(stub, &devices, &order);
        let fault = dice.one_in(3);
        let code = dice.of(&[1, 2, 201, 400, 999, 700, 719]);
        let (nth, kernel) = (1 + dice.below(60) as u64, dice.of(&[0, 0, 0, 1, 2]));
        if fault {
            bench.renew();
            bench.options.timeout = SHORT;
            // The communicator itself may be what fails.
            stub.stub_arm(nth, code, kernel, 700);
            let made = if dice.one_in(2) { bench.make().map(Some) } else { Ok(None) };
            match made {
                Ok(Some(comm)) => bench.keep(comm),
                Ok(None) => {
                    stub.disarm();
                    bench.comm();
                    stub.stub_arm(nth, code, kernel, 700);
                }
                Err(error) => {
                    assert!(expected(&error), "{order:?}: {error}");
                    stub.disarm();
                    stub.stub_heal();
                    bench.comm();
                    stub.stub_arm(nth, code, kernel, 700);
                }
            }
        }
        let result = run(&mut bench, &mut job, how);
        operations += 1;
        match result {
            Ok(()) => assert_eq!(job.verify(how == How::Ranks), Ok(()), "{order:?} on {devices:?}"),
            Err(error) => assert!(fault && expected(&error), "{order:?} on {devices:?}: {error}"),
        }
        if fault {
            // The end may fail as well.
            if dice.one_in(2) {
                stub.disarm();
            }
            bench.give_back();
            stub.disarm();
            bench.options.timeout = LONG;
            bench.renew();
        }
    }
    bench.give_back();
    stub.stub_stall(0, 0);
    let after = stub.ledger();
    // Kernels stay loaded for good.
    let kept =
        stub::Ledger { modules: after.modules, context_references: after.context_references, ..before };
    assert_eq!(stub.settled(kept), kept);
    assert_eq!(stub.violations(), Vec::<String>::new());
    operations
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs rounds for so long, or the one of `SEED`.
fn soak(stub: &'static Stub, time: Duration) {
    stub.stub_devices(DEVICES);
    stub.make_current(Some(DEVICES - 1));
    let begin = Instant::now();
    let again = number("SEED");
    let mut seed = again.unwrap_or_else(|| {
        use std::hash::{BuildHasher, Hasher};
        std::collections::hash_map::RandomState::new().build_hasher().finish() >> 16
    });
    let (mut rounds, mut operations) = (0, 0);
    while rounds == 0 || begin.elapsed() < time {
        let done = catch_unwind(AssertUnwindSafe(|| round(stub, seed)));
        match done {
            Ok(done) => operations += done,
            Err(panic) => {
                println!("\nfailed after {rounds} rounds; once more: make soak SEED={seed}");
                resume_unwind(panic);
            }
        }
        rounds += 1;
        seed = again.unwrap_or(seed.wrapping_add(1));
    }
    println!("\n{rounds} rounds, {operations} operations in {} s", begin.elapsed().as_secs());
}

#[test]
fn short() {
    on_stub("short", |stub| soak(stub, Duration::from_secs(5)));
}

/// `make soak`.
#[test]
#[ignore = "takes as long as it is told to"]
fn long() {
    on_stub("long", |stub| soak(stub, Duration::from_secs(number("SECONDS").unwrap_or(60))));
}
