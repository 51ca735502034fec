//! The reference strategy against what ExLlamaV2's own Python computed (`tests/data/reference_*.jsonl`).

// A test that meets what it did not expect has to stop there.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use serde_json::Value;
use tp_rs::Error;
use tp_rs::split::reference::{ReferenceInput, define_splits};
use tp_rs::split::{Split, integer_split};

fn cases(text: &str) -> impl Iterator<Item = Value> + '_ {
    text.lines().map(|line| serde_json::from_str(line).expect("a recorded case is JSON"))
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap_or(0.0)).collect()
}

fn unsigned(case: &Value, key: &str) -> u64 {
    case[key].as_u64().unwrap_or_else(|| panic!("{key} of case {}", case["id"]))
}

/// The kind of the recorded Python exception, as this crate says it.
fn same_kind(recorded: &str, error: &Error, case: &Value) -> bool {
    match recorded {
        "ZeroDivisionError" if case["num_key_value_heads"] == 0 => {
            matches!(error, Error::ReferenceRefuses { .. })
        }
        "ZeroDivisionError" => matches!(error, Error::NothingToApportion { .. }),
        "AssertionError" => matches!(error, Error::ReferenceRefuses { .. }),
        "ValueError" => matches!(error, Error::InvalidArgument { .. }),
        _ => false,
    }
}

#[test]
fn integer_split_equals_every_recorded_case() {
    let mut equal = 0;
    for case in cases(include_str!("data/reference_integer_split.jsonl")) {
        let ratios = numbers(&case["ratios"]);
        let got = integer_split(unsigned(&case, "total"), &ratios, unsigned(&case, "minimum"));
        if ratios.iter().any(|ratio| *ratio < 0.0) {
            assert!(matches!(got, Err(Error::InvalidArgument { .. })), "case {}: {got:?}", case["id"]);
            continue;
        }
        match (got, case["exception"]["type"].as_str()) {
            (Ok(shares), None) => {
                assert_eq!(serde_json::json!(shares), case["result"], "case {}", case["id"]);
                equal += 1;
            }
            (Err(error), Some(kind)) => assert!(same_kind(kind, &error, &case), "{}: {error}", case["id"]),
            (got, recorded) => panic!("case {}: got {got:?}, recorded {recorded:?}", case["id"]),
        }
    }
    assert!(equal > 500, "only {equal} cases were compared");
}

fn input(case: &Value) -> ReferenceInput {
    let tokens = match unsigned(case, "expect_cache_tokens") {
        0 => unsigned(case, "max_seq_len") * unsigned(case, "max_batch_size"),
        tokens => tokens,
    };
    let budgets_mb = if case["gpu_split"].is_null() {
        numbers(&case["free_mb"])
    } else {
        numbers(&case["gpu_split"]).iter().map(|gib| gib * 1024.0).collect()
    };
    let layers = unsigned(case, "num_hidden_layers");
    let footprint = unsigned(case, "attn_footprint_bytes_per_layer");
    ReferenceInput {
        budgets_mb,
        kv_heads: unsigned(case, "num_key_value_heads"),
        query_heads_per_kv_head: unsigned(case, "num_key_value_groups"),
        head_dim: unsigned(case, "head_dim"),
        hidden: unsigned(case, "hidden_size"),
        intermediate: unsigned(case, "intermediate_size"),
        vocabulary: unsigned(case, "vocab_size"),
        layers,
        cache_tokens: tokens,
        cache_bytes_per_element: case["bytes_per_element"].as_f64().unwrap(),
        attention_footprints: vec![footprint; usize::try_from(layers).unwrap()],
    }
}

#[test]
fn splits_equal_every_recorded_case() {
    let mut equal = 0;
    for case in cases(include_str!("data/reference_splits.jsonl")) {
        let input = input(&case);
        // Which architectures the reference supports is asked of its own configuration object, not of arithmetic.
        if case["supports_tp"] == false {
            continue;
        }
        let got = define_splits(&input);
        if input.budgets_mb.iter().any(|budget| *budget < 0.0) {
            assert!(matches!(got, Err(Error::InvalidArgument { .. })), "case {}: {got:?}", case["id"]);
            continue;
        }
        match (got, case["exception"]["type"].as_str()) {
            (Ok(splits), None) => {
                let same = |split: &Split, key: &str| {
                    assert_eq!(serde_json::json!(split), case[key], "case {} {key}", case["id"]);
                };
                same(&splits.kv, "kv_split");
                same(&splits.q, "q_split");
                same(&splits.id, "id_split");
                same(&splits.vc, "vc_split");
                same(&splits.rs, "rs_split");
                equal += 1;
            }
            (Err(error), Some(kind)) => assert!(same_kind(kind, &error, &case), "{}: {error}", case["id"]),
            (got, recorded) => panic!("case {}: got {got:?}, recorded {recorded:?}", case["id"]),
        }
    }
    assert!(equal > 340, "only {equal} cases were compared");
}
