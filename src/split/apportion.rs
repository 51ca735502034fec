//! Dividing a whole number of units in proportion to real numbers.

use crate::error::{Error, Result};

/// Divides `total` units in proportion to `ratios`, exactly as `ExLlamaV2`'s `integer_split` does
/// (`exllamav2/util.py:334-353` of v0.3.2): the largest-remainder method, after which shares below `minimum` are
/// taken away and their units go, one at a time, to the smallest share that is left.
///
/// The shares add up to `total`. Ties go to the lowest index. Where every share is below `minimum`, the last index
/// gets everything, as in the reference.
///
/// # Errors
/// [`Error::InvalidArgument`] for a ratio that is negative, NaN or infinite (the reference returns shares that do
/// not add up), and for no ratios at all with something to divide; [`Error::NothingToApportion`] where the ratios
/// add up to zero (a `ZeroDivisionError` in the reference).
///
/// ```
/// assert_eq!(tp_rs::split::integer_split(32, &[24.0, 12.0, 8.0], 0)?, [17, 9, 6]);
/// assert_eq!(tp_rs::split::integer_split(32, &[24.0, 24.0, 1.0], 2)?, [16, 16, 0]);
/// # Ok::<(), tp_rs::Error>(())
/// ```
pub fn integer_split(total: u64, ratios: &[f64], minimum: u64) -> Result<Vec<u64>> {
    apportion("the total", total, ratios, minimum)
}

/// [`integer_split`], with a name for what is divided.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub(crate) fn apportion(what: &'static str, total: u64, ratios: &[f64], minimum: u64) -> Result<Vec<u64>> {
    for (index, &ratio) in ratios.iter().enumerate() {
        if !ratio.is_finite() || ratio < 0.0 {
            return Err(Error::invalid(format!("ratios[{index}]"), ratio, "a finite number of 0 or more"));
        }
    }
    if ratios.is_empty() {
        if total == 0 {
            return Ok(Vec::new());
        }
        return Err(Error::invalid(
            "ratios",
            "an empty list",
            format!("at least one ratio to divide {total} by"),
        ));
    }
    let sum: f64 = ratios.iter().sum();
    if sum == 0.0 || !sum.is_finite() {
        return Err(Error::NothingToApportion { what, ratios: ratios.to_vec(), sum });
    }

    // Multiplied before it is divided: the other order rounds differently and moves units.
    let exact: Vec<f64> = ratios.iter().map(|ratio| total as f64 * ratio / sum).collect();
    let mut shares: Vec<u64> = exact.iter().map(|share| *share as u64).collect();
    let mut remainders: Vec<f64> = exact.iter().zip(&shares).map(|(e, s)| e - *s as f64).collect();
    let given: u64 = shares.iter().fold(0, |sum: u64, share| sum.saturating_add(*share));
    for _ in 0..total.saturating_sub(given) {
        let largest = first_largest(&remainders);
        shares[largest] += 1;
        remainders[largest] -= 1.0;
    }

    let mut freed = 0;
    for share in &mut shares {
        if *share < minimum {
            freed += *share;
            *share = 0;
        }
    }
    level_up(&mut shares, freed);
    Ok(shares)
}

fn first_largest(values: &[f64]) -> usize {
    let mut largest = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[largest] {
            largest = index;
        }
    }
    largest
}

/// Gives `units` out one at a time, each to the smallest share that is not zero (ties to the lowest index), or all
/// to the last index where every share is zero. A whole level is filled at once: a unit at a time never ends for
/// the totals that 64 bits can hold.
fn level_up(shares: &mut [u64], mut units: u64) {
    while units > 0 {
        let Some(lowest) = shares.iter().copied().filter(|share| *share > 0).min() else {
            if let Some(last) = shares.last_mut() {
                *last = units;
            }
            return;
        };
        let members: Vec<usize> = (0..shares.len()).filter(|i| shares[*i] == lowest).collect();
        let count = members.len() as u64;
        let next = shares.iter().copied().filter(|share| *share > lowest).min();
        let height = next.map_or(u64::MAX, |next| next - lowest);
        let rise = height.min(units / count);
        for &index in &members {
            shares[index] += rise;
        }
        units -= rise * count;
        if rise < height {
            // Less than a unit for each member is left.
            for &index in members.iter().take(usize::try_from(units).unwrap_or(usize::MAX)) {
                shares[index] += 1;
            }
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The reference's rule for freed units, a unit at a time.
    fn level_up_slowly(shares: &mut [u64], units: u64) {
        for _ in 0..units {
            let smallest = shares.iter().copied().filter(|s| *s > 0).min();
            let index = smallest.map_or(shares.len() - 1, |s| shares.iter().position(|x| *x == s).unwrap());
            shares[index] += 1;
        }
    }

    proptest! {
        #[test]
        fn filling_levels_equals_giving_units_one_by_one(
            shares in prop::collection::vec(0_u64..12, 1..8), units in 0_u64..200,
        ) {
            let (mut fast, mut slow) = (shares.clone(), shares);
            level_up(&mut fast, units);
            level_up_slowly(&mut slow, units);
            prop_assert_eq!(fast, slow);
        }

        #[test]
        fn shares_add_up_and_stay_within_one_unit_of_the_quota(
            total in 0_u64..1_000_000, ratios in prop::collection::vec(0.0_f64..1e6, 1..16),
        ) {
            prop_assume!(ratios.iter().sum::<f64>() > 0.0);
            let shares = integer_split(total, &ratios, 0).unwrap();
            prop_assert_eq!(shares.iter().sum::<u64>(), total);
            let sum: f64 = ratios.iter().sum();
            for (share, ratio) in shares.iter().zip(&ratios) {
                prop_assert!((*share as f64 - total as f64 * ratio / sum).abs() < 1.0 + 1e-6);
            }
        }

        #[test]
        fn no_share_is_below_the_minimum_unless_it_is_nothing(
            total in 1_u64..100_000, ratios in prop::collection::vec(0.01_f64..100.0, 1..10),
            minimum in 0_u64..2000,
        ) {
            let shares = integer_split(total, &ratios, minimum).unwrap();
            prop_assert_eq!(shares.iter().sum::<u64>(), total);
            if total >= minimum {
                prop_assert!(shares.iter().all(|share| *share == 0 || *share >= minimum));
            }
        }
    }

    #[test]
    fn a_huge_total_with_everything_below_the_minimum_ends_at_once() {
        let shares = integer_split(1 << 52, &[1.0, 1.0], u64::MAX).unwrap();
        assert_eq!(shares, [0, 1 << 52]);
    }

    #[test]
    fn bad_ratios_are_named_with_their_index() {
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            let error = integer_split(4, &[1.0, bad], 0).unwrap_err().to_string();
            assert!(error.contains("ratios[1]"), "{error}");
        }
        assert!(matches!(integer_split(4, &[0.0, 0.0], 0), Err(Error::NothingToApportion { .. })));
        assert!(matches!(integer_split(4, &[], 0), Err(Error::InvalidArgument { .. })));
        assert_eq!(integer_split(0, &[], 0).unwrap(), Vec::<u64>::new());
    }
}
