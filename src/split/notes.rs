//! What a reader of a plan should know beside its numbers.

use super::Splits;
use super::planner::Planner;
use super::workload::{Axis, Workload};

/// The model's notes, and those on these splits at this context.
pub(super) fn of(planner: &Planner<'_>, workload: &Workload, splits: &Splits, context: u64) -> Vec<String> {
    let Planner { subject, budgets, .. } = planner;
    let mut notes = subject.notes.clone();
    let device = |rank: usize| format!("rank {rank} ({})", budgets[rank].device);
    if let Some(positions) = subject.max_positions.filter(|positions| context > *positions) {
        notes.push(format!("a context of {context} tokens is beyond the {positions} positions of the model"));
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
    for (rank, budget) in budgets.iter().enumerate() {
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

fn misplaced(cut: u64, axis: &Axis) -> bool {
    !cut.is_multiple_of(axis.grid)
}
