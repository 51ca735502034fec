//! `strategy="balanced"`: the fastest split that fits.
//!
//! Ranks wait for each other at every row-parallel sum, so a decode step takes as long as the slowest rank's
//! attention, plus the slowest rank's MLP, plus the slowest rank's head. Each of these is the bytes that the rank
//! reads over its memory bandwidth. The solver minimises that sum over whole KV heads (or query heads of shared
//! ones), MLP columns or experts, and vocabulary rows, subject to every rank's memory.
//!
//! The search branches over the heads of each rank, since they are few and coarse, and prunes by a linear
//! relaxation of everything that is still open (`bounds`). For decided heads, MLP and vocabulary are solved exactly
//! (`lines`): candidate times of the MLP in order of their bound, and for each the least head time. Among splits
//! with equal times, the most even one is returned (`even`), so that memory shifts shares only where it must.

mod bounds;
mod even;
mod lines;
mod problem;
mod search;

pub(crate) use problem::FixedSteps;
use problem::{MlpUnit, Problem};
use search::{Found, Goal};

use super::workload::Workload;
use super::{Options, RankBudget, Share, Split};

/// The splits that the solver decides; the others follow from them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Balanced {
    /// KV heads; intervals overlap where heads are shared.
    pub kv: Split,
    /// Query heads.
    pub q: Split,
    /// Columns of the intermediate (empty where whole experts are divided).
    pub id: Split,
    /// Whole experts, where these are divided.
    pub experts: Option<Split>,
    /// Vocabulary rows.
    pub vc: Split,
}

impl Balanced {
    /// Everything on one rank.
    pub(crate) fn alone(workload: &Workload, rank: usize) -> Self {
        let all = |total: u64| {
            let share = (total > 0).then_some(Share { rank, start: 0, end: total });
            Split(share.into_iter().collect())
        };
        Self {
            kv: all(workload.kv_heads.total),
            q: all(workload.query_heads()),
            id: if workload.experts.is_some() { Split::default() } else { all(workload.intermediate.total) },
            experts: workload.experts.map(all),
            vc: all(workload.vocabulary.total),
        }
    }
}

/// The fastest split of `workload` over `budgets`, or `None` where none fits.
///
/// Optimal where the search ends within its bound of work, which every case small enough to enumerate does; the best
/// that was found otherwise. `None` is certain in the same cases; on larger ones a split may be missed that would use
/// every rank's memory to the last step.
#[must_use]
pub fn balance(workload: &Workload, budgets: &[RankBudget], options: &Options) -> Option<Balanced> {
    let fixed = FixedSteps::default();
    solve(&Question { workload, budgets, options, fixed: &fixed, extra: 0, reserve: Reserve::Rounding }, None)
}

/// What a rank keeps free beside its part of everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reserve {
    /// Nothing: what is found may be a few steps too large, where widths follow others.
    Nothing,
    /// A step of every width that follows another, which is cut to the nearest of its own steps: what is found fits.
    Rounding,
}

/// What is asked of the solver.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question<'a> {
    pub(crate) workload: &'a Workload,
    pub(crate) budgets: &'a [RankBudget],
    pub(crate) options: &'a Options,
    /// Shares that the caller fixed.
    pub(crate) fixed: &'a FixedSteps,
    /// Bytes more on every rank that has a budget.
    pub(crate) extra: u64,
    pub(crate) reserve: Reserve,
}

/// The fastest split, which is never slower than one that is `known` to fit.
pub(crate) fn solve(question: &Question<'_>, known: Option<&Balanced>) -> Option<Balanced> {
    let problem = Problem::new(question);
    let known = known.and_then(|known| problem.found_of(known));
    // At the very edge of the memory only the exact tables of the second search find the split that fits.
    let found = search::search(&problem, Goal::Fastest, known);
    let found = found.or_else(|| search::search(&problem, Goal::Any, None))?;
    Some(problem.splits_of(&found))
}

/// Any split that fits.
pub(crate) fn any(question: &Question<'_>) -> Option<Balanced> {
    let problem = Problem::new(question);
    search::search(&problem, Goal::Any, None).map(|found| problem.splits_of(&found))
}

impl Problem {
    fn splits_of(&self, found: &Found) -> Balanced {
        let [head_size, mlp_size, vocabulary_size] = self.unit_sizes;
        let sized = |steps: &[i64], size: u64| -> Vec<u64> {
            steps.iter().map(|n| u64::try_from(*n).unwrap_or(0) * size).collect()
        };
        let heads: Vec<u64> = found.heads.iter().map(|x| *x as u64).collect();
        let kv_per_unit = self.kv_heads_per_unit;
        let group = self.attention.units_per_head as u64;
        let units = Split::from_counts(&heads);
        let kv = Split(
            units
                .0
                .iter()
                .map(|s| Share {
                    rank: s.rank,
                    start: s.start / group * kv_per_unit,
                    end: s.end.div_ceil(group) * kv_per_unit,
                })
                .collect(),
        );
        let mlp = Split::from_counts(&sized(&found.steps.mlp, mlp_size));
        let (id, experts) = match self.mlp_unit {
            MlpUnit::Columns => (mlp, None),
            MlpUnit::Experts => (Split::default(), Some(mlp)),
        };
        let vc = Split::from_counts(&sized(&found.steps.vocabulary, vocabulary_size));
        Balanced { kv, q: units.scaled(head_size), id, experts, vc }
    }

    /// `known` in the solver's units, if it falls on them and fits.
    fn found_of(&self, known: &Balanced) -> Option<Found> {
        let [head_size, mlp_size, vocabulary_size] = self.unit_sizes;
        let ranks = 0..self.ranks.len();
        let units = |split: &Split, size: u64| -> Option<Vec<u64>> {
            let whole = |count: u64| count.is_multiple_of(size).then_some(count / size);
            ranks.clone().map(|rank| whole(split.count(rank))).collect()
        };
        let heads = units(&known.q, head_size)?;
        let mlp = units(known.experts.as_ref().unwrap_or(&known.id), mlp_size)?;
        let vocabulary = units(&known.vc, vocabulary_size)?;
        search::checked(self, &heads, &mlp, &vocabulary)
    }
}
