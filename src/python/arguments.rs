//! Python arguments to the crate's own types, with errors that name the argument.

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyString};

use super::errors::{invalid, to_python};
use crate::split::{Context, ExplicitShares, Options, RankBudget};

/// A whole number of 0 or more. A bool is refused: `batch=True` is a slip, whatever Python says of its type.
pub(super) fn whole(value: &Bound<'_, PyAny>, argument: &str) -> PyResult<u64> {
    let refused = || {
        let wanted = "a whole number of 0 or more, below 2^64";
        invalid(value.py(), argument, shown(value), wanted)
    };
    if value.is_instance_of::<PyBool>() {
        return Err(refused());
    }
    value.extract().map_err(|_| refused())
}

/// A rank's number as it is given; whether there is such a rank is for the caller to say.
pub(super) fn number(value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let number = if value.is_instance_of::<PyBool>() { None } else { value.extract().ok() };
    number.ok_or_else(|| invalid(value.py(), "root", shown(value), "the number of a rank"))
}

/// The number of one of so many ranks.
pub(super) fn rank(value: &Bound<'_, PyAny>, argument: &str, ranks: usize) -> PyResult<usize> {
    let number = if value.is_instance_of::<PyBool>() { None } else { value.extract().ok() };
    number.filter(|rank| *rank < ranks).ok_or_else(|| {
        invalid(value.py(), argument, shown(value), format!("0 to {}", ranks.saturating_sub(1)))
    })
}

/// A list of numbers; whether each is usable is for the crate to say.
pub(super) fn floats(values: &Bound<'_, PyAny>, argument: &str) -> PyResult<Vec<f64>> {
    let wanted = "a list of numbers";
    if values.is_instance_of::<PyString>() {
        return Err(invalid(values.py(), argument, shown(values), wanted));
    }
    let entries = values.try_iter().map_err(|_| invalid(values.py(), argument, shown(values), wanted))?;
    let mut numbers = Vec::new();
    for (index, entry) in entries.enumerate() {
        let entry = entry?;
        let number = entry
            .extract()
            .map_err(|_| invalid(entry.py(), format!("{argument}[{index}]"), shown(&entry), "a number"))?;
        numbers.push(number);
    }
    Ok(numbers)
}

/// What was given, for a message: short, whatever its size.
fn shown(value: &Bound<'_, PyAny>) -> String {
    const LIMIT: usize = 80;
    let Ok(text) = value.repr().and_then(|text| text.extract::<String>()) else {
        return format!("a {}", value.get_type());
    };
    if text.chars().count() <= LIMIT {
        return text;
    }
    text.chars().take(LIMIT).chain("...".chars()).collect()
}

/// Budgets of the ranks. Ranks that share a CUDA device share its context too, which is given to the first of them; the
/// planner charges another one where that one holds nothing.
pub(super) fn budgets(ranks: Vec<(String, f64, Option<f64>)>) -> Vec<RankBudget> {
    let mut budgets: Vec<RankBudget> = Vec::with_capacity(ranks.len());
    for (device, gib, speed) in ranks {
        let first = budgets.iter().all(|earlier| earlier.device != device);
        // The fields besides the framework's bytes are overwritten.
        let budget = match (device.starts_with("cuda"), first) {
            (true, true) => RankBudget::cuda(0, gib),
            (true, false) => RankBudget::sharing(&device, gib),
            (false, _) => RankBudget::cpu(gib),
        };
        budgets.push(RankBudget { device, speed, ..budget });
    }
    budgets
}

/// The crate's options; what is left out is the crate's default.
#[allow(clippy::too_many_arguments)]
pub(super) fn options(
    py: Python<'_>,
    context: Option<&Bound<'_, PyAny>>,
    batch: Option<&Bound<'_, PyAny>>,
    chunk: Option<&Bound<'_, PyAny>>,
    cache: &str,
    strategy: &str,
    splits: Option<&Bound<'_, PyDict>>,
    duplicate_kv: bool,
    experts: &str,
) -> PyResult<Options> {
    let defaults = Options::default();
    Ok(Options {
        context: context.map_or(Ok(defaults.context), parse_context)?,
        batch: batch.map_or(Ok(defaults.batch), |batch| whole(batch, "batch"))?,
        chunk: chunk.map_or(Ok(defaults.chunk), |chunk| whole(chunk, "chunk"))?,
        cache: cache.parse().map_err(|error| to_python(py, &error))?,
        strategy: strategy.parse().map_err(|error| to_python(py, &error))?,
        shares: splits.map_or_else(|| Ok(ExplicitShares::default()), shares)?,
        duplicate_kv,
        experts: experts.parse().map_err(|error| to_python(py, &error))?,
        attention_footprint: None,
    })
}

fn parse_context(context: &Bound<'_, PyAny>) -> PyResult<Context> {
    if let Ok(text) = context.extract::<String>() {
        return match text.as_str() {
            "max" => Ok(Context::Max),
            _ => Err(invalid(
                context.py(),
                "context",
                format!("{text:?}"),
                "a number of tokens, \"max\" for as many as fit, or None for the model's own limit up to 8192",
            )),
        };
    }
    whole(context, "context").map(Context::Tokens)
}

fn shares(splits: &Bound<'_, PyDict>) -> PyResult<ExplicitShares> {
    let mut shares = ExplicitShares::default();
    for (key, value) in splits {
        if value.is_none() {
            continue;
        }
        let name = key.extract::<String>().unwrap_or_else(|_| shown(&key));
        let target = match name.as_str() {
            "kv" => &mut shares.kv,
            "id" => &mut shares.id,
            "vc" => &mut shares.vc,
            "rs" => &mut shares.rs,
            "experts" => &mut shares.experts,
            _ => {
                let wanted = "the keys \"kv\", \"id\", \"vc\", \"rs\" or \"experts\" (query heads follow kv)";
                return Err(invalid(splits.py(), "splits", format!("the key {name:?}"), wanted));
            }
        };
        let argument = format!("splits[{name:?}]");
        let not_a_list =
            || invalid(splits.py(), argument.clone(), shown(&value), "a list with one number a rank");
        if value.is_instance_of::<PyString>() {
            return Err(not_a_list());
        }
        let mut counts = Vec::new();
        for (rank, count) in value.try_iter().map_err(|_| not_a_list())?.enumerate() {
            counts.push(whole(&count?, &format!("{argument}[{rank}]"))?);
        }
        *target = Some(counts);
    }
    Ok(shares)
}
