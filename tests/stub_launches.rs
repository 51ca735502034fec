//! Which kernels are launched early, on devices and drivers of any age.

// Values and sizes of tests are small and known; where something is missing the test has to fail.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, clippy::print_stdout)]

mod stub;

use std::time::Duration;

use stub::common::next;
use stub::jobs::{Job, Kind, Order};
use stub::life::seed;
use stub::{Stub, on_stub};
use tp_rs::comm::{CommOptions, Communicator, DType, Device, Stream};

const EARLY: &str = "cuLaunchKernelEx";
const PLAIN: &str = "cuLaunchKernel";
const REFUSED: i32 = 801;

struct Ranks {
    stub: &'static Stub,
    comm: Communicator,
    streams: Vec<Stream>,
    seed: u64,
}

impl Ranks {
    /// A rank on each of two devices with these compute capabilities, under a driver of this version.
    fn new(stub: &'static Stub, capabilities: [u32; 2], version: i32) -> Self {
        stub.stub_devices(2);
        for (device, major) in capabilities.into_iter().enumerate() {
            stub.stub_set_capability(device as u32, major);
        }
        stub.stub_set_version(version);
        let options = CommOptions { timeout: Duration::from_secs(30), ..CommOptions::default() };
        let comm = Communicator::new(&[Device::Cuda(0), Device::Cuda(1)], &options).unwrap();
        let (streams, seed) = (comm.streams(), seed());
        println!("capabilities {capabilities:?}, driver {version}, seed {seed}");
        Self { stub, comm, streams, seed }
    }

    /// Does an operation, whose `nth` driver call is refused, and looks at the results. Gives the names of its calls.
    fn operate(&self, order: &Order, nth: usize) -> Vec<String> {
        let mut job = Job::new(self.stub, &[0, 1], order);
        self.stub.arm(nth, REFUSED);
        let made = job.list(&self.comm, &self.streams);
        let (calls, _) = self.stub.disarm();
        made.unwrap();
        self.comm.wait(&self.streams).unwrap();
        assert_eq!(job.verify(false), Ok(()), "{order:?}");
        calls
    }

    /// The launches of many operations: how many were early, and how many not.
    fn launches(&mut self) -> (usize, usize) {
        let mut calls = Vec::new();
        for _ in 0..40 {
            let order = Order::random(2, 4000, next(&mut self.seed)).on_devices();
            calls.extend(self.operate(&order, 0));
        }
        let count = |name| calls.iter().filter(|call| *call == name).count();
        (count(EARLY), count(PLAIN))
    }
}

#[test]
fn new_devices_start_kernels_early() {
    on_stub("new_devices_start_kernels_early", |stub| {
        let (early, plain) = Ranks::new(stub, [9, 12], 12_030).launches();
        assert!(early > 0 && plain == 0, "{early} early launches, {plain} plain ones");
    });
}

#[test]
fn older_devices_do_not() {
    on_stub("older_devices_do_not", |stub| {
        let (early, plain) = Ranks::new(stub, [8, 7], 13_000).launches();
        assert!(early == 0 && plain > 0, "{early} early launches, {plain} plain ones");
    });
}

#[test]
fn nor_does_a_driver_that_could_not_capture_it() {
    on_stub("nor_does_a_driver_that_could_not_capture_it", |stub| {
        let (early, plain) = Ranks::new(stub, [9, 9], 12_020).launches();
        assert!(early == 0 && plain > 0, "{early} early launches, {plain} plain ones");
    });
}

#[test]
fn each_device_does_what_it_can() {
    on_stub("each_device_does_what_it_can", |stub| {
        let (early, plain) = Ranks::new(stub, [8, 9], 12_080).launches();
        assert!(early > 0 && plain > 0, "{early} early launches, {plain} plain ones");
    });
}

#[test]
fn a_driver_that_refuses_is_not_asked_again() {
    on_stub("a_driver_that_refuses_is_not_asked_again", |stub| {
        let mut ranks = Ranks::new(stub, [9, 9], 12_080);
        let order = Order {
            kind: Kind::AllReduce,
            dtype: DType::F32,
            silent: None,
            ..Order::random(2, 4000, next(&mut ranks.seed)).on_devices()
        };
        // The first call makes others than those after it.
        ranks.operate(&order, 0);
        for left in [1, 0] {
            let calls = ranks.operate(&order, 0);
            let nth = 1 + calls.iter().position(|call| call == EARLY).unwrap();
            let calls = ranks.operate(&order, nth);
            let mut launches = calls[nth - 1..].iter().filter(|call| [EARLY, PLAIN].contains(&call.as_str()));
            assert_eq!(
                (launches.next().unwrap().as_str(), launches.next().unwrap().as_str()),
                (EARLY, PLAIN)
            );
            assert_eq!(launches.filter(|call| *call == EARLY).count(), left);
        }
        let (early, plain) = ranks.launches();
        assert!(early == 0 && plain > 0, "{early} early launches, {plain} plain ones");
    });
}
