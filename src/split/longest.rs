//! The largest context that fits: that at which a plan made anew fits.

use super::balance::FixedSteps;
use super::planner::{Planner, fit};
use super::validate::check_shares;
use super::{Plan, Strategy};
use crate::error::{Error, Result};

/// The largest context that is looked for where the model does not say its own limit.
const LONGEST_CONTEXT: u64 = 1 << 22;
/// Tokens beyond which the full search is not asked any more.
const EDGE: u64 = 64;
/// Contexts, as far from each other, that are tried where a longer one may fit although a shorter one does not.
const SAMPLES: u64 = 64;

impl Planner<'_> {
    fn longest(&self) -> u64 {
        self.subject.max_positions.unwrap_or(LONGEST_CONTEXT).max(1)
    }

    /// The plan at the largest context that fits.
    pub(super) fn at_most(&self) -> Result<Plan> {
        let fixed = check_shares(&self.workload(1, self.chunk()), self.budgets, self.options)?;
        match self.max_context(&fixed, None) {
            0 => match self.at(1)? {
                Plan { shortfall: Some(shortfall), .. } => Err(Error::DoesNotFit(Box::new(shortfall))),
                plan => Ok(plan),
            },
            context => self.at(context),
        }
    }

    /// Whether the splits that a plan at this context and chunk finds fit.
    pub(super) fn fits(&self, fixed: &FixedSteps, context: u64, chunk: u64) -> bool {
        let workload = self.workload(context, chunk);
        match self.options.strategy {
            Strategy::Balanced => matches!(self.any(&workload, fixed, 0), Ok(Some(_))),
            Strategy::ExLlamaV2 => {
                let splits = self.reference(&workload, context);
                splits.is_ok_and(|splits| fit(&self.accounts(&workload, &splits, 0), 0))
            }
        }
    }

    /// The largest context that fits, 0 if none does. One that is `known` to fit needs not be asked for again.
    pub(super) fn max_context(&self, fixed: &FixedSteps, known: Option<u64>) -> u64 {
        let known = known.unwrap_or(0);
        let most = self.longest().max(known);
        match self.options.strategy {
            Strategy::Balanced => {
                let fits = |context| context <= known || self.fits(fixed, context, self.chunk());
                self.at_the_edge(fixed, largest(0, most, fits))
            }
            // Its splits change with the context, so that more tokens may fit where fewer do not.
            Strategy::ExLlamaV2 => {
                largest_of_samples(most, |context| self.fits(fixed, context, self.chunk())).max(known)
            }
        }
    }

    /// `context`, or a little beyond it: the full search finds splits at the very edge of the memory that the question
    /// whether any fits has missed.
    fn at_the_edge(&self, fixed: &FixedSteps, mut context: u64) -> u64 {
        let more = |context: u64| {
            let workload = self.workload(context, self.chunk());
            matches!(self.solved(&workload, fixed, context), Ok(Some(_)))
        };
        let beyond = context.saturating_add(EDGE).min(self.longest());
        while context > 0 && context < beyond && more(context + 1) {
            context += 1;
        }
        context
    }
}

/// A context that `fits` after `low`, which does or is 0, or `low`, such that one token more does not fit; at most
/// `most`. The largest that fits if `fits` does not hold again once it fails.
fn largest(low: u64, most: u64, mut fits: impl FnMut(u64) -> bool) -> u64 {
    if fits(most) {
        return most;
    }
    let (mut low, mut high) = (low, most);
    while high - low > 1 {
        let middle = low.midpoint(high);
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

/// A context that fits, such that one token more does not: after the last sample that fits.
fn largest_of_samples(most: u64, mut fits: impl FnMut(u64) -> bool) -> u64 {
    let sample = |number: u64| most / SAMPLES * number + most % SAMPLES * number / SAMPLES;
    let last = (1..=SAMPLES).rev().find(|number| fits(sample(*number))).unwrap_or(0);
    largest(sample(last), sample((last + 1).min(SAMPLES)), fits)
}
