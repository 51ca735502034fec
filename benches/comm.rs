//! What collectives on host memory cost: all-reduce of 4 ranks beside a plain sum of the same memory, and the
//! meeting alone.
//!
//! The plain sum is what a loop would do by hand: add four arrays, write the sum back to all four, a thread a
//! core. Goal: all-reduce of 4 MiB takes at most 1.5 times as long.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tp_rs::comm::{CommOptions, Communicator, DType, Device, Stream, Tensor};

const RANKS: usize = 4;

fn communicator(ranks: usize) -> Communicator {
    Communicator::new(&vec![Device::Cpu; ranks], &CommOptions::default())
        .unwrap_or_else(|error| unreachable!("{error}"))
}

fn arrays(elements: usize) -> Vec<Vec<f32>> {
    vec![vec![0.0; elements]; RANKS]
}

/// Adds four arrays element by element and writes the sum to all of them.
fn plain_sum(arrays: &mut [Vec<f32>], threads: usize) {
    let [a, b, c, d] = arrays else { return };
    let add = |a: &mut [f32], b: &mut [f32], c: &mut [f32], d: &mut [f32]| {
        for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
            let sum = *a + *b + *c + *d;
            (*a, *b, *c, *d) = (sum, sum, sum, sum);
        }
    };
    let part = a.len().div_ceil(threads);
    if part * size_of::<f32>() < 256 << 10 {
        return add(a, b, c, d);
    }
    std::thread::scope(|scope| {
        let parts =
            a.chunks_mut(part).zip(b.chunks_mut(part)).zip(c.chunks_mut(part)).zip(d.chunks_mut(part));
        for (((a, b), c), d) in parts {
            scope.spawn(move || add(a, b, c, d));
        }
    });
}

/// The time of `rounds` calls that every rank makes from a thread of its own.
fn on_threads(ranks: usize, rounds: u64, call: impl Fn(usize) + Sync) -> Duration {
    let start = std::sync::Barrier::new(ranks);
    let longest = std::thread::scope(|scope| {
        let (call, start) = (&call, &start);
        let rank = |rank| {
            scope.spawn(move || {
                start.wait();
                let begin = Instant::now();
                (0..rounds).for_each(|_| call(rank));
                begin.elapsed()
            })
        };
        let threads: Vec<_> = (0..ranks).map(rank).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).max()
    });
    longest.unwrap_or_default()
}

fn check(result: tp_rs::Result<()>) {
    result.unwrap_or_else(|error| unreachable!("{error}"));
}

fn all_reduce(criterion: &mut Criterion) {
    let comm = communicator(RANKS);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(RANKS);
    let mut group = criterion.benchmark_group("all_reduce of 4 ranks, float32");
    for kib in [16, 256, 4096] {
        let elements = kib * 1024 / size_of::<f32>();
        group.throughput(Throughput::Bytes((kib * 1024 * RANKS) as u64));
        let mut memory = arrays(elements);
        group.bench_function(BenchmarkId::new("plain sum", format!("{kib} KiB")), |bencher| {
            bencher.iter(|| plain_sum(black_box(&mut memory), threads));
        });
        let tensors: Vec<_> = memory.iter_mut().map(|array| Tensor::of_slice(array, DType::F32)).collect();
        group.bench_function(BenchmarkId::new("list call", format!("{kib} KiB")), |bencher| {
            // SAFETY: the arrays outlive the group, and nothing else uses them meanwhile.
            bencher.iter(|| check(unsafe { comm.all_reduce(&tensors, &[]) }));
        });
        group.bench_function(BenchmarkId::new("a thread a rank", format!("{kib} KiB")), |bencher| {
            bencher.iter_custom(|rounds| {
                // SAFETY: as above; every rank passes a tensor of its own.
                let call =
                    |rank: usize| check(unsafe { comm.rank_all_reduce(rank, &tensors[rank], Stream(0)) });
                on_threads(RANKS, rounds, call)
            });
        });
    }
    group.finish();
}

fn narrow_types(criterion: &mut Criterion) {
    let comm = communicator(RANKS);
    let mut group = criterion.benchmark_group("all_reduce of 4 ranks, 4 MiB, list call");
    for dtype in DType::ALL.into_iter().filter(|dtype| dtype.can_sum()) {
        let mut memory = arrays(1 << 20);
        let tensors: Vec<_> = memory.iter_mut().map(|array| Tensor::of_slice(array, dtype)).collect();
        group.throughput(Throughput::Bytes((RANKS << 22) as u64));
        group.bench_function(dtype.name(), |bencher| {
            // SAFETY: the arrays outlive the group, and nothing else uses them meanwhile.
            bencher.iter(|| check(unsafe { comm.all_reduce(&tensors, &[]) }));
        });
    }
    group.finish();
}

fn barrier(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("barrier");
    for ranks in [2, 4] {
        let comm = communicator(ranks);
        group.bench_function(BenchmarkId::from_parameter(format!("{ranks} ranks")), |bencher| {
            bencher.iter_custom(|rounds| {
                on_threads(ranks, rounds, |rank| check(comm.rank_barrier(rank, Stream(0))))
            });
        });
    }
    group.finish();
}

fn settings() -> Criterion {
    Criterion::default().sample_size(20).measurement_time(Duration::from_secs(2)).without_plots()
}

criterion_group! { name = benches; config = settings(); targets = all_reduce, narrow_types, barrier }
criterion_main!(benches);
