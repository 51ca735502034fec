//! Every collective on host memory against sums and copies of its own in plain Rust, on fresh random data:
//! list calls and rank calls, every type, 1 to 8 ranks, odd sizes, ranks with nothing, rows with gaps.

// Values and sizes of tests are small and known; where something is missing the test has to fail.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod common;

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use common::{Matrix, Step, decode, encode, pause, sum_of};
use proptest::prelude::*;
use tp_rs::comm::{CommOptions, Communicator, DType, Device, Stream, Tensor};
use tp_rs::split::{Share, Split};

const HERE: Stream = Stream(0);

fn communicator(ranks: usize) -> Communicator {
    let options =
        CommOptions { timeout: Duration::from_secs(60), threads: Some(3), ..CommOptions::default() };
    Communicator::new(&vec![Device::Cpu; ranks], &options).unwrap()
}

/// Makes a call for every rank from a thread of its own, after a random pause.
fn on_threads(ranks: usize, seed: u64, call: impl Fn(usize) + Sync) {
    thread::scope(|scope| {
        for rank in 0..ranks {
            let call = &call;
            scope.spawn(move || {
                pause(seed ^ rank as u64);
                call(rank);
            });
        }
    });
}

/// What a case runs on.
#[derive(Debug, Clone)]
struct Case {
    dtype: DType,
    rows: usize,
    dim: usize,
    /// Units of every rank, 0 for none.
    counts: Vec<u64>,
    /// Which ranks get a gathered result.
    wants: Vec<bool>,
    seed: u64,
}

impl Case {
    fn ranks(&self) -> usize {
        self.counts.len()
    }

    fn split(&self) -> Split {
        Split::from_counts(&self.counts)
    }

    fn total(&self) -> usize {
        self.counts.iter().sum::<u64>() as usize * self.dim
    }

    fn width(&self, rank: usize) -> usize {
        self.counts[rank] as usize * self.dim
    }

    /// The first column of a rank.
    fn start(&self, rank: usize) -> usize {
        (0..rank).map(|rank| self.width(rank)).sum()
    }

    fn has(&self, rank: usize) -> bool {
        self.counts[rank] > 0
    }

    fn matrices(&self, salt: u64, width: impl Fn(usize) -> usize) -> Vec<Matrix> {
        let matrix = |rank| {
            Matrix::random(self.dtype, self.rows, width(rank), self.seed ^ (salt << 32) ^ (rank as u64 + 1))
        };
        (0..self.ranks()).map(matrix).collect()
    }
}

fn cases(sums: bool) -> impl Strategy<Value = Case> {
    let types: Vec<_> = DType::ALL.into_iter().filter(|dtype| !sums || dtype.can_sum()).collect();
    let counts = prop::collection::vec(prop_oneof![1 => Just(0_u64), 3 => 1_u64..9], 1..=8);
    // Some cases are large enough that ranks share the work and list calls take threads.
    let rows = prop_oneof![8 => 0_usize..6, 4 => 20_usize..60, 1 => 300_usize..400];
    let dim = prop_oneof![3 => 1_usize..5, 2 => 30_usize..70];
    (prop::sample::select(types), rows, dim, counts, prop::collection::vec(any::<bool>(), 8), any::<u64>())
        .prop_map(|(dtype, rows, dim, counts, wants, seed)| Case { dtype, rows, dim, counts, wants, seed })
}

fn tensors(matrices: &mut [Matrix]) -> Vec<Tensor> {
    matrices.iter_mut().map(Matrix::tensor).collect()
}

/// The elements of those whose rank has something.
fn held<T: Clone>(case: &Case, all: &[T]) -> Vec<T> {
    (0..case.ranks()).filter(|rank| case.has(*rank)).map(|rank| all[rank].clone()).collect()
}

/// Runs both kinds of calls on their own copies of the same data and compares every byte of the results, and
/// of the gaps between rows, with what is wanted.
fn both(
    case: &Case,
    outputs: &[Matrix],
    wanted: &[Vec<u8>],
    list: impl Fn(&Communicator, &[Tensor]),
    rank: impl Fn(&Communicator, usize, &Tensor) + Sync,
) -> Result<(), TestCaseError> {
    let comm = communicator(case.ranks());
    let mut of_list = outputs.to_vec();
    list(&comm, &tensors(&mut of_list));
    let mut of_ranks = outputs.to_vec();
    let views = tensors(&mut of_ranks);
    on_threads(case.ranks(), case.seed, |index| rank(&comm, index, &views[index]));
    for (name, results) in [("list", &of_list), ("rank", &of_ranks)] {
        for (index, (result, wanted)) in results.iter().zip(wanted).enumerate() {
            prop_assert!(result.elements() == *wanted, "{name} call, rank {index}");
            prop_assert!(result.gaps() == outputs[index].gaps(), "{name} call, gaps of rank {index}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn all_reduce(case in cases(true), silent in 0_usize..8) {
        let width = case.total();
        let inputs = case.matrices(1, |_| width);
        // One rank may have nothing to add and still get the sum.
        let silent = (silent < case.ranks() && case.ranks() > 1).then_some(silent);
        let adding: Vec<_> = (0..case.ranks()).filter(|rank| Some(*rank) != silent).collect();
        let sum = sum_of(&adding.iter().map(|rank| &inputs[*rank]).collect::<Vec<_>>());
        let comm = communicator(case.ranks());
        let mut of_ranks = inputs.clone();
        let views = tensors(&mut of_ranks);
        on_threads(case.ranks(), case.seed, |rank| {
            let view = &views[rank];
            // SAFETY: every matrix outlives the call and belongs to one rank.
            unsafe {
                if Some(rank) == silent { comm.rank_receive_sum(rank, view, HERE) }
                else { comm.rank_all_reduce(rank, view, HERE) }
            }.unwrap();
        });
        for (rank, result) in of_ranks.iter().enumerate() {
            prop_assert!(result.elements() == sum, "rank {}", rank);
            prop_assert_eq!(result.gaps(), inputs[rank].gaps());
        }
        // A list without the silent rank.
        let mut of_list: Vec<_> = adding.iter().map(|rank| inputs[*rank].clone()).collect();
        // SAFETY: as above.
        unsafe { comm.all_reduce(&tensors(&mut of_list), &[]) }.unwrap();
        for result in &of_list {
            prop_assert_eq!(result.elements(), sum.clone());
        }
    }

    #[test]
    fn broadcast(case in cases(false), root in 0_usize..8) {
        let root = root % case.ranks();
        let width = case.total();
        let mut source = Matrix::random(case.dtype, case.rows, width, case.seed);
        let view = source.tensor();
        let mut targets = case.matrices(1, |rank| if case.wants[rank] { width } else { 0 });
        let wanted: Vec<_> = (0..case.ranks())
            .map(|rank| if case.wants[rank] { source.elements() } else { Vec::new() })
            .collect();
        // The root's target in rank calls is the source itself.
        targets[root] = Matrix::random(case.dtype, case.rows, width, 1);
        let mut wanted = wanted;
        wanted[root] = source.elements();
        both(&case, &targets, &wanted,
            |comm, targets|
                // SAFETY: every matrix outlives the call and belongs to one rank.
                unsafe { comm.broadcast(&view, targets, &[]) }.unwrap(),
            |comm, rank, target|
                // SAFETY: every matrix outlives the call and belongs to one rank.
                unsafe {
                if rank == root {
                    comm.broadcast(&view, std::slice::from_ref(target), &[]).unwrap();
                }
                comm.rank_broadcast(rank, root, target, HERE).unwrap();
            })?;
    }

    #[test]
    fn gather_and_all_gather(case in cases(false), root in 0_usize..8) {
        let root = root % case.ranks();
        let (split, dim, total) = (case.split(), case.dim as u64, case.total());
        let mut parts = case.matrices(1, |rank| case.width(rank));
        let mut whole = vec![0; case.rows * total * case.dtype.size()];
        for (rank, part) in parts.iter().enumerate() {
            common::paste(&mut whole, total, case.start(rank), part);
        }
        let views = tensors(&mut parts);

        // The list call's target belongs to nobody; it stands at the root's place here.
        let mut targets = case.matrices(2, |rank| if rank == root { total } else { 0 });
        let wanted = |gets: &dyn Fn(usize) -> bool| -> Vec<Vec<u8>> {
            (0..case.ranks()).map(|rank| if gets(rank) { whole.clone() } else { Vec::new() }).collect()
        };
        both(&case, &targets, &wanted(&|rank| rank == root),
            |comm, targets|
                // SAFETY: every matrix outlives the call and belongs to one rank.
                unsafe {
                comm.gather(&held(&case, &views), &split, dim, &targets[root], &[]).unwrap();
            },
            |comm, rank, target|
                // SAFETY: every matrix outlives the call and belongs to one rank.
                unsafe {
                let target = (rank == root).then_some(target);
                comm.rank_gather(rank, root, &views[rank], &split, dim, target, HERE).unwrap();
            })?;

        targets = case.matrices(2, |rank| if case.wants[rank] { total } else { 0 });
        let target_split = Split::from_counts(&case.wants.iter().take(case.ranks()).map(|w| u64::from(*w)).collect::<Vec<_>>());
        both(&case, &targets, &wanted(&|rank| case.wants[rank]),
            |comm, targets|
                // SAFETY: every matrix outlives the call and belongs to one rank.
                unsafe {
                let targets: Vec<_> = target_split.ranks().map(|rank| targets[rank]).collect();
                comm.all_gather(&held(&case, &views), &split, &targets, &target_split, dim, &[]).unwrap();
            },
            |comm, rank, target|
                // SAFETY: every matrix outlives the call and belongs to one rank.
                unsafe {
                comm.rank_all_gather(rank, &views[rank], &split, dim, target, HERE).unwrap();
            })?;
    }

    #[test]
    fn reduce_scatter(case in cases(true)) {
        let (split, dim, total) = (case.split(), case.dim as u64, case.total());
        let mut inputs = case.matrices(1, |_| total);
        let sum = sum_of(&inputs.iter().collect::<Vec<_>>());
        let views = tensors(&mut inputs);
        let wanted: Vec<_> = (0..case.ranks())
            .map(|rank| common::cut(&sum, total * case.dtype.size(),
                case.start(rank) * case.dtype.size(), case.width(rank) * case.dtype.size()))
            .collect();
        both(&case, &case.matrices(2, |rank| case.width(rank)), &wanted,
            |comm, outputs|
                // SAFETY: every matrix outlives the call and belongs to one rank.
                unsafe {
                comm.reduce_scatter(&views, &held(&case, outputs), &split, dim, &[]).unwrap();
            },
            |comm, rank, output|
                // SAFETY: every matrix outlives the call and belongs to one rank.
                unsafe {
                comm.rank_reduce_scatter(rank, &views[rank], output, &split, dim, HERE).unwrap();
            })?;
    }

    #[test]
    fn add_residual(case in cases(true)) {
        let (split, dim, total) = (case.split(), case.dim as u64, case.total());
        let mut sources = case.matrices(1, |_| total);
        let targets = case.matrices(2, |rank| case.width(rank));
        let size = case.dtype.size();
        let wanted: Vec<_> = (0..case.ranks()).map(|rank| {
            let columns = common::cut(&sources[rank].elements(), total * size,
                case.start(rank) * size, case.width(rank) * size);
            let addend = Matrix::of_elements(case.dtype, case.rows, case.width(rank), &columns);
            sum_of(&[&targets[rank], &addend])
        }).collect();
        let views = tensors(&mut sources);
        both(&case, &targets, &wanted,
            |comm, targets|
                // SAFETY: every matrix outlives the call and belongs to one rank.
                unsafe {
                comm.add_residual(&held(&case, targets), &held(&case, &views), &split, dim, &[]).unwrap();
            },
            |comm, rank, target|
                // SAFETY: every matrix outlives the call and belongs to one rank.
                unsafe {
                comm.rank_add_residual(rank, target, &views[rank], &split, dim, HERE).unwrap();
            })?;
    }
}

/// The error of a sum against float64: half a unit in the last place of the result's type for rounding it, and
/// a float32 unit an addition.
#[test]
fn sums_are_near_the_exact_ones() {
    for (dtype, half_unit) in [
        (DType::F64, 2_f64.powi(-53)),
        (DType::F32, 2_f64.powi(-24)),
        (DType::F16, 2_f64.powi(-11)),
        (DType::BF16, 2_f64.powi(-8)),
        (DType::F8E4M3, 2_f64.powi(-4)),
        (DType::F8E5M2, 2_f64.powi(-3)),
    ] {
        let mut matrices: Vec<_> =
            (0..6).map(|rank| Matrix::random(dtype, 7, 1001, 9000 + rank + dtype.size() as u64)).collect();
        let before: Vec<Vec<f64>> = matrices.iter().map(|matrix| decode(dtype, &matrix.elements())).collect();
        // SAFETY: the matrices outlive the call.
        unsafe { communicator(6).all_reduce(&tensors(&mut matrices), &[]) }.unwrap();
        for (index, sum) in decode(dtype, &matrices[5].elements()).into_iter().enumerate() {
            let exact: f64 = before.iter().map(|values| values[index]).sum();
            let magnitude: f64 = before.iter().map(|values| values[index].abs()).sum();
            let unit = if dtype == DType::F64 { 2_f64.powi(-53) } else { 2_f64.powi(-24) };
            // Below the smallest normal number of a type of 8 bits the steps no longer shrink.
            let bound = exact.abs() * half_unit * 1.001 + 6.0 * magnitude * unit + 2_f64.powi(-10);
            let bound = if dtype.size() == 1 { bound } else { bound - 2_f64.powi(-10) + 2_f64.powi(-25) };
            assert!((sum - exact).abs() <= bound, "{dtype}: {sum}, not {exact}");
        }
    }
}

#[test]
fn special_values_follow_ieee() {
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    let columns = [(-0.0, -0.0, -0.0), (-0.0, 0.0, 0.0), (inf, 1.0, inf), (inf, -inf, nan), (nan, 1.0, nan)];
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8E5M2] {
        let row =
            |pick: fn(&(f64, f64, f64)) -> f64| encode(dtype, &columns.iter().map(pick).collect::<Vec<_>>());
        let mut matrices = [row(|c| c.0), row(|c| c.1)].map(|row| Matrix::of_elements(dtype, 1, 5, &row));
        // SAFETY: the matrices outlive the call.
        unsafe { communicator(2).all_reduce(&tensors(&mut matrices), &[]) }.unwrap();
        for (got, (_, _, wanted)) in decode(dtype, &matrices[0].elements()).into_iter().zip(columns) {
            assert!(
                got.to_bits() == wanted.to_bits() || got.is_nan() && wanted.is_nan(),
                "{dtype}: {got} {wanted}"
            );
        }
        assert_eq!(matrices[0].elements(), matrices[1].elements());
    }
}

#[test]
fn heads_that_two_ranks_hold_are_gathered_once() {
    // Head 1 is on both ranks.
    let split = Split(vec![Share { rank: 0, start: 0, end: 2 }, Share { rank: 1, start: 1, end: 3 }]);
    let mut parts = [[0_u8, 1, 2, 3], [92, 93, 4, 5]];
    let mut whole = [9_u8; 6];
    let views = [0, 1].map(|rank| Tensor::of_slice(&mut parts[rank], DType::U8));
    let target = Tensor::of_slice(&mut whole, DType::U8);
    // SAFETY: the arrays outlive the call.
    unsafe { communicator(2).gather(&views, &split, 2, &target, &[]) }.unwrap();
    assert_eq!(whole, [0, 1, 2, 3, 4, 5]);
}

/// Thousands of small calls of changing kinds in a row, with ranks that come at random times.
#[test]
fn long_runs_of_mixed_rank_calls_stay_in_step() {
    let ranks = 3;
    let comm = communicator(ranks);
    let start = Barrier::new(ranks);
    let split = Split::from_counts(&[2, 0, 1]);
    on_threads(ranks, 5, |rank| {
        start.wait();
        for step in 0..3000_usize {
            if step % 97 == rank {
                pause(step as u64);
            }
            let kind = Step::of(step);
            let elements = if kind == Step::Large { 40_000 } else { 12 };
            let mut own = vec![(rank + step) as f32; elements];
            let mut all = vec![0.0_f32; 9];
            let tensor = Tensor::of_slice(&mut own, DType::F32);
            // SAFETY: the memory outlives the call and belongs to this rank.
            unsafe {
                match kind {
                    Step::Small | Step::Large => {
                        comm.rank_all_reduce(rank, &tensor, HERE).unwrap();
                        let wanted = (3 * step + 3) as f32;
                        assert!(own.iter().all(|value| value.to_bits() == wanted.to_bits()));
                    }
                    Step::Broadcast => {
                        comm.rank_broadcast(rank, step % ranks, &tensor, HERE).unwrap();
                        assert_eq!(own[11].to_bits(), ((step % ranks + step) as f32).to_bits());
                    }
                    Step::Gather => {
                        let width = [6, 0, 3][rank];
                        let part = Tensor::of_slice(&mut own[..width], DType::F32);
                        let target = Tensor::of_slice(&mut all, DType::F32);
                        comm.rank_all_gather(rank, &part, &split, 3, &target, HERE).unwrap();
                        let wanted = |index| if index < 6 { step as f32 } else { (2 + step) as f32 };
                        assert!((0..9).all(|index| all[index].to_bits() == f32::to_bits(wanted(index))));
                    }
                    Step::Barrier => comm.rank_barrier(rank, HERE).unwrap(),
                }
            }
        }
    });
}
