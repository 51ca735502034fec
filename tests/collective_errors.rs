//! What callers get wrong, and what the communicator says: every rank hears of it, nobody hangs, nothing is
//! written.

// Where something is missing the test has to fail.
#![allow(clippy::panic, clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tp_rs::comm::{CommOptions, Communicator, DType, Device, Stream, Tensor};
use tp_rs::split::{Share, Split};
use tp_rs::{Error, Kind, Result};

const HERE: Stream = Stream(0);
const CPU: Device = Device::Cpu;

fn communicator(ranks: usize) -> Communicator {
    Communicator::new(&vec![CPU; ranks], &CommOptions::default()).unwrap()
}

fn on_threads<R: Send>(ranks: usize, call: impl Fn(usize) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let call = &call;
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || call(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Checks that a call was refused with words that name all of `parts`.
fn refused(result: Result<()>, parts: &[&str]) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidInput, "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "{error}, without {part:?}");
    }
}

fn f32s(data: &mut [f32], rows: usize) -> Tensor {
    let columns = data.len() / rows;
    Tensor { rows, columns, row_stride: columns, ..Tensor::of_slice(data, DType::F32) }
}

#[test]
fn different_calls_at_one_meeting_are_named_and_write_nothing() {
    let comm = communicator(3);
    for _ in 0..50 {
        let results = on_threads(3, |rank| {
            let mut data = [rank as f32; 4];
            let tensor = f32s(&mut data, 2);
            // SAFETY: the array outlives the call.
            let result = unsafe {
                if rank == 1 {
                    comm.rank_broadcast(1, 2, &tensor, HERE)
                } else {
                    comm.rank_all_reduce(rank, &tensor, HERE)
                }
            };
            assert_eq!(data.map(f32::to_bits), [(rank as f32).to_bits(); 4]);
            result
        });
        for result in results {
            refused(result, &["rank 1", "broadcast with root 2", "all_reduce, as rank 0", "same order"]);
        }
        // They agreed that it was wrong, so they go on.
        for result in on_threads(3, |rank| comm.rank_barrier(rank, HERE)) {
            result.unwrap();
        }
    }
}

#[test]
fn different_shapes_and_types_at_one_meeting_are_named_and_write_nothing() {
    let comm = communicator(2);
    let with = |other: fn(Tensor) -> Tensor| {
        on_threads(2, |rank| {
            let mut data = [rank as f32 + 1.0; 6];
            let tensor = f32s(&mut data, 2);
            let tensor = if rank == 1 { other(tensor) } else { tensor };
            // SAFETY: the array outlives the call, and no view reaches beyond it.
            let result = unsafe { comm.rank_all_reduce(rank, &tensor, HERE) };
            assert_eq!(data.map(f32::to_bits), [(rank as f32 + 1.0).to_bits(); 6]);
            result
        })
    };
    for result in with(|tensor| Tensor { columns: 2, ..tensor }) {
        refused(result, &["all_reduce: tensor of rank 1", "got float32[2, 2]", "wanted [2, 3]", "rank 0"]);
    }
    for result in with(|tensor| Tensor { dtype: DType::F16, ..tensor }) {
        refused(result, &["tensor of rank 1", "got float16[2, 3]", "wanted float32"]);
    }
    for result in with(|tensor| Tensor { device: Device::Cuda(1), ..tensor }) {
        refused(result, &["tensor of rank 1", "on cuda:1", "on cpu, where rank 1 is"]);
    }
    for result in with(|tensor| Tensor { data: 0, ..tensor }) {
        refused(result, &["tensor of rank 1", "address 0"]);
    }
    for result in with(|tensor| Tensor { data: tensor.data + 2, ..tensor }) {
        refused(result, &["tensor of rank 1", "multiple of 4"]);
    }
    for result in with(|tensor| Tensor { row_stride: 2, ..tensor }) {
        refused(result, &["tensor of rank 1", "row stride of 2", "3 or more"]);
    }
    for result in with(|tensor| Tensor { row_stride: usize::MAX / 2, ..tensor }) {
        refused(result, &["tensor of rank 1", "address space"]);
    }
}

#[test]
fn lists_are_checked_like_rank_calls() {
    let comm = communicator(3);
    let mut data = [[1.0_f32; 12], [2.0; 12], [3.0; 12], [4.0; 12]];
    let [a, b, c, d] = &mut data;
    let [a, b, c, d] = [a, b, c, d].map(|data| f32s(data, 2));
    let split = Split::from_counts(&[2, 0, 1]);
    // SAFETY: every array outlives the calls.
    unsafe {
        refused(comm.all_reduce(&[a, b, c, d], &[]), &["tensor 3 of 4", "at most one"]);
        refused(
            comm.all_reduce(&[a, Tensor { device: Device::Cuda(0), ..b }], &[]),
            &["tensor 1 of 2", "cuda:0"],
        );
        refused(comm.all_reduce(&[a, b, b], &[]), &["rank 1", "memory that the tensor of rank 2 uses too"]);
        refused(comm.all_reduce(&[a, b], &[HERE]), &["1 streams", "3, one a rank"]);
        let bytes = [a, b].map(|tensor| Tensor { dtype: DType::U8, ..tensor });
        refused(comm.all_reduce(&bytes, &[]), &["uint8", "float type"]);
        let part = |tensor: Tensor, columns| Tensor { columns, row_stride: columns, ..tensor };
        // 2 units of 2 columns, and 1.
        refused(comm.gather(&[part(a, 4)], &split, 2, &c, &[]), &["parts", "1 tensors", "ranks [0, 2]"]);
        let narrow = comm.gather(&[part(a, 3), part(b, 2)], &split, 2, &c, &[]);
        refused(narrow, &["input of rank 0", "float32[2, 3]", "[2, 4]", "[(0, 0, 2), (2, 2, 3)] x 2"]);
        let short = comm.gather(&[part(a, 4), part(b, 2)], &split, 2, &part(c, 5), &[]);
        refused(short, &["gather: target", "float32[2, 5]", "[2, 6]"]);
        let into_itself = comm.gather(&[part(a, 4), part(b, 2)], &split, 2, &part(a, 6), &[]);
        refused(into_itself, &["gather: target", "the input of rank 0 uses too"]);
        let rows = Tensor { rows: 1, ..part(b, 2) };
        refused(
            comm.gather(&[part(a, 4), rows], &split, 2, &c, &[]),
            &["input of rank 2", "[1, 2]", "as rank 0 has"],
        );
        let wide = comm.reduce_scatter(&[a, b, c], &[part(d, 6), part(d, 2)], &split, 2, &[]);
        refused(wide, &["output of rank 0", "float32[2, 6]", "[2, 4]"]);
        refused(comm.broadcast(&a, &[part(b, 4)], &[]), &["tensor of rank 0", "[2, 4]", "as the source"]);
        let residual = comm.add_residual(&[part(a, 4), part(b, 2)], &[part(c, 5), d], &split, 2, &[]);
        refused(residual, &["input of rank 0", "float32[2, 5]", "[2, 6]"]);
        let gap = Split(vec![Share { rank: 0, start: 0, end: 1 }, Share { rank: 1, start: 2, end: 3 }]);
        refused(comm.gather(&[a, b], &gap, 2, &c, &[]), &["split", "(1, 2, 3)", "starts at 1"]);
        let order = Split(vec![Share { rank: 1, start: 0, end: 1 }, Share { rank: 0, start: 1, end: 3 }]);
        refused(comm.gather(&[a, b], &order, 2, &c, &[]), &["split", "(0, 1, 3)", "ascending"]);
        let stranger = Split(vec![Share { rank: 3, start: 0, end: 3 }]);
        refused(comm.gather(&[a], &stranger, 2, &c, &[]), &["rank 3", "below 3"]);
        let backwards = Split(vec![Share { rank: 0, start: 0, end: 3 }, Share { rank: 1, start: 2, end: 1 }]);
        refused(comm.gather(&[a, b], &backwards, 2, &c, &[]), &["split", "(1, 2, 1)"]);
        let vast = Split(vec![Share { rank: 0, start: 0, end: u64::MAX }]);
        refused(comm.gather(&[a], &vast, 2, &c, &[]), &["split", "64 bits"]);
    }
    let wanted = [1.0_f32, 2.0, 3.0, 4.0].map(f32::to_bits);
    assert!((0..4).all(|index| data[index].iter().all(|value| value.to_bits() == wanted[index])));
}

#[test]
fn ranks_and_roots_outside_are_refused() {
    let comm = communicator(1);
    let mut data = [1.0_f32; 2];
    let tensor = f32s(&mut data, 1);
    // SAFETY: the array outlives the calls.
    unsafe {
        refused(comm.rank_all_reduce(1, &tensor, HERE), &["rank", "got 1", "below 1"]);
        refused(comm.rank_broadcast(0, 7, &tensor, HERE), &["broadcast: root", "got 7", "below 1"]);
        refused(comm.rank_receive_sum(0, &tensor, HERE), &["no rank that gives something"]);
        let split = Split::from_counts(&[2]);
        refused(comm.rank_add_residual(4, &tensor, &tensor, &split, 1, HERE), &["rank", "got 4"]);
        refused(
            comm.rank_gather(0, 0, &tensor, &split, 1, None, HERE),
            &["output of rank 0", "no tensor", "[1, 2]"],
        );
    }
}

#[test]
fn what_cannot_be_made_is_refused() {
    let new = |devices: &[Device], options: CommOptions| Communicator::new(devices, &options).map(|_| ());
    refused(new(&[], CommOptions::default()), &["devices", "0 devices"]);
    refused(new(&[CPU; 65], CommOptions::default()), &["65 devices", "1 to 64"]);
    refused(new(&[CPU, Device::Cuda(0)], CommOptions::default()), &["devices", "cuda:0"]);
    refused(new(&[CPU], CommOptions { timeout: Duration::ZERO, ..CommOptions::default() }), &["timeout"]);
    refused(new(&[CPU], CommOptions { threads: Some(0), ..CommOptions::default() }), &["threads"]);
}

#[test]
fn a_missing_rank_is_named_and_the_communicator_says_so_from_then_on() {
    let options = CommOptions { timeout: Duration::from_millis(100), ..CommOptions::default() };
    let comm = Communicator::new(&[CPU; 3], &options).unwrap();
    let results = on_threads(2, |rank| {
        let mut data = [1.0_f32; 8];
        // SAFETY: the array outlives the call.
        unsafe { comm.rank_all_reduce(rank, &f32s(&mut data, 1), HERE) }
    });
    for result in results {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), Kind::Timeout, "{error}");
        let Error::CollectiveTimeout { operation, missing, .. } = &error else { panic!("{error}") };
        assert_eq!((*operation, missing.as_slice()), ("all_reduce", &[2][..]));
        assert!(error.to_string().contains("[2] did not come within 0.1 s"), "{error}");
    }
    let begin = Instant::now();
    let mut data = [1.0_f32; 8];
    // SAFETY: the array outlives the calls.
    let later =
        unsafe { [comm.rank_barrier(2, HERE), comm.all_reduce(&[f32s(&mut data, 1)], &[]), comm.check()] };
    for result in later {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), Kind::Aborted, "{error}");
        assert!(error.to_string().contains("[2] had not come to all_reduce"), "{error}");
    }
    assert!(begin.elapsed() < Duration::from_millis(90));
}

#[test]
fn abort_and_poll_end_waits() {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    let poll = Arc::new(move || {
        let stop = flag.load(Ordering::Relaxed);
        if stop { Err(Error::Aborted { operation: "poll", reason: "Ctrl-C".into() }) } else { Ok(()) }
    });
    for by_poll in [false, true] {
        let options = CommOptions { poll: Some(poll.clone()), ..CommOptions::default() };
        let comm = Communicator::new(&[CPU; 3], &options).unwrap();
        let begin = Instant::now();
        let errors = on_threads(3, |rank| {
            if rank < 2 {
                return Some(comm.rank_barrier(rank, HERE).unwrap_err());
            }
            thread::sleep(Duration::from_millis(20));
            if by_poll {
                interrupted.store(true, Ordering::Relaxed);
            } else {
                comm.abort("rank 2 raised");
            }
            None
        });
        for error in errors.into_iter().flatten() {
            assert_eq!(error.kind(), Kind::Aborted);
            let word = if by_poll { "Ctrl-C" } else { "rank 2 raised" };
            assert!(error.to_string().contains(word), "{error}");
        }
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
}

#[test]
fn after_a_reset_the_ranks_begin_anew() {
    let comm = communicator(3);
    // One that can go on is left alone.
    comm.reset().unwrap();
    for round in 0..20 {
        let came = 1 + round % 2;
        let errors = on_threads(3, |rank| {
            let mut data = [7.0_f32; 5];
            if rank < came {
                // SAFETY: the array outlives the call.
                return Some(unsafe { comm.rank_all_reduce(rank, &f32s(&mut data, 1), HERE) }.unwrap_err());
            }
            if rank == 2 {
                comm.abort("rank 2 raised");
            }
            None
        });
        assert_eq!(errors.into_iter().flatten().count(), came);
        assert_eq!(comm.check().unwrap_err().kind(), Kind::Aborted);
        comm.reset().unwrap();
        comm.check().unwrap();
        // What was posted before is forgotten: another shape fits.
        let sums = on_threads(3, |rank| {
            let mut data = [rank as f32; 4];
            // SAFETY: the array outlives the call.
            unsafe { comm.rank_all_reduce(rank, &f32s(&mut data, 1), HERE) }.unwrap();
            data.map(f32::to_bits)
        });
        assert_eq!(sums, [[3.0_f32.to_bits(); 4]; 3]);
    }
}

#[test]
fn a_reset_leaves_waits_alone() {
    let comm = communicator(2);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| comm.rank_barrier(0, HERE));
        thread::sleep(Duration::from_millis(20));
        comm.reset().unwrap();
        comm.rank_barrier(1, HERE).unwrap();
        waiting.join().unwrap().unwrap();
    });
}
