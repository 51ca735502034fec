//! Copy engines and large staged sums, between ranks out of each other's reach on the stub driver.

// Where something is missing the test has to fail.
#![allow(clippy::unwrap_used)]

mod stub;

use std::time::Duration;

use stub::jobs::{Job, Kind as Operation, Order};
use stub::life::{by_threads, communicator, connect, live, options, seed};
use stub::{Peer, on_stub};
use tp_rs::Kind;
use tp_rs::comm::{CommOptions, DType, Peers, Stream};

#[test]
fn copy_engines_carry_what_two_ranks_send() {
    on_stub("copy_engines_carry_what_two_ranks_send", |stub| {
        stub.stub_devices(2);
        let engines = CommOptions { engines_above: Some(0), ..options() };
        connect(stub, 2, |_, _| Peer::Absent);
        live(stub, &[0, 1], &engines, 60);
        // Smaller operations go another way.
        live(stub, &[0, 1], &CommOptions { engines_above: Some(5000), ..options() }, 60);
        live(stub, &[0, 0], &CommOptions { peers: Peers::Staged, ..engines.clone() }, 60);
        // One of the two reaches the other: without engines.
        connect(stub, 2, |from, to| if from < to { Peer::Works } else { Peer::Absent });
        live(stub, &[0, 1], &engines, 6);
    });
}

/// A large operation with gaps between rows, of more chunks than there are slots.
fn carried(kind: Operation) -> Order {
    Order {
        kind,
        dtype: DType::F64,
        rows: 5,
        dim: 2501,
        counts: vec![1, 2],
        memory: vec![stub::place::Memory::Plain; 2],
        guest: stub::place::Memory::Plain,
        silent: None,
        receives: false,
        seed: seed(),
    }
}

fn chunks_of(calls: &[String]) -> usize {
    calls.iter().filter(|call| *call == "cuMemcpyHtoDAsync_v2").count()
}

#[test]
fn copy_engines_go_on_in_graphs_beside_eager_calls() {
    on_stub("copy_engines_go_on_in_graphs_beside_eager_calls", |stub| {
        stub.stub_devices(2);
        connect(stub, 2, |_, _| Peer::Absent);
        let engines = CommOptions { engines_above: Some(1000), ..options() };
        let staged = CommOptions { peers: Peers::Staged, ..engines.clone() };
        // The last ones share a stream, and so a graph.
        for (devices, options, shared) in
            [([0, 1], &engines, false), ([0, 0], &staged, false), ([0, 0], &staged, true)]
        {
            let comm = communicator(&devices, options);
            let eager = comm.streams();
            let captured: Vec<_> =
                devices.iter().map(|device| Stream(stub.stub_stream(*device, 0))).collect();
            let on = if shared { vec![captured[0]; 2] } else { captured.clone() };
            let graphs = &captured[..if shared { 1 } else { 2 }];
            for kind in [Operation::AllReduce, Operation::AllGather, Operation::Gather, Operation::Broadcast]
            {
                let mut job = Job::new(stub, &devices, &carried(kind));
                let mut other = Job::new(stub, &devices, &carried(kind));
                for (stream, device) in graphs.iter().zip(devices) {
                    stub.make_current(Some(device));
                    assert_eq!(stub.cuStreamBeginCapture_v2(stream.0, 2), 0);
                }
                job.list(&comm, &on).unwrap();
                // Before the capture ends.
                stub.arm(0, 0);
                other.list(&comm, &eager).unwrap();
                let (calls, _) = stub.disarm();
                assert!(chunks_of(&calls) > 4, "{kind:?}: {calls:?}");
                let executables: Vec<usize> = graphs
                    .iter()
                    .zip(devices)
                    .map(|(stream, device)| {
                        stub.make_current(Some(device));
                        let (mut graph, mut executable) = (0, 0);
                        assert_eq!(stub.cuStreamEndCapture(stream.0, &raw mut graph), 0);
                        assert_eq!(stub.cuGraphInstantiateWithFlags(&raw mut executable, graph, 0), 0);
                        assert_eq!(stub.cuGraphDestroy(graph), 0);
                        executable
                    })
                    .collect();
                for _ in 0..3 {
                    comm.wait(&eager).unwrap();
                    assert_eq!(other.verify(false), Ok(()), "{kind:?}");
                    for ((stream, device), executable) in graphs.iter().zip(devices).zip(&executables) {
                        stub.make_current(Some(device));
                        assert_eq!(stub.cuGraphLaunch(*executable, stream.0), 0);
                    }
                    comm.wait(&on).unwrap();
                    assert_eq!(job.verify(false), Ok(()), "{kind:?}");
                    job.reset();
                    other.reset();
                    other.list(&comm, &eager).unwrap();
                }
                comm.wait(&eager).unwrap();
                for executable in executables {
                    assert_eq!(stub.cuGraphExecDestroy(executable), 0);
                }
            }
            for stream in captured {
                stub.stub_destroy_stream(stream.0);
            }
        }
    });
}

#[test]
fn copy_engines_do_not_wait_for_a_rank_that_does_not_come() {
    on_stub("copy_engines_do_not_wait_for_a_rank_that_does_not_come", |stub| {
        stub.stub_devices(2);
        connect(stub, 2, |_, _| Peer::Absent);
        let engines = CommOptions { engines_above: Some(1000), ..options() };
        let short = CommOptions { timeout: Duration::from_millis(200), ..engines.clone() };
        for first in 0..2 {
            let mut job = Job::new(stub, &[0, 1], &carried(Operation::AllReduce));
            let comm = communicator(&[0, 1], &short);
            let streams = comm.streams();
            job.rank_calls()[first].make(&comm, streams[first]).unwrap();
            let error = comm.wait(&streams).unwrap_err();
            assert_eq!(error.kind(), Kind::Timeout, "{error}");
            assert!(error.to_string().contains(&format!("[{}]", 1 - first)), "{error}");
            comm.reset().unwrap();
            job.reset();
            by_threads(&comm, &mut job, &streams);
            comm.wait(&streams).unwrap();
            assert_eq!(job.verify(true), Ok(()));
        }
        // A rank that makes another call is found before anything is touched.
        let comm = communicator(&[0, 1], &engines);
        let streams = comm.streams();
        let mut sum = Job::new(stub, &[0, 1], &carried(Operation::AllReduce));
        let mut other = Job::new(stub, &[0, 1], &Order { dim: 7, ..carried(Operation::AllReduce) });
        sum.rank_calls()[0].make(&comm, streams[0]).unwrap();
        other.rank_calls()[1].make(&comm, streams[1]).unwrap();
        let error = comm.wait(&streams).unwrap_err().to_string();
        assert!(error.contains("another call from ranks"), "{error}");
        comm.reset().unwrap();
        by_threads(&comm, &mut sum, &streams);
        comm.wait(&streams).unwrap();
        assert_eq!(sum.verify(true), Ok(()));
    });
}

#[test]
fn a_rank_may_get_a_large_staged_sum_without_adding_to_it() {
    on_stub("a_rank_may_get_a_large_staged_sum_without_adding_to_it", |stub| {
        stub.stub_devices(3);
        let staged = CommOptions {
            peers: Peers::Staged,
            pushed_below: Some(0),
            timeout: Duration::from_secs(10),
            ..options()
        };
        let engines = CommOptions { engines_above: Some(0), ..staged.clone() };
        for (devices, options) in
            [(&[0, 1][..], &staged), (&[0, 1], &engines), (&[0, 1, 2], &staged), (&[0, 1, 1], &staged)]
        {
            for silent in 0..devices.len() {
                // More chunks than a block has slots.
                let order = Order {
                    kind: Operation::AllReduce,
                    dtype: DType::F64,
                    rows: 3,
                    dim: 12_000,
                    counts: vec![1; devices.len()],
                    memory: vec![stub::place::Memory::Plain; devices.len()],
                    guest: stub::place::Memory::Plain,
                    silent: Some(silent),
                    receives: true,
                    seed: seed(),
                };
                let comm = communicator(devices, options);
                let streams = comm.streams();
                let mut job = Job::new(stub, devices, &order);
                by_threads(&comm, &mut job, &streams);
                comm.wait(&streams).unwrap();
                assert_eq!(job.verify(true), Ok(()), "rank {silent} of {devices:?}");
            }
        }
    });
}
