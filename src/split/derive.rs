//! Splits that follow from others: residual columns from the intermediate's, MLPs of other widths likewise.

use super::apportion::apportion;
use super::workload::{Axis, Workload};
use super::{Share, Split};
use crate::error::Result;

/// Cuts `axis` where `leader` is cut, each cut moved to the nearest step of the axis.
///
/// A rank's columns differ from its exact part by less than one step; ranks whose part rounds to nothing are left
/// out.
#[must_use]
pub fn follow(leader: &Split, axis: &Axis) -> Split {
    let total = u128::from(leader.total());
    if total == 0 {
        return Split::default();
    }
    let cut = |at: u64| {
        let steps = u128::from(at) * u128::from(axis.steps()) * 2;
        u64::try_from((steps + total) / (2 * total)).unwrap_or(u64::MAX).min(axis.steps()) * axis.step
    };
    let shares =
        leader.0.iter().map(|share| Share { rank: share.rank, start: cut(share.start), end: cut(share.end) });
    Split(shares.filter(|share| !share.is_empty()).collect())
}

/// The residual stream over the ranks of `id`, in proportion to their columns, at least one step each.
///
/// Every rank that takes part in the MLP's sum then owns a part of the residual stream: the reference's own
/// arithmetic lets the two sets differ, and indexes past the end of a list at the first MLP.
pub(crate) fn residual(workload: &Workload, id: &Split, ranks: usize) -> Result<Split> {
    let members: Vec<usize> = id.ranks().collect();
    if members.is_empty() || workload.hidden.total == 0 {
        return Ok(Split::default());
    }
    let enough = workload.hidden.steps() >= members.len() as u64;
    let axis = if enough { workload.hidden } else { Axis { step: workload.hidden.grid, ..workload.hidden } };
    let spare = axis.steps().saturating_sub(members.len() as u64);
    let weights: Vec<f64> = members.iter().map(|rank| id.count(*rank) as f64).collect();
    let mut counts = vec![0; ranks];
    // One step each first: proportion alone may leave a rank with none.
    let exact: Vec<u64> = apportion("the residual columns", axis.steps(), &weights, 0)?;
    let shares = if exact.iter().all(|steps| *steps > 0) {
        exact
    } else {
        apportion("the residual columns", spare, &weights, 0)?.iter().map(|steps| steps + 1).collect()
    };
    for (rank, steps) in members.iter().zip(shares) {
        counts[*rank] = steps * axis.step;
    }
    Ok(Split::from_counts(&counts))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn following_cuts_cover_the_axis_and_stay_within_a_step(
            counts in prop::collection::vec(0_u64..50, 1..9), steps in 1_u64..400, step in 1_u64..65,
        ) {
            prop_assume!(counts.iter().sum::<u64>() > 0);
            let leader = Split::from_counts(&counts);
            let axis = Axis { total: steps * step, grid: 1, step };
            let split = follow(&leader, &axis);
            let mut end = 0;
            for share in &split.0 {
                prop_assert_eq!(share.start, end);
                prop_assert!(share.start % step == 0 && share.end % step == 0);
                end = share.end;
            }
            prop_assert_eq!(end, axis.total);
            for (rank, count) in counts.iter().enumerate() {
                let exact = *count as f64 / leader.total() as f64 * axis.total as f64;
                prop_assert!((split.count(rank) as f64 - exact).abs() <= step as f64 + 1e-9);
            }
        }
    }
}
