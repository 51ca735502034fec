//! From a model's costs and the ranks' budgets to a [`Plan`].

use super::balance::{self, Balanced, FixedSteps, Question, Reserve};
use super::derive::{follow, residual};
use super::memory::phase_reads;
use super::notes;
use super::reference::{ReferenceInput, define_splits};
use super::shared::{SharedDevices, within};
use super::shortfall;
use super::validate::{check_arguments, check_residual, check_shares};
use super::workload::Workload;
use super::{
    Context, GIB, MIB, Options, PLAN_VERSION, Plan, PlannedModel, RankBudget, RankPlan, Split, Splits,
    StepTime, Strategy,
};
use crate::error::{Error, Result};

/// The context of a plan where neither the caller nor the model says one.
pub const DEFAULT_CONTEXT: u64 = 8192;

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
    let shared = SharedDevices::of(budgets);
    let ways = shared.ways(budgets);
    let mut usable = (0..budgets.len()).filter(|rank| budgets[*rank].gib > 0.0);
    let lone = usable.next().filter(|_| usable.next().is_none());
    let planner = Planner { subject, budgets, options, shared, ways, lone };
    match options.context {
        Context::Tokens(context) => planner.at(context),
        Context::Default => {
            planner.at(subject.max_positions.unwrap_or(DEFAULT_CONTEXT).clamp(1, DEFAULT_CONTEXT))
        }
        Context::Max => planner.at_most(),
    }
}

pub(super) struct Planner<'a> {
    pub(super) subject: &'a Subject<'a>,
    pub(super) budgets: &'a [RankBudget],
    pub(super) options: &'a Options,
    shared: SharedDevices,
    /// The budgets in every way that ranks may bear what they share.
    ways: Vec<Vec<RankBudget>>,
    /// The rank with a budget, if there is one only.
    lone: Option<usize>,
}

impl Planner<'_> {
    pub(super) fn workload(&self, context: u64, chunk: u64) -> Workload {
        (self.subject.workload)(context, chunk)
    }

    pub(super) fn chunk(&self) -> u64 {
        self.options.chunk
    }

    /// The plan at a given context, whether it fits or not.
    pub(super) fn at(&self, context: u64) -> Result<Plan> {
        let workload = self.workload(context, self.chunk());
        let fixed = check_shares(&workload, self.budgets, self.options)?;
        let (splits, extra) = self.splits(&workload, &fixed, context)?;
        let ranks = self.accounts(&workload, &splits, extra);
        let fits = fit(&ranks, 0);
        let max_context = self.max_context(&fixed, fits.then_some(context));
        let shortfall = (!fits).then(|| shortfall::describe(self, &ranks, &fixed, context, max_context));
        let notes = notes::of(self, &workload, &splits, context);
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

    /// Splits that fit with `extra` bytes more on every rank, if some are found.
    pub(super) fn any(&self, workload: &Workload, fixed: &FixedSteps, extra: u64) -> Result<Option<Splits>> {
        match self.lone {
            // One rank has no choice, so that nothing is estimated.
            Some(rank) => self.exact(workload, fixed, extra, |_| Some(Balanced::alone(workload, rank))),
            None => self.exact(workload, fixed, extra, balance::any),
        }
    }

    /// What `find` finds for the first of the ways to charge ranks with which it fits to the byte.
    fn exact(
        &self,
        workload: &Workload,
        fixed: &FixedSteps,
        extra: u64,
        find: impl Fn(&Question<'_>) -> Option<Balanced>,
    ) -> Result<Option<Splits>> {
        let reserves =
            if rounded(workload) { &[Reserve::Nothing, Reserve::Rounding][..] } else { &[Reserve::Nothing] };
        for budgets in &self.ways {
            for &reserve in reserves {
                let question = Question { workload, budgets, options: self.options, fixed, extra, reserve };
                // What does not even fit without a reserve does not fit with one.
                let Some(balanced) = find(&question) else { break };
                let splits = self.complete(workload, balanced)?;
                if fit(&self.accounts(workload, &splits, extra), extra) {
                    return Ok(Some(splits));
                }
            }
        }
        Ok(None)
    }

    /// The splits of the plan, and the bytes that every rank needs more for them.
    fn splits(&self, workload: &Workload, fixed: &FixedSteps, context: u64) -> Result<(Splits, u64)> {
        if self.options.strategy == Strategy::ExLlamaV2 {
            return Ok((self.reference(workload, context)?, 0));
        }
        if let Some(splits) = self.solved(workload, fixed, context)? {
            return Ok((splits, 0));
        }
        if let Some(extra) = self.nearest(workload, fixed)
            && let Some(splits) = self.solve(workload, fixed, extra, None)?
        {
            return Ok((splits, extra));
        }
        let got = format!("{} ranks", self.budgets.len());
        Err(Error::invalid("gpu_split", got, "budgets that some split of this model could ever use"))
    }

    /// The fastest split that fits, if one is found.
    pub(super) fn solved(
        &self,
        workload: &Workload,
        fixed: &FixedSteps,
        context: u64,
    ) -> Result<Option<Splits>> {
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
    ) -> Result<Option<Splits>> {
        if self.lone.is_some() {
            return self.any(workload, fixed, extra);
        }
        let unshared = Options { duplicate_kv: false, ..self.options.clone() };
        let fastest = self.exact(workload, fixed, extra, |question| {
            // Whole heads are a part of what sharing allows, and a smaller search: a start that is never worse.
            let whole = balance::solve(&Question { options: &unshared, ..*question }, known);
            if !self.options.duplicate_kv {
                return whole;
            }
            balance::solve(question, whole.as_ref())
        })?;
        if fastest.is_some() || (self.ways.len() == 1 && !rounded(workload)) {
            return Ok(fastest);
        }
        // Of two splits that are a few bytes too large for the solver's estimate, either may fit to the byte.
        self.any(workload, fixed, extra)
    }

    /// The least number of bytes, to a MiB, that every rank would need more for some split to fit.
    fn nearest(&self, workload: &Workload, fixed: &FixedSteps) -> Option<u64> {
        // What is wrong with the splits themselves is said when they are made.
        let fits = |extra: u64| !matches!(self.any(workload, fixed, extra), Ok(None));
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

    pub(super) fn reference(&self, workload: &Workload, context: u64) -> Result<Splits> {
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

    pub(super) fn accounts(&self, workload: &Workload, splits: &Splits, extra: u64) -> Vec<RankPlan> {
        let holdings: Vec<_> = (0..self.budgets.len()).map(|rank| workload.holdings(splits, rank)).collect();
        self.shared.accounts(workload, self.budgets, &holdings, extra)
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
}

/// Whether shares follow others and are rounded, which the solver estimates.
fn rounded(workload: &Workload) -> bool {
    !workload.widths.is_empty() || workload.experts.is_some()
}

pub(super) fn fit(ranks: &[RankPlan], extra: u64) -> bool {
    ranks.iter().all(|rank| within(rank, extra))
}

/// The intervals cut off at `end`.
fn clipped(split: Split, end: u64) -> Split {
    let shares = split.0.into_iter().map(|mut share| {
        share.end = share.end.min(end);
        share
    });
    Split(shares.filter(|share| share.start < share.end).collect())
}
