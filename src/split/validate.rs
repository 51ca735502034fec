//! What a caller can get wrong, found before anything is computed.

use std::ops::RangeInclusive;

use super::balance::FixedSteps;
use super::workload::{Axis, Block, Workload};
use super::{Context, ExpertSplit, Options, RankBudget, Split, Strategy};
use crate::error::{Error, Result};

/// More ranks than any machine has; keeps hostile lists from running the solver for hours.
const MOST_RANKS: usize = 256;
/// Bounds of token counts: beyond them products of sizes no longer fit 64 bits.
const MOST_TOKENS: u64 = 1 << 31;
/// Speeds with which the times of any model are numbers that JSON has, and differ by more than rounding.
const SPEEDS: RangeInclusive<f64> = 1e-9..=1e15;

/// A number without the hundreds of digits that very small and very large ones have.
fn readable(number: f64) -> String {
    if number == 0.0 || !number.is_finite() || (1e-6..1e15).contains(&number.abs()) {
        return number.to_string();
    }
    format!("{number:e}")
}

/// Checks budgets and options that no model is needed for.
pub(crate) fn check_arguments(budgets: &[RankBudget], options: &Options) -> Result<()> {
    if budgets.is_empty() {
        return Err(Error::invalid("gpu_split", "an empty list", "a budget in GiB for at least one rank"));
    }
    if budgets.len() > MOST_RANKS {
        return Err(Error::invalid(
            "gpu_split",
            format!("{} budgets", budgets.len()),
            format!("at most {MOST_RANKS}"),
        ));
    }
    for (index, budget) in budgets.iter().enumerate() {
        // 2^33 GiB is where bytes no longer fit the arithmetic.
        if !budget.gib.is_finite() || budget.gib < 0.0 || budget.gib >= 8_589_934_592.0 {
            let wanted = "a finite number of GiB, 0 (leave the device out) or more";
            return Err(Error::invalid(format!("gpu_split[{index}]"), readable(budget.gib), wanted));
        }
        if let Some(speed) = budget.speed
            && !SPEEDS.contains(&speed)
        {
            let wanted =
                format!("{:e} to {:e}, in GB/s or in proportion to the others", SPEEDS.start(), SPEEDS.end());
            return Err(Error::invalid(format!("speeds[{index}]"), readable(speed), wanted));
        }
    }
    if budgets.iter().all(|budget| budget.gib == 0.0) {
        let got = format!("0 GiB for all {} ranks", budgets.len());
        return Err(Error::invalid("gpu_split", got, "a budget above 0 for at least one rank"));
    }
    let known = budgets.iter().filter(|budget| budget.speed.is_some()).count();
    if known != 0 && known != budgets.len() {
        let got = format!("a speed for {known} of {} ranks", budgets.len());
        return Err(Error::invalid("speeds", got, "one for every rank, or none at all"));
    }
    let tokens = |name: &str, count: u64| {
        if count == 0 || count > MOST_TOKENS {
            return Err(Error::invalid(name, count, format!("1 to {MOST_TOKENS}")));
        }
        Ok(())
    };
    if let Context::Tokens(count) = options.context {
        tokens("context", count)?;
    }
    tokens("batch", options.batch)?;
    tokens("chunk", options.chunk)?;
    if options.strategy == Strategy::ExLlamaV2 {
        let extra = [
            (options.shares != super::ExplicitShares::default(), "splits"),
            (options.duplicate_kv, "duplicate_kv"),
            (options.experts == ExpertSplit::Whole, "experts=\"whole\""),
        ];
        if let Some((_, name)) = extra.iter().find(|(given, _)| *given) {
            let got = "strategy=\"exllamav2\", whose arithmetic has no such choice";
            return Err(Error::invalid(*name, got, "strategy=\"balanced\""));
        }
    }
    Ok(())
}

/// Checks the shares that the caller fixes, and returns them for the solver.
pub(crate) fn check_shares(
    workload: &Workload,
    budgets: &[RankBudget],
    options: &Options,
) -> Result<FixedSteps> {
    let shares = &options.shares;
    let blocks = &workload.blocks;
    for (name, counts, axis, unit, block) in [
        ("kv", &shares.kv, &workload.kv_heads, "KV heads", &blocks.heads),
        ("id", &shares.id, &workload.intermediate, "intermediate columns", &blocks.intermediate),
        ("vc", &shares.vc, &workload.vocabulary, "vocabulary rows", &blocks.vocabulary),
        ("rs", &shares.rs, &workload.hidden, "residual columns", &None),
    ] {
        if let Some(counts) = counts {
            check_counts(name, counts, axis, unit, budgets)?;
            check_grid(name, counts, axis, unit, block.as_ref())?;
        }
    }
    match (&shares.experts, workload.experts) {
        (Some(counts), Some(experts)) => {
            let axis = Axis { total: experts, grid: 1, step: 1 };
            check_counts("experts", counts, &axis, "experts", budgets)?;
        }
        (Some(_), None) => {
            let got = "counts of whole experts, but this plan divides none";
            return Err(Error::invalid(
                "splits[\"experts\"]",
                got,
                "experts=\"whole\" and a model with routed experts",
            ));
        }
        (None, _) => {}
    }
    if shares.id.is_some() && workload.experts.is_some() {
        let got = "columns, but with experts=\"whole\" they follow the experts";
        return Err(Error::invalid("splits[\"id\"]", got, "splits[\"experts\"], or experts=\"inside\""));
    }
    Ok(FixedSteps {
        kv_heads: shares.kv.clone(),
        mlp: if workload.experts.is_some() { shares.experts.clone() } else { shares.id.clone() },
        vocabulary: shares.vc.clone(),
    })
}

fn check_counts(name: &str, counts: &[u64], axis: &Axis, unit: &str, budgets: &[RankBudget]) -> Result<()> {
    let argument = format!("splits[\"{name}\"]");
    if counts.len() != budgets.len() {
        let got = format!("{} numbers {counts:?}", counts.len());
        return Err(Error::invalid(argument, got, format!("one for each of the {} ranks", budgets.len())));
    }
    let sum = counts.iter().try_fold(0_u64, |sum, count| sum.checked_add(*count));
    if sum != Some(axis.total) {
        let got =
            sum.map_or_else(|| "a sum beyond 64 bits".to_owned(), |sum| format!("{counts:?}, {sum} in all"));
        return Err(Error::invalid(argument, got, format!("{} {unit} in all", axis.total)));
    }
    for (rank, count) in counts.iter().enumerate() {
        if *count > 0 && budgets[rank].gib == 0.0 {
            let wanted = format!("0: rank {rank} ({}) has a budget of 0 GiB", budgets[rank].device);
            return Err(Error::invalid(format!("{argument}[{rank}]"), count, wanted));
        }
    }
    Ok(())
}

/// Every cut must fall where the weights' format allows one. `counts` add up to the axis.
fn check_grid(name: &str, counts: &[u64], axis: &Axis, unit: &str, block: Option<&Block>) -> Result<()> {
    let Some((rank, count)) = counts.iter().enumerate().find(|(_, count)| !count.is_multiple_of(axis.grid))
    else {
        return Ok(());
    };
    let below = count - count % axis.grid;
    let why = block.map_or_else(
        || "these weights can be cut at multiples of that only".to_owned(),
        |Block { tensor, elements }| format!("{tensor} keeps blocks of {elements} elements together"),
    );
    let wanted = format!("{below} or {}, multiples of {}: {why}", below + axis.grid, axis.grid);
    Err(Error::invalid(format!("splits[\"{name}\"][{rank}]"), format!("{count} {unit}"), wanted))
}

/// Checks that a residual split that the caller fixed covers every rank of `id`.
pub(crate) fn check_residual(counts: &[u64], id: &Split) -> Result<Split> {
    let split = Split::from_counts(counts);
    if let Some(rank) = id.ranks().find(|rank| split.of(*rank).is_none()) {
        let got =
            format!("{counts:?}, nothing for rank {rank}, which has {} intermediate columns", id.count(rank));
        let wanted = "residual columns for every rank that has intermediate columns";
        return Err(Error::invalid("splits[\"rs\"]", got, wanted));
    }
    Ok(split)
}
