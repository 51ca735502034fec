//! What is missing where a plan does not fit, and what could give way.

use super::balance::FixedSteps;
use super::planner::Planner;
use super::{Item, MIB, RankPlan, Shortfall};

/// The smallest prefill chunk that is proposed.
const SMALLEST_CHUNK: u64 = 64;

pub(super) fn describe(
    planner: &Planner<'_>,
    ranks: &[RankPlan],
    fixed: &FixedSteps,
    context: u64,
    max_context: u64,
) -> Shortfall {
    let missing = |rank: &RankPlan| rank.total.saturating_sub(rank.budget);
    let missing_total = ranks.iter().map(missing).sum();
    let worst = ranks.iter().max_by_key(|rank| (missing(rank), std::cmp::Reverse(rank.rank)));
    let (rank, device, short) =
        worst.map_or((0, String::new(), 0), |worst| (worst.rank, worst.device.clone(), missing(worst)));

    let mut chunk = planner.chunk() / 2;
    let mut smaller_chunk = None;
    while max_context < context && chunk >= SMALLEST_CHUNK && smaller_chunk.is_none() {
        smaller_chunk = planner.fits(fixed, context, chunk).then_some(chunk);
        chunk /= 2;
    }
    let largest_weights = worst
        .and_then(|worst| {
            let weights = worst.items.iter().filter(|(item, _)| **item < Item::KvCache);
            weights.max_by_key(|(_, bytes)| **bytes).map(|(item, _)| *item)
        })
        .unwrap_or(Item::Framework);
    let (item, advice) = match (max_context, smaller_chunk) {
        (0, Some(chunk)) => (Item::Activations, format!("a prefill chunk of {chunk} tokens would fit")),
        (0, None) => (
            largest_weights,
            format!(
                "no context fits: give {} MiB more in all, more devices, or a smaller or more strongly quantised \
                 model",
                u64::div_ceil(missing_total, MIB)
            ),
        ),
        (tokens, Some(chunk)) => (
            Item::KvCache,
            format!("a context of {tokens} tokens would fit, or a prefill chunk of {chunk} tokens"),
        ),
        (tokens, None) => (Item::KvCache, format!("a context of {tokens} tokens would fit")),
    };
    Shortfall { rank, device, missing: short, missing_total, item, advice }
}
