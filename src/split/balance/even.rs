//! Even shares: what memory aside would be best, and the spreading of what the slowest rank leaves open.

use super::bounds::Times;
use super::lines::{Lines, Steps, longest, steps_within};
use super::problem::{Line, Problem, Rank, placed_before};
use super::search::Found;

/// The least time in which `line` can be read, memory aside.
pub(super) fn least_time(line: &Line, problem: &Problem) -> f64 {
    if line.units == 0 {
        return 0.0;
    }
    let limits = usable_limits(line, problem);
    longest(&spread(line.units, &limits, problem), line, problem)
}

fn usable_limits(line: &Line, problem: &Problem) -> Vec<i64> {
    let limits = line.limits.iter().zip(&problem.ranks);
    limits.map(|(limit, rank)| if rank.capacity < 0 { 0 } else { *limit }).collect()
}

/// Heads of every rank in proportion to `weight`.
pub(super) fn heads(problem: &Problem, weight: impl Fn(&Rank) -> f64) -> Vec<usize> {
    let units = i64::try_from(problem.attention.units).unwrap_or(i64::MAX);
    let weights: Vec<f64> = problem
        .ranks
        .iter()
        .map(|r| if r.capacity < 0 { 0.0 } else { weight(r).max(f64::MIN_POSITIVE) })
        .collect();
    let limits: Vec<i64> = weights.iter().map(|weight| if *weight > 0.0 { units } else { 0 }).collect();
    share_out(units, &limits, &weights).into_iter().map(|x| usize::try_from(x).unwrap_or(0)).collect()
}

/// `units` heads in proportion to the ranks' room, none above its limit.
pub(super) fn heads_by_room(problem: &Problem, units: usize, limits: &[usize]) -> Vec<usize> {
    let signed = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    let limits: Vec<i64> = limits.iter().map(|limit| signed(*limit)).collect();
    let rooms: Vec<f64> =
        problem.ranks.iter().map(|rank| (rank.capacity as f64).max(f64::MIN_POSITIVE)).collect();
    let shares = share_out(signed(units), &limits, &rooms);
    shares.into_iter().map(|x| usize::try_from(x).unwrap_or(0)).collect()
}

/// `units` steps over the ranks, none above its limit, so that the last to finish finishes as early as can be, and
/// the others as evenly as can be (ties to the lowest rank). Less than `units` where the limits do not allow more.
pub(super) fn spread(units: i64, limits: &[i64], problem: &Problem) -> Vec<i64> {
    let speeds: Vec<f64> = problem.ranks.iter().map(|rank| rank.speed).collect();
    share_out(units, limits, &speeds)
}

#[allow(clippy::cast_possible_truncation)]
fn share_out(units: i64, limits: &[i64], speeds: &[f64]) -> Vec<i64> {
    let mut shares = vec![0_i64; limits.len()];
    let mut open: Vec<usize> = (0..limits.len()).filter(|r| limits[*r] > 0).collect();
    let mut left = units;
    // Ranks whose limit is below their part take their limit; the others share the rest.
    while !open.is_empty() {
        let speed: f64 = open.iter().map(|r| speeds[*r]).sum();
        let level = left as f64 / speed;
        let (full, rest): (Vec<usize>, Vec<usize>) =
            open.iter().partition(|r| limits[**r] as f64 <= level * speeds[**r]);
        if full.is_empty() {
            for &r in &open {
                shares[r] = ((level * speeds[r]) as i64).min(limits[r]);
            }
            break;
        }
        for r in full {
            shares[r] = limits[r];
            left -= limits[r];
        }
        open = rest;
    }
    let mut missing = units - shares.iter().sum::<i64>();
    while missing > 0 {
        let next = |r: &usize| (shares[*r] + 1) as f64 / speeds[*r];
        let earliest =
            (0..limits.len()).filter(|r| shares[*r] < limits[*r]).min_by(|a, b| next(a).total_cmp(&next(b)));
        let Some(rank) = earliest else { break };
        shares[rank] += 1;
        missing -= 1;
    }
    shares
}

/// The slowest rank's time for its heads.
pub(super) fn attention_time(problem: &Problem, heads: &[usize]) -> f64 {
    let times = heads.iter().zip(placed_before(heads)).zip(&problem.ranks);
    times.map(|((x, placed), rank)| problem.attention.read(placed, *x) / rank.speed).fold(0.0, f64::max)
}

/// The slowest ranks' times for MLP and head.
pub(super) fn times(problem: &Problem, steps: &Steps) -> Times {
    Times {
        mlp: longest(&steps.mlp, &problem.mlp, problem),
        head: longest(&steps.vocabulary, &problem.vocabulary, problem),
    }
}

/// Spreads MLP and vocabulary evenly below the times of the slowest ranks, where memory allows it.
pub(super) fn even_out(problem: &Problem, found: &mut Found) {
    let lines = Lines::new(problem, &found.heads);
    let times = times(problem, &found.steps);
    found.times = times;
    let caps = |line: &Line, time: f64| -> Vec<i64> {
        let limits = usable_limits(line, problem);
        let ranks = limits.iter().zip(&problem.ranks);
        ranks.map(|(limit, rank)| steps_within(time, line, rank.speed).min(*limit).max(0)).collect()
    };
    let mlp_caps = caps(&problem.mlp, times.mlp);
    let vocabulary_caps = caps(&problem.vocabulary, times.head);
    let mlp = spread(problem.mlp.units, &lines.mlp_limits(&mlp_caps), problem);
    let place = |mlp: Vec<i64>| {
        let open = lines.vocabulary_limits(&mlp, &vocabulary_caps)?;
        let vocabulary = spread(problem.vocabulary.units, &open, problem);
        let complete = vocabulary.iter().sum::<i64>() == problem.vocabulary.units
            && mlp.iter().sum::<i64>() == problem.mlp.units;
        complete.then_some((mlp, vocabulary))
    };
    let kept = found.steps.mlp.clone();
    if let Some((mlp, vocabulary)) = place(mlp).or_else(|| place(kept)) {
        found.steps.mlp = mlp;
        found.steps.vocabulary = vocabulary;
    }
}
