//! The communicator's whole life on the stub driver: any number of devices, whatever their connections.

// Values and sizes of tests are small and known; where something is missing the test has to fail.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, clippy::print_stdout)]

mod stub;

use std::collections::BTreeSet;
use std::time::Duration;

use stub::common::next;
use stub::jobs::{Job, Kind as Operation, Order};
use stub::life::{communicator, connect, first, live, options, seed};
use stub::{Peer, on_stub};
use tp_rs::Kind;
use tp_rs::comm::{CommOptions, Communicator, DType, Device, Peers, Stream};

#[test]
fn every_number_of_devices_gives_the_right_results() {
    on_stub("every_number_of_devices_gives_the_right_results", |stub| {
        stub.stub_devices(8);
        for devices in [1, 2, 3, 5, 8] {
            live(stub, &first(devices), &options(), 24);
        }
        let staged = CommOptions { peers: Peers::Staged, ..options() };
        live(stub, &first(3), &staged, 24);
    });
}

#[test]
fn whatever_reaches_what_the_results_are_right() {
    on_stub("whatever_reaches_what_the_results_are_right", |stub| {
        stub.stub_devices(5);
        let mut seed = seed();
        println!("seed {seed}");
        let lies = Peer::Lies;
        let (works, absent) = (Peer::Works, Peer::Absent);
        for count in [2, 3, 5] {
            connect(stub, count, |_, _| absent);
            live(stub, &first(count), &options(), 36);
            // Pairs of neighbours, as bridges connect them.
            connect(stub, count, |from, to| if from / 2 == to / 2 { works } else { absent });
            live(stub, &first(count), &options(), 36);
            connect(stub, count, |from, to| if from < to { works } else { absent });
            live(stub, &first(count), &options(), 36);
            connect(stub, count, |_, _| lies);
            live(stub, &first(count), &options(), 36);
            connect(stub, count, |from, to| if from > to { works } else { lies });
            live(stub, &first(count), &options(), 36);
            for _ in 0..3 {
                let mut any = move |_, _| [absent, works, lies][(next(&mut seed) % 3) as usize];
                let pairs: Vec<Peer> = (0..count * count).map(|pair| any(pair, 0)).collect();
                println!("{pairs:?}");
                connect(stub, count, |from, to| pairs[(from * count + to) as usize]);
                live(stub, &first(count), &options(), 6);
            }
        }
    });
}

#[test]
fn ranks_that_share_a_device_share_its_processors() {
    on_stub("ranks_that_share_a_device_share_its_processors", |stub| {
        stub.stub_devices(3);
        for (device, processors) in [(0, 8), (1, 5), (2, 2)] {
            stub.stub_set_multiprocessors(device, processors);
        }
        for devices in [&[0, 0][..], &[0, 0, 1], &[1, 0, 1, 0, 2], &[0; 7], &[2, 2]] {
            live(stub, devices, &options(), 12);
            live(stub, devices, &CommOptions { peers: Peers::Staged, ..options() }, 6);
        }
    });
}

#[test]
fn stalls_anywhere_change_nothing() {
    on_stub("stalls_anywhere_change_nothing", |stub| {
        stub.stub_devices(3);
        stub.set_peer(0, 1, Peer::Absent);
        let seed = seed();
        stub.stub_stall(4000, seed);
        live(stub, &first(3), &options(), 30);
        live(stub, &[0, 0, 1], &options(), 30);
        stub.stub_stall(0, 0);
    });
}

#[test]
fn a_communicator_may_end_while_ranks_of_another_wait() {
    on_stub("a_communicator_may_end_while_ranks_of_another_wait", |stub| {
        stub.stub_devices(2);
        for devices in [&[0, 1][..], &[0, 0, 1]] {
            let kept = communicator(devices, &CommOptions { timeout: Duration::from_secs(10), ..options() });
            let streams = kept.streams();
            let before = stub.ledger();
            let random = Order::random(devices.len(), 4000, seed());
            let order = Order { kind: Operation::AllReduce, dtype: DType::F16, silent: None, ..random };
            let ended = communicator(devices, &options());
            let mut job = Job::new(stub, devices, &order.on_devices());
            // This thread launches all ranks: if it waited here, the first would wait for the others in vain.
            let mut ended = Some(ended);
            for call in job.rank_calls() {
                let stream = streams[call.rank];
                call.make(&kept, stream).unwrap();
                drop(ended.take());
            }
            kept.wait(&streams).unwrap();
            assert_eq!(job.verify(true), Ok(()), "{order:?} on {devices:?}");
            drop(job);
            assert_eq!(stub.settled(before), before);
        }
    });
}

#[test]
fn memory_that_runs_out_is_told_and_given_back() {
    on_stub("memory_that_runs_out_is_told_and_given_back", |stub| {
        stub.stub_devices(3);
        let devices = first(3).into_iter().map(Device::Cuda).collect::<Vec<_>>();
        // Other contexts hold what their kernels take; the limits are for what a communicator takes besides.
        drop(Communicator::new(&devices, &options()).unwrap());
        let before = stub.ledger();
        let enough = 64 << 20;
        let mut refused = 0;
        for limits in [[enough, 0, enough], [1 << 10, enough, enough], [enough, enough, 3 << 20]] {
            for (device, limit) in limits.iter().enumerate() {
                stub.stub_set_memory(device as u32, *limit);
            }
            let short = limits.iter().position(|limit| *limit < enough).unwrap();
            let error = Communicator::new(&devices, &options()).unwrap_err();
            assert_eq!(error.kind(), Kind::Device);
            let text = error.to_string();
            for part in ["cuMemAlloc_v2", &format!("cuda:{short}"), "OUT_OF_MEMORY", "gpu_split"] {
                assert!(text.contains(part), "{text}, without {part}");
            }
            assert_eq!(stub.settled(before), before);
            refused += 1;
        }
        assert_eq!(refused, 3);
        // Unequal, and enough.
        for (device, limit) in [32 << 20, enough, 1 << 30].into_iter().enumerate() {
            stub.stub_set_memory(device as u32, limit);
        }
        live(stub, &first(3), &options(), 6);
    });
}

#[test]
fn devices_are_listed_as_the_driver_has_them() {
    on_stub("devices_are_listed_as_the_driver_has_them", |stub| {
        stub.stub_devices(5);
        for device in 0..5 {
            stub.stub_set_memory(device, u64::from(device + 1) << 30);
        }
        stub.make_current(Some(3));
        let (current, before) = (stub.current(), stub.ledger());
        let listed = tp_rs::device::cuda_devices().unwrap();
        assert_eq!(listed.len(), 5);
        for (index, device) in listed.iter().enumerate() {
            assert_eq!((device.index, device.total_bytes), (index, (index as u64 + 1) << 30));
            assert!(device.free_bytes <= device.total_bytes);
            assert!(device.bandwidth_gb_s.unwrap() > 0.0);
        }
        assert_eq!((stub.current(), stub.settled(before)), (current, before));
        let wrong = Communicator::new(&[Device::Cuda(5), Device::Cuda(0)], &options()).unwrap_err();
        assert!(wrong.to_string().contains("cuda:5") && wrong.to_string().contains("cuda:4"), "{wrong}");
    });
}

/// Names that follow `prefix` in text.
fn after<'a>(text: &'a str, prefix: &str) -> impl Iterator<Item = &'a str> {
    text.split(prefix).skip(1).map(|rest| {
        let end = rest.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
        &rest[..end.unwrap_or(rest.len())]
    })
}

#[test]
fn every_driver_function_is_looked_for_before_it_is_called() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![root.join("src")];
    let (mut called, mut looked_for) = (BTreeSet::new(), BTreeSet::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                called.extend(after(&text, "sys::cu").map(str::to_owned));
                looked_for.extend(after(&text, "c\"cu").map(str::to_owned));
            }
        }
    }
    assert!(called.len() > 30, "{called:?}");
    // A symbol that is missing would be a panic inside cudarc.
    assert_eq!(called.difference(&looked_for).collect::<Vec<_>>(), Vec::<&String>::new());
    assert_eq!(looked_for.difference(&called).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[test]
fn default_and_blocking_streams_keep_their_order() {
    on_stub("default_and_blocking_streams_keep_their_order", |stub| {
        stub.stub_devices(2);
        let comm = communicator(&[0, 1], &options());
        let blocking: Vec<_> = (0..2).map(|device| Stream(stub.stub_stream(device, 1))).collect();
        let mut seed = seed();
        let order = Order {
            kind: Operation::AllReduce,
            dtype: DType::F64,
            silent: None,
            ..Order::random(2, 600, next(&mut seed))
        };
        let mut job = Job::new(stub, &[0, 1], &order);
        // The same tensors again and again: a call that overtakes another, or is overtaken half way, shows.
        let calls = 20;
        for _ in 0..calls {
            job.list(&comm, if next(&mut seed).is_multiple_of(2) { &[] } else { &blocking }).unwrap();
        }
        comm.wait(&[]).unwrap();
        comm.wait(&blocking).unwrap();
        job.doubled(calls - 1);
        assert_eq!(job.verify(false), Ok(()));
        drop((job, comm));
        for stream in blocking {
            stub.stub_destroy_stream(stream.0);
        }
    });
}
