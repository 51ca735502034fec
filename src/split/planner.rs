//! From a model's costs and the ranks' budgets to a [`Plan`].

use super::balance::{self, Balanced, FixedSteps};
use super::derive::{follow, residual};
use super::memory::{account, phase_reads};
use super::reference::{ReferenceInput, define_splits};
use super::shortfall;
use super::validate::{check_arguments, check_residual, check_shares};
use super::workload::{Axis, Workload};
use super::{
    Context, GIB, MIB, Options, PLAN_VERSION, Plan, PlannedModel, RankBudget, RankPlan, Split, Splits,
    StepTime, Strategy,
};
use crate::error::{Error, Result};

/// The context of a plan where neither the caller nor the model says one.
pub const DEFAULT_CONTEXT: u64 = 8192;
/// The largest context that is looked for where the model does not say its own limit.
const LONGEST_CONTEXT: u64 = 1 << 22;

/// A model as the planner asks for it.
pub struct Subject<'a> {
    /// Its numbers, copied into the plan.
    pub model: PlannedModel,
    /// Positions that it was made for.
    pub max_positions: Option<u64>,
    /// Bytes of the attention weights of each attention layer, for the reference's arithmetic.
    pub attention_footprints: Vec<u64>,
    /// What a reader of the plan should know of the model.
    pub notes: Vec<String>,
    /// Its costs at a context and a chunk.
    pub workload: &'a dyn Fn(u64, u64) -> Workload,
}

/// Plans `subject` over `budgets`.
///
/// # Errors
/// Whatever [`crate::plan`] lists.
pub fn plan(subject: &Subject<'_>, budgets: &[RankBudget], options: &Options) -> Result<Plan> {
    check_arguments(budgets, options)?;
    let planner = Planner { subject, budgets, options };
    match options.context {
        Context::Tokens(context) => planner.at(context),
        Context::Default => {
            planner.at(subject.max_positions.unwrap_or(DEFAULT_CONTEXT).clamp(1, DEFAULT_CONTEXT))
        }
        Context::Max => planner.at_most(),
    }
}

pub(super) struct Planner<'a> {
    subject: &'a Subject<'a>,
    budgets: &'a [RankBudget],
    options: &'a Options,
}

impl Planner<'_> {
    pub(super) fn workload(&self, context: u64, chunk: u64) -> Workload {
        (self.subject.workload)(context, chunk)
    }

    pub(super) fn chunk(&self) -> u64 {
        self.options.chunk
    }

    fn longest(&self) -> u64 {
        self.subject.max_positions.unwrap_or(LONGEST_CONTEXT).max(1)
    }

    /// The plan at a given context, whether it fits or not.
    fn at(&self, context: u64) -> Result<Plan> {
        let workload = self.workload(context, self.chunk());
        let fixed = check_shares(&workload, self.budgets, self.options)?;
        let splits = self.splits(&workload, &fixed, context)?;
        let ranks = self.accounts(&workload, &splits);
        let fits = fit(&ranks);
        let max_context = self.max_context(&splits, &fixed, fits.then_some(context));
        let shortfall =
            (!fits).then(|| shortfall::describe(self, &ranks, &splits, &fixed, context, max_context));
        let notes = self.notes(&workload, &splits, context);
        Ok(Plan {
            version: PLAN_VERSION,
            model: self.subject.model.clone(),
            strategy: self.options.strategy,
            context,
            batch: self.options.batch,
            chunk: self.chunk(),
            cache: self.options.cache,
            step_time: self.step_time(&workload, &splits),
            speeds_known: self.budgets.iter().all(|budget| budget.speed.is_some()),
            splits,
            buffer_bytes: workload.buffer_bytes,
            pinned_bytes: if ranks.iter().filter(|rank| rank.total > 0).count() > 1 {
                workload.pinned_bytes
            } else {
                0
            },
            ranks,
            fits,
            shortfall,
            max_context,
            notes,
        })
    }

    /// The plan at the largest context that fits.
    fn at_most(&self) -> Result<Plan> {
        let fits = |context: u64| -> Result<bool> {
            if self.options.strategy == Strategy::Balanced {
                let workload = self.workload(context, self.chunk());
                let fixed = check_shares(&workload, self.budgets, self.options)?;
                return Ok(self.feasible(&workload, &fixed));
            }
            match self.at(context) {
                Ok(plan) => Ok(plan.fits),
                Err(Error::NothingToApportion { .. }) => Ok(false),
                Err(other) => Err(other),
            }
        };
        let mut failed = None;
        let context = largest(self.longest(), |context| {
            fits(context).unwrap_or_else(|error| {
                failed.get_or_insert(error);
                false
            })
        });
        if let Some(error) = failed {
            return Err(error);
        }
        let fixed = check_shares(&self.workload(1, self.chunk()), self.budgets, self.options)?;
        let context = self.at_the_edge(&fixed, context);
        if context == 0 {
            let plan = self.at(1)?;
            return match plan.shortfall {
                Some(shortfall) => Err(Error::DoesNotFit(Box::new(shortfall))),
                None => Ok(plan),
            };
        }
        self.at(context)
    }

    fn feasible(&self, workload: &Workload, fixed: &FixedSteps) -> bool {
        balance::feasible(workload, self.budgets, self.options, fixed, 0)
    }

    fn splits(&self, workload: &Workload, fixed: &FixedSteps, context: u64) -> Result<Splits> {
        if self.options.strategy == Strategy::ExLlamaV2 {
            return self.reference(workload, context);
        }
        let balanced = match self.solved(workload, fixed, context) {
            Some(balanced) => balanced,
            None => self
                .nearest(workload, fixed)
                .and_then(|extra| self.solve(workload, fixed, extra, None))
                .ok_or_else(|| {
                    let got = format!("{} ranks", self.budgets.len());
                    Error::invalid("gpu_split", got, "budgets that some split of this model could ever use")
                })?,
        };
        self.complete(workload, balanced)
    }

    /// The fastest split that fits, if one is found.
    fn solved(&self, workload: &Workload, fixed: &FixedSteps, context: u64) -> Option<Balanced> {
        // The reference's split is one more candidate: the answer is then never slower than it.
        let plain = self.options.shares == super::ExplicitShares::default();
        let known = if plain { self.reference(workload, context).ok() } else { None };
        let known = known.map(|splits| Balanced {
            kv: splits.kv,
            q: splits.q,
            id: splits.id,
            experts: None,
            vc: clipped(splits.vc, workload.vocabulary.total),
        });
        self.solve(workload, fixed, 0, known.as_ref())
    }

    fn solve(
        &self,
        workload: &Workload,
        fixed: &FixedSteps,
        extra: u64,
        known: Option<&Balanced>,
    ) -> Option<Balanced> {
        let unshared = Options { duplicate_kv: false, ..self.options.clone() };
        // Whole heads are a part of what sharing allows, and a smaller search: a start that is never worse.
        let whole = balance::solve(workload, self.budgets, &unshared, fixed, extra, known);
        if !self.options.duplicate_kv {
            return whole;
        }
        balance::solve(workload, self.budgets, self.options, fixed, extra, whole.as_ref())
    }

    /// `context`, or a little beyond it: the full search finds splits at the very edge of the memory that the question
    /// whether any fits has missed.
    fn at_the_edge(&self, fixed: &FixedSteps, mut context: u64) -> u64 {
        let more = |context: u64| {
            let workload = self.workload(context, self.chunk());
            self.options.strategy == Strategy::Balanced && self.solved(&workload, fixed, context).is_some()
        };
        let beyond = context.saturating_add(EDGE).min(self.longest());
        while context > 0 && context < beyond && more(context + 1) {
            context += 1;
        }
        context
    }

    /// The least number of bytes, to a MiB, that every rank would need more for some split to fit.
    fn nearest(&self, workload: &Workload, fixed: &FixedSteps) -> Option<u64> {
        let fits = |extra: u64| balance::feasible(workload, self.budgets, self.options, fixed, extra);
        let mut high = MIB;
        while !fits(high) {
            high = high.checked_mul(2).filter(|extra| *extra < GIB * GIB)?;
        }
        let mut low = high / 2;
        while high - low > MIB {
            let middle = low.midpoint(high);
            if fits(middle) { high = middle } else { low = middle }
        }
        Some(high)
    }

    /// The splits that follow from those of the solver.
    fn complete(&self, workload: &Workload, balanced: Balanced) -> Result<Splits> {
        let Balanced { kv, q, id, experts, vc } = balanced;
        let id = experts.as_ref().map_or(id, |experts| follow(experts, &workload.intermediate));
        let leader = experts.as_ref().unwrap_or(&id);
        let widths = workload.widths.iter().map(|axis| (axis.total, follow(leader, axis))).collect();
        // A model without MLPs still has a residual stream.
        let members = if id.0.is_empty() { &q } else { &id };
        let rs = match &self.options.shares.rs {
            Some(counts) => check_residual(counts, &id)?,
            None => residual(workload, members, self.budgets.len())?,
        };
        Ok(Splits { kv, q, id, vc, rs, experts, widths })
    }

    fn reference(&self, workload: &Workload, context: u64) -> Result<Splits> {
        let model = &self.subject.model;
        let footprints =
            self.options.attention_footprint.as_ref().unwrap_or(&self.subject.attention_footprints);
        let splits = define_splits(&ReferenceInput {
            budgets_mb: self.budgets.iter().map(|budget| budget.gib * 1024.0).collect(),
            kv_heads: model.kv_heads,
            query_heads_per_kv_head: workload.query_heads_per_kv_head,
            head_dim: model.head_dim,
            hidden: model.hidden,
            intermediate: model.intermediate,
            vocabulary: model.vocabulary,
            layers: model.layers,
            cache_tokens: context * self.options.batch,
            cache_bytes_per_element: self.options.cache.sixteenths() as f64 / 16.0,
            attention_footprints: footprints.clone(),
        })?;
        let widths = workload.widths.iter().map(|axis| (axis.total, follow(&splits.id, axis))).collect();
        Ok(Splits {
            kv: splits.kv,
            q: splits.q,
            id: splits.id,
            vc: splits.vc,
            rs: splits.rs,
            experts: None,
            widths,
        })
    }

    pub(super) fn accounts(&self, workload: &Workload, splits: &Splits) -> Vec<RankPlan> {
        let ranks = self.budgets.iter().enumerate();
        ranks
            .map(|(rank, budget)| account(workload, &workload.holdings(splits, rank), rank, budget))
            .collect()
    }

    fn step_time(&self, workload: &Workload, splits: &Splits) -> StepTime {
        let mut slowest = [0.0_f64; 3];
        for (rank, budget) in self.budgets.iter().enumerate() {
            let reads = phase_reads(workload, &workload.holdings(splits, rank));
            for (slowest, read) in slowest.iter_mut().zip(reads) {
                *slowest = slowest.max(read / budget.speed.unwrap_or(1.0));
            }
        }
        let [attention, mlp, head] = slowest;
        StepTime { attention, mlp, head }
    }

    /// Whether these splits, or with the balanced strategy any splits, fit at this context and chunk.
    pub(super) fn fits(&self, splits: &Splits, fixed: &FixedSteps, context: u64, chunk: u64) -> bool {
        let workload = self.workload(context, chunk);
        if self.options.strategy == Strategy::Balanced {
            self.feasible(&workload, fixed)
        } else {
            fit(&self.accounts(&workload, splits))
        }
    }

    /// The largest context that fits: with other splits where the solver may choose them, with these otherwise.
    fn max_context(&self, splits: &Splits, fixed: &FixedSteps, known: Option<u64>) -> u64 {
        let fits = |context: u64| {
            known.is_some_and(|known| context <= known) || self.fits(splits, fixed, context, self.chunk())
        };
        self.at_the_edge(fixed, largest(self.longest().max(known.unwrap_or(1)), fits))
    }

    fn notes(&self, workload: &Workload, splits: &Splits, context: u64) -> Vec<String> {
        let mut notes = self.subject.notes.clone();
        let device = |rank: usize| format!("rank {rank} ({})", self.budgets[rank].device);
        if let Some(positions) = self.subject.max_positions.filter(|positions| context > *positions) {
            notes.push(format!(
                "a context of {context} tokens is beyond the {positions} positions of the model"
            ));
        }
        for pair in splits.kv.0.windows(2) {
            if let [left, right] = pair
                && right.start < left.end
            {
                let (left, right, head) = (device(left.rank), device(right.rank), right.start);
                notes.push(format!(
                    "KV head {head} is kept by {left} and by {right}, which share its query heads"
                ));
            }
        }
        for (rank, budget) in self.budgets.iter().enumerate() {
            let holdings = workload.holdings(splits, rank);
            if holdings.is_empty() && budget.gib > 0.0 {
                notes.push(format!("{} holds nothing", device(rank)));
            } else if holdings.query_heads == 0 && !holdings.is_empty() && workload.kv_heads.total > 0 {
                notes.push(format!("{} holds no attention heads and no cache", device(rank)));
            }
        }
        let axes = [("kv", &splits.kv, &workload.kv_heads), ("id", &splits.id, &workload.intermediate)];
        for (name, split, axis) in axes {
            if let Some(share) = split.0.iter().find(|share| misplaced(share.start, axis)) {
                let (at, grid) = (share.start, axis.grid);
                notes.push(format!(
                    "the {name} split cuts at {at}, but these weights can only be cut at multiples of {grid}"
                ));
            }
        }
        notes
    }
}

fn misplaced(cut: u64, axis: &Axis) -> bool {
    !cut.is_multiple_of(axis.grid)
}

fn fit(ranks: &[RankPlan]) -> bool {
    ranks.iter().all(|rank| rank.total <= rank.budget)
}

/// The intervals cut off at `end`.
fn clipped(split: Split, end: u64) -> Split {
    let shares = split.0.into_iter().map(|mut share| {
        share.end = share.end.min(end);
        share
    });
    Split(shares.filter(|share| share.start < share.end).collect())
}

/// Tokens beyond which the full search is not asked any more.
const EDGE: u64 = 64;

/// The largest of `1..=most` for which `fits` holds, 0 if there is none; `fits` must not hold again once it fails.
fn largest(most: u64, mut fits: impl FnMut(u64) -> bool) -> u64 {
    if fits(most) {
        return most;
    }
    let (mut low, mut high) = (0, most);
    while high - low > 1 {
        let middle = low.midpoint(high);
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}
