//! Plans that come back from JSON: every one that was made is taken, and none that could not have been.

// A test that meets what it did not expect has to stop there.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::sync::LazyLock;

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::Value;
use tp_rs::model::ModelShape;
use tp_rs::plan;
use tp_rs::split::{Context, ExpertSplit, Options, Plan, RankBudget, Share, Split, Strategy as How};

fn all_published() -> Vec<ModelShape> {
    let folder = format!("{}/tests/data/configs", env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let read = |path: std::path::PathBuf| {
        let config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        ModelShape::from_config(&config, &path.display().to_string()).ok()
    };
    let shapes: Vec<ModelShape> = files.filter_map(read).collect();
    assert!(shapes.len() > 40, "only {} configurations", shapes.len());
    shapes
}

static SHAPES: LazyLock<Vec<ModelShape>> = LazyLock::new(all_published);

fn all_options() -> Vec<Options> {
    let options = |strategy, duplicate_kv, experts| Options {
        strategy,
        duplicate_kv,
        experts,
        context: Context::Tokens(512),
        ..Options::default()
    };
    vec![
        options(How::Balanced, false, ExpertSplit::Inside),
        options(How::Balanced, true, ExpertSplit::Inside),
        options(How::Balanced, false, ExpertSplit::Whole),
        options(How::Balanced, true, ExpertSplit::Whole),
        options(How::ExLlamaV2, false, ExpertSplit::Inside),
    ]
}

/// Ranks for so much of a model, in parts.
fn ranks(shape: &ModelShape, parts: &[f64], filled: f64) -> Vec<RankBudget> {
    #[allow(clippy::cast_precision_loss)]
    let all = shape.total_bytes() as f64 / (1_u64 << 30) as f64 * filled + 0.1;
    let sum: f64 = parts.iter().sum::<f64>() + 1e-9;
    parts.iter().map(|part| RankBudget::cpu(all * part / sum)).collect()
}

fn parts() -> impl Strategy<Value = Vec<f64>> {
    prop::collection::vec(prop_oneof![3 => 0.1_f64..1.0, 1 => Just(0.0)], 1..7)
}

/// The splits of a plan by name, those that are there.
fn splits(plan: &mut Plan) -> Vec<&mut Split> {
    let splits = &mut plan.splits;
    let main = [&mut splits.kv, &mut splits.q, &mut splits.id, &mut splits.vc, &mut splits.rs];
    let others = splits.experts.iter_mut().chain(splits.widths.values_mut());
    main.into_iter().chain(others).filter(|split| !split.0.is_empty()).collect()
}

/// One thing that is wrong with a split, after which it gives no model's units to the ranks.
fn spoil(split: &mut Split, at: Index, how: usize) {
    let shares = &mut split.0;
    let place = at.index(shares.len());
    match how {
        0 => shares[place].end = u64::MAX,
        1 => shares[place].start += 1,
        2 => shares.insert(place, shares[place]),
        3 => shares[place].rank += 1000,
        4 => shares.clear(),
        5 => shares[0].start = shares[0].end + 3,
        6 => {
            let Share { rank, end, .. } = shares[shares.len() - 1];
            shares.push(Share { rank, start: end, end: end + 64 });
        }
        _ => shares[place].end -= 1,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn plans_that_were_made_are_taken_and_spoilt_ones_are_not(
        shape in any::<Index>(), options in any::<Index>(), parts in parts(), filled in 0.3_f64..2.5,
        split in any::<Index>(), at in any::<Index>(), how in 0_usize..8,
    ) {
        prop_assume!(parts.iter().any(|part| *part > 0.0));
        let shape = shape.get(&SHAPES);
        let Ok(made) = plan(shape, &ranks(shape, &parts, filled), options.get(&all_options())) else {
            return Ok(());
        };
        let text = serde_json::to_string(&made).unwrap();
        let again: Plan = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(again.check(), Ok(()), "{}", shape.name);
        prop_assert_eq!(&again, &made);

        let mut spoilt = made.clone();
        if let Some(split) = splits(&mut spoilt).into_iter().nth(split.index(5)) {
            spoil(split, at, how);
            prop_assert!(spoilt.check().is_err(), "{}: {:?}", shape.name, spoilt.splits);
        }
        let mut spoilt = made.clone();
        spoilt.ranks[0].total += 1;
        prop_assert!(spoilt.check().is_err());
        let mut spoilt = made.clone();
        spoilt.fits = !made.fits;
        prop_assert!(spoilt.check().is_err());
        // Both words changed together still contradict the totals.
        spoilt.shortfall = match made.shortfall {
            Some(_) => None,
            None => Some(serde_json::from_str(SHORTFALL).unwrap()),
        };
        prop_assert!(spoilt.check().is_err());
    }
}

const SHORTFALL: &str =
    r#"{"rank": 0, "device": "cpu", "missing": 1, "missing_total": 1, "item": "mlp", "advice": "none"}"#;

#[test]
fn every_architecture_s_plan_is_taken() {
    for shape in SHAPES.iter() {
        for options in all_options() {
            let Ok(made) = plan(shape, &ranks(shape, &[0.5, 0.3, 0.2], 2.0), &options) else { continue };
            assert_eq!(made.check(), Ok(()), "{} {options:?}", shape.name);
        }
    }
}
