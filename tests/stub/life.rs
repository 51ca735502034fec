//! The life of a communicator: made, used by list calls and by rank calls, and gone without a trace.

use std::thread;
use std::time::Duration;

use tp_rs::comm::{CommOptions, Communicator, Device, Stream};

use super::common::next;
use super::jobs::{Job, Order};
use super::{Peer, Stub};

/// Waits that a test can end.
pub(crate) fn options() -> CommOptions {
    CommOptions { timeout: Duration::from_secs(30), ..CommOptions::default() }
}

/// Over these devices.
pub(crate) fn communicator(devices: &[u32], options: &CommOptions) -> Communicator {
    let devices: Vec<_> = devices.iter().map(|index| Device::Cuda(*index)).collect();
    Communicator::new(&devices, options).unwrap()
}

/// A number that differs from run to run; printed with what failed.
pub(crate) fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// Does random operations as list calls and as rank calls, and looks at every result.
pub(crate) fn exercise(
    stub: &'static Stub,
    devices: &[u32],
    options: &CommOptions,
    rounds: usize,
    mut seed: u64,
) {
    let comm = communicator(devices, options);
    let streams = comm.streams();
    for _ in 0..rounds {
        // Now and then so large that chunks have to wait for their places.
        let elements = if next(&mut seed).is_multiple_of(6) { 150_000 } else { 4000 };
        let order = Order::random(devices.len(), elements, next(&mut seed));
        let mut job = Job::new(stub, devices, &order);
        job.list(&comm, &streams).unwrap();
        comm.wait(&streams).unwrap();
        assert_eq!(job.verify(false), Ok(()), "list call of {order:?} on {devices:?}");
        let mut job = Job::new(stub, devices, &order.on_devices());
        by_threads(&comm, &mut job, &streams);
        comm.wait(&streams).unwrap();
        assert_eq!(job.verify(true), Ok(()), "rank calls of {order:?} on {devices:?}");
    }
}

/// Makes the job's rank calls, each from a thread of its own.
pub(crate) fn by_threads(comm: &Communicator, job: &mut Job, streams: &[Stream]) {
    thread::scope(|scope| {
        for call in job.rank_calls() {
            let stream = streams[call.rank];
            scope.spawn(move || call.make(comm, stream).unwrap());
        }
    });
}

/// `exercise` with every way of summing, and nothing is left of it.
pub(crate) fn live(stub: &'static Stub, devices: &[u32], options: &CommOptions, rounds: usize) {
    drop(communicator(devices, options));
    let before = stub.ledger();
    let seed = seed() >> 1;
    println!("{devices:?} {options:?} seed {seed}");
    for (pushed_below, seed) in [None, Some(0), Some(200)].into_iter().zip(seed..) {
        let options = CommOptions { pushed_below, ..options.clone() };
        exercise(stub, devices, &options, rounds.div_ceil(3), seed);
    }
    assert_eq!(stub.settled(before), before);
    stub.stub_forget_peers();
}

/// Which device can do what with which other's memory.
pub(crate) fn connect(stub: &Stub, count: u32, peer: impl Fn(u32, u32) -> Peer) {
    for (from, to) in (0..count).flat_map(|from| (0..count).map(move |to| (from, to))) {
        stub.set_peer(from, to, peer(from, to));
    }
}

/// So many devices.
pub(crate) fn first(count: u32) -> Vec<u32> {
    (0..count).collect()
}
