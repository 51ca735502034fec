//! The solver against the enumeration of every split, on thousands of random small cases.
//!
//! The enumeration has its own formulas for bytes and times, straight from the definition in the documentation of
//! `split::balance`; it shares nothing with the solver but the numbers of the case.

// A test that meets what it did not expect has to stop there.
#![allow(clippy::cast_possible_truncation, clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::cell::Cell;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tp_rs::split::balance::{Balanced, balance};
use tp_rs::split::workload::{Axis, Basis, Blocks, Cost, Workload};
use tp_rs::split::{GIB, Item, Options, RankBudget, Share, Splits, account};

/// Coefficients of a case: what one unit of each thing takes and what is read of it.
#[derive(Debug, Clone)]
struct Case {
    kv_heads: u64,
    group: u64,
    columns: u64,
    rows: u64,
    per_rank: u64,
    per_attention_rank: (u64, u64),
    per_query_head: (u64, u64),
    per_kv_head: (u64, u64),
    per_column: (u64, u64),
    per_row: (u64, u64),
    activation_head: u64,
    activation_attention: u64,
    activation_column: u64,
    activation_floor: u64,
    framework: u64,
    budgets: Vec<u64>,
    speeds: Vec<f64>,
    share_heads: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    query: u64,
    kv: u64,
    columns: u64,
    rows: u64,
}

impl Case {
    fn bytes(&self, held: Held) -> u64 {
        if held.query + held.columns + held.rows == 0 {
            return 0;
        }
        let attention = if held.query > 0 {
            self.per_attention_rank.0 + held.query * self.per_query_head.0 + held.kv * self.per_kv_head.0
        } else {
            0
        };
        let alone = if held.query > 0 { self.activation_attention } else { 0 };
        let alive = (held.query * self.activation_head + alone)
            .max(held.columns * self.activation_column)
            .max(self.activation_floor);
        let lines = held.columns * self.per_column.0 + held.rows * self.per_row.0;
        self.per_rank + self.framework + attention + lines + alive
    }

    fn attention_read(&self, held: Held) -> f64 {
        if held.query == 0 {
            return 0.0;
        }
        (self.per_attention_rank.1 + held.query * self.per_query_head.1 + held.kv * self.per_kv_head.1) as f64
    }

    fn time(&self, ranks: &[Held]) -> f64 {
        let slowest = |read: &dyn Fn(&Held) -> f64| {
            ranks.iter().zip(&self.speeds).map(|(held, speed)| read(held) / speed).fold(0.0, f64::max)
        };
        slowest(&|held| self.attention_read(*held))
            + slowest(&|held| (held.columns * self.per_column.1) as f64)
            + slowest(&|held| (held.rows * self.per_row.1) as f64)
    }

    fn workload(&self) -> Workload {
        let axis = |total| Axis { total, grid: 1, step: 1 };
        let cost = |basis, (bytes, read): (u64, u64), count: u64| Cost {
            item: Item::Replicated,
            basis,
            bytes: bytes * count,
            read: read * count,
        };
        let query_heads = self.kv_heads * self.group;
        Workload {
            kv_heads: axis(self.kv_heads),
            query_heads_per_kv_head: self.group,
            query_head_step: 1,
            hidden: axis(64),
            intermediate: axis(self.columns),
            widths: Vec::new(),
            vocabulary: axis(self.rows),
            blocks: Blocks::default(),
            experts: None,
            costs: vec![
                cost(Basis::Rank, (self.per_rank, 0), 1),
                cost(Basis::AttentionRank, self.per_attention_rank, 1),
                cost(Basis::QueryHeads, self.per_query_head, query_heads),
                cost(Basis::KvHeads, self.per_kv_head, self.kv_heads),
                cost(Basis::Intermediate, self.per_column, self.columns),
                cost(Basis::Vocabulary, self.per_row, self.rows),
            ],
            activation_base: 0,
            activation_attention: self.activation_head * query_heads,
            activation_attention_alone: self.activation_attention,
            activation_mlp: self.activation_column * self.columns,
            communicator_bytes: 0,
            activation_floor: self.activation_floor,
            buffer_bytes: 0,
            pinned_bytes: 0,
        }
    }

    fn ranks(&self) -> Vec<RankBudget> {
        let ranks = self.budgets.iter().zip(&self.speeds).enumerate();
        ranks
            .map(|(index, (bytes, speed))| {
                let mut rank = RankBudget::cuda(index, *bytes as f64 / GIB as f64).with_speed(*speed);
                rank.framework_bytes = self.framework;
                rank
            })
            .collect()
    }

    /// Every way to give the query heads out: counts a rank, and the KV heads that each stores.
    fn head_choices(&self) -> Vec<Vec<(u64, u64)>> {
        let (group, n) = (self.group, self.budgets.len());
        let all = compositions(self.kv_heads * group, n);
        let held = |counts: Vec<u64>| {
            let mut start = 0;
            let ranks = counts.into_iter().map(|count| {
                let (from, to) = (start, start + count);
                start = to;
                let whole = from % group == 0 && to % group == 0;
                // Every KV head that the query heads belong to is stored.
                let stored = if count == 0 { 0 } else { to.div_ceil(group) - from / group };
                (count == 0 || whole || self.share_heads).then_some((count, stored))
            });
            ranks.collect::<Option<Vec<_>>>()
        };
        all.into_iter().filter_map(held).collect()
    }

    /// The least time of any split that fits.
    fn enumerate(&self) -> Option<f64> {
        let n = self.budgets.len();
        let (columns, rows) = (compositions(self.columns, n), compositions(self.rows, n));
        let mut best: Option<f64> = None;
        for heads in self.head_choices() {
            for columns in &columns {
                let without_rows: Vec<Held> = (0..n)
                    .map(|r| Held { query: heads[r].0, kv: heads[r].1, columns: columns[r], rows: 0 })
                    .collect();
                if (0..n).any(|r| self.bytes(without_rows[r]) > self.budgets[r]) {
                    continue;
                }
                for rows in &rows {
                    let held: Vec<Held> = (0..n).map(|r| Held { rows: rows[r], ..without_rows[r] }).collect();
                    if (0..n).all(|r| self.bytes(held[r]) <= self.budgets[r]) {
                        let time = self.time(&held);
                        best = Some(best.map_or(time, |best| best.min(time)));
                    }
                }
            }
        }
        best
    }
}

fn compositions(total: u64, parts: usize) -> Vec<Vec<u64>> {
    if parts == 1 {
        return vec![vec![total]];
    }
    (0..=total)
        .flat_map(|first| {
            compositions(total - first, parts - 1).into_iter().map(move |mut rest| {
                rest.insert(0, first);
                rest
            })
        })
        .collect()
}

fn case() -> impl Strategy<Value = Case> {
    let pair = |most: u64| (0..most, 1..most).prop_map(|(read, more)| (read + more, read.max(1)));
    let sizes = (2_usize..=4).prop_flat_map(|n| {
        let units = if n == 4 { 5_u64 } else { 8 };
        (1_u64..=4, 1_u64..=3, 0..=units, 0..=units, Just(n), any::<bool>())
    });
    let costs =
        (0_u64..40, pair(60), pair(60), pair(60), pair(90), pair(40), 0_u64..12, 0_u64..12, 0_u64..30);
    // Activations that do not follow the shares; half of the cases have none.
    let fixed = prop_oneof![Just((0, 0)), (0_u64..40, 0_u64..90)];
    (sizes, costs, fixed, any::<u64>(), 0_u8..4).prop_map(|(sizes, costs, fixed, seed, tightness)| {
        let (kv_heads, group, columns, rows, n, share_heads) = sizes;
        let (per_rank, rank, query, kv, column, row, activation_head, activation_column, framework) = costs;
        // A read of less than a byte would make equal times differ by rounding alone.
        let mut case = Case {
            kv_heads,
            group,
            columns,
            rows,
            per_rank,
            per_attention_rank: if seed % 3 == 0 { rank } else { (0, 0) },
            per_query_head: query,
            per_kv_head: kv,
            per_column: column,
            per_row: row,
            activation_head,
            activation_attention: fixed.0,
            activation_column,
            activation_floor: fixed.1,
            framework,
            budgets: vec![0; n],
            speeds: vec![1.0; n],
            share_heads: share_heads && kv_heads * group <= 8,
        };
        fill(&mut case, seed, tightness);
        case
    })
}

/// Budgets around what a random split takes (binding, just too small, ample, or with a rank that holds nothing),
/// and speeds that are equal or mixed.
fn fill(case: &mut Case, seed: u64, tightness: u8) {
    let mut state = seed | 1;
    let mut next = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below.max(1)
    };
    let n = case.budgets.len();
    let mut held = vec![Held { query: 0, kv: 0, columns: 0, rows: 0 }; n];
    for _ in 0..case.kv_heads {
        let rank = next(n as u64) as usize;
        held[rank].query += case.group;
        held[rank].kv += 1;
    }
    for _ in 0..case.columns {
        held[next(n as u64) as usize].columns += 1;
    }
    for _ in 0..case.rows {
        held[next(n as u64) as usize].rows += 1;
    }
    for (rank, held) in held.iter().enumerate() {
        let exact = case.bytes(*held);
        case.budgets[rank] = match tightness {
            0 => exact + next(30),
            1 => exact * (85 + next(30)) / 100,
            2 => exact * 3 + 500,
            _ => [0, exact + 100, exact * 2 + 50][next(3) as usize],
        };
        if next(2) == 0 {
            case.speeds[rank] = 1.0 + next(4) as f64 * 0.5;
        }
    }
}

fn held_by(case: &Case, balanced: &Balanced) -> Vec<Held> {
    (0..case.budgets.len())
        .map(|rank| Held {
            query: balanced.q.count(rank),
            kv: balanced.kv.count(rank),
            columns: balanced.id.count(rank),
            rows: balanced.vc.count(rank),
        })
        .collect()
}

#[test]
fn balanced_splits_are_optimal_and_found_whenever_any_fits() {
    let mut runner = TestRunner::new(Config {
        cases: Config::default().cases.max(3000),
        max_shrink_iters: 400,
        ..Config::default()
    });
    let (fitting, binding, none, shared) = (Cell::new(0), Cell::new(0), Cell::new(0), Cell::new(0));
    let count = |of: &Cell<u32>, yes: bool| of.set(of.get() + u32::from(yes));
    runner
        .run(&case(), |case| {
            let options = Options { duplicate_kv: case.share_heads, ..Options::default() };
            let found = balance(&case.workload(), &case.ranks(), &options);
            let best = case.enumerate();
            match (&found, best) {
                (None, None) => count(&none, true),
                (Some(balanced), Some(best)) => {
                    let held = held_by(&case, balanced);
                    for (rank, held) in held.iter().enumerate() {
                        prop_assert!(case.bytes(*held) <= case.budgets[rank], "rank {} of {:?}", rank, held);
                    }
                    prop_assert_eq!(balanced.q.total(), case.kv_heads * case.group);
                    prop_assert_eq!(balanced.id.total(), case.columns);
                    prop_assert_eq!(balanced.vc.total(), case.rows);
                    let time = case.time(&held);
                    prop_assert!(time <= best * (1.0 + 1e-9), "time {} against {}: {:?}", time, best, held);
                    prop_assert!(time >= best * (1.0 - 1e-9), "better than the enumeration: {:?}", held);
                    count(&fitting, true);
                    let ample = Case { budgets: vec![1 << 40; case.budgets.len()], ..case.clone() };
                    count(&binding, ample.enumerate().is_some_and(|free| free < best * (1.0 - 1e-9)));
                    count(&shared, balanced.kv.0.iter().map(Share::len).sum::<u64>() > case.kv_heads);
                }
                (found, best) => prop_assert!(false, "solver {:?}, enumeration {:?}", found, best),
            }
            Ok(())
        })
        .unwrap();
    // Every kind of case must have been there, or the test shows less than it says.
    let seen = [fitting.get(), binding.get(), none.get(), shared.get()];
    assert!(seen.iter().zip([1000, 100, 100, 50]).all(|(seen, least)| *seen > least), "{seen:?}");
}

#[test]
fn accounted_bytes_equal_the_definition() {
    let mut runner = TestRunner::new(Config { cases: 300, ..Config::default() });
    runner
        .run(&case(), |case| {
            let options = Options { duplicate_kv: case.share_heads, ..Options::default() };
            let (workload, ranks) = (case.workload(), case.ranks());
            if let Some(balanced) = balance(&workload, &ranks, &options) {
                let held = held_by(&case, &balanced);
                let Balanced { kv, q, id, vc, .. } = balanced;
                let splits = Splits { kv, q, id, vc, ..Splits::default() };
                for (rank, held) in held.iter().enumerate() {
                    let plan = account(&workload, &workload.holdings(&splits, rank), rank, &ranks[rank]);
                    prop_assert_eq!(plan.total, case.bytes(*held));
                    prop_assert_eq!(plan.items.values().sum::<u64>(), plan.total);
                }
            }
            Ok(())
        })
        .unwrap();
}

fn rank_with(gib: f64) -> RankBudget {
    RankBudget::cuda(0, gib)
}

#[test]
fn equal_ranks_with_room_get_equal_shares_whatever_is_free() {
    let case = Case {
        kv_heads: 8,
        group: 4,
        columns: 96,
        rows: 400,
        per_rank: 0,
        per_attention_rank: (0, 0),
        per_query_head: (100, 100),
        per_kv_head: (50, 50),
        per_column: (40, 40),
        per_row: (10, 10),
        activation_head: 1,
        activation_attention: 0,
        activation_column: 1,
        activation_floor: 0,
        framework: 0,
        budgets: vec![GIB, 5 * GIB, 2 * GIB, 3 * GIB],
        speeds: vec![7.0; 4],
        share_heads: false,
    };
    let balanced = balance(&case.workload(), &case.ranks(), &Options::default()).unwrap();
    for rank in 0..4 {
        assert_eq!(balanced.kv.count(rank), 2);
        assert_eq!(balanced.id.count(rank), 24);
        assert_eq!(balanced.vc.count(rank), 100);
    }
    assert!(balance(&case.workload(), &[rank_with(0.0)], &Options::default()).is_none());
}
