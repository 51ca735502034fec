//! What a plan promises, asked again: planning what it says gives what it says.

// A test that meets what it did not expect has to stop there.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value, json};
use tp_rs::model::ModelShape;
use tp_rs::split::activations::{CUDA_FRAMEWORK_BYTES, CUDA_RANK_BYTES, CUDA_STREAM_BYTES};
use tp_rs::split::{Context, ExpertSplit, ExplicitShares, GIB, Item, Options, Plan, RankBudget};
use tp_rs::{Error, plan};

fn published(name: &str) -> ModelShape {
    let path = format!("{}/tests/data/configs/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let config: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    ModelShape::from_config(&config, name).unwrap()
}

fn small() -> ModelShape {
    let config = json!({
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 65536, "torch_dtype": "bfloat16",
    });
    ModelShape::from_config(&config, "small").unwrap()
}

/// Llama-3.1-8B in the main.
fn long_llama() -> ModelShape {
    let config = json!({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
        "max_position_embeddings": 131_072, "torch_dtype": "bfloat16",
    });
    ModelShape::from_config(&config, "long").unwrap()
}

/// Budgets as the Python package makes them: the first rank of a device in the list is given its context.
fn on_devices(ranks: &[(usize, f64)]) -> Vec<RankBudget> {
    let with = |place: usize, (device, gib): (usize, f64)| {
        if ranks[..place].iter().any(|earlier| earlier.0 == device) {
            RankBudget::sharing(&format!("cuda:{device}"), gib)
        } else {
            RankBudget::cuda(device, gib)
        }
    };
    ranks.iter().enumerate().map(|(place, rank)| with(place, *rank)).collect()
}

fn tokens(context: u64) -> Options {
    Options { context: Context::Tokens(context), ..Options::default() }
}

/// On every device with ranks that hold something, one of them bears the context; others and empty ranks do not.
fn contexts_are_counted_once(plan: &Plan) {
    let mut devices: Vec<&str> = plan.ranks.iter().map(|rank| rank.device.as_str()).collect();
    devices.sort_unstable();
    devices.dedup();
    for device in devices {
        let there = plan.ranks.iter().filter(|rank| rank.device == device && rank.total > 0);
        let mut framework: Vec<u64> = there.map(|rank| rank.bytes(Item::Framework)).collect();
        framework.sort_unstable();
        if let Some(most) = framework.pop() {
            assert_eq!(most, CUDA_FRAMEWORK_BYTES, "{device}: {:?}", plan.ranks);
            assert!(
                framework.iter().all(|bytes| *bytes == CUDA_RANK_BYTES + CUDA_STREAM_BYTES),
                "{framework:?}"
            );
        }
    }
    assert_eq!(plan.fits, plan.ranks.iter().all(|rank| rank.total <= rank.budget));
}

/// The context of a device was forgotten where the first rank there had no budget, or too little for anything.
#[test]
fn the_context_of_a_device_is_counted_where_its_first_rank_holds_nothing() {
    let shape = published("llama-3-8b");
    for (ranks, first) in [
        (vec![(0, 24.0), (0, 0.0)], 0),
        (vec![(0, 0.0), (0, 24.0)], 1),
        (vec![(0, 0.01), (0, 12.0), (1, 12.0)], 1),
    ] {
        let plan = plan(&shape, &on_devices(&ranks), &tokens(8192)).unwrap();
        assert!(plan.fits);
        contexts_are_counted_once(&plan);
        assert_eq!(plan.ranks[first].bytes(Item::Framework), CUDA_FRAMEWORK_BYTES, "{ranks:?}");
    }
}

/// A rank with 1 GiB could bear the context but does not: what is left for it is worth more beside another's.
#[test]
fn a_device_is_borne_by_a_rank_that_can() {
    let shape = small();
    for ranks in [vec![(0, 0.9), (0, 3.0)], vec![(0, 0.5), (0, 3.0)], vec![(0, 0.5), (0, 0.7), (0, 2.0)]] {
        let plan = plan(&shape, &on_devices(&ranks), &tokens(1024)).unwrap();
        assert!(plan.fits, "{:?}", plan.shortfall);
        contexts_are_counted_once(&plan);
    }
}

fn shared_ranks() -> impl Strategy<Value = Vec<(usize, f64)>> {
    let gib = prop_oneof![Just(0.0), 0.001_f64..0.3, 0.5_f64..1.2, 1.0_f64..3.0];
    prop::collection::vec((0_usize..2, gib), 1..6)
}

#[allow(clippy::cast_precision_loss)]
fn gib(bytes: u64) -> f64 {
    bytes as f64 / GIB as f64
}

/// Residual columns that a rank was given by the caller take its framework and norms, whatever else it holds.
#[test]
fn ranks_of_fixed_residual_columns_pay_for_taking_part() {
    let shape = published("llama-3-8b");
    let shares = ExplicitShares { rs: Some(vec![1366, 1365, 1365]), ..ExplicitShares::default() };
    let options = Options { shares, ..tokens(8192) };
    let poor = on_devices(&[(0, 24.0), (1, 24.0), (2, 0.8)]);
    let made = plan(&shape, &poor, &options).unwrap();
    assert!(!made.fits && made.max_context == 0, "{:?}", made.shortfall);
    assert_eq!(made.shortfall.unwrap().rank, 2);
    let most = Options { context: Context::Max, ..options.clone() };
    assert!(matches!(plan(&shape, &poor, &most), Err(Error::DoesNotFit(_))));
    let richer = on_devices(&[(0, 24.0), (1, 24.0), (2, 1.2)]);
    assert!(plan(&shape, &richer, &options).unwrap().fits);
    assert!(plan(&shape, &richer, &most).unwrap().fits);
}

/// 103863 tokens were advised here, for the splits of 131072, and did not fit with their own.
#[test]
fn the_reference_s_advice_can_be_followed() {
    let shape = long_llama();
    let ranks = on_devices(&[(0, 24.0), (1, 12.0), (2, 8.0)]);
    let at = |context| {
        let options = Options { strategy: tp_rs::split::Strategy::ExLlamaV2, context, ..Options::default() };
        plan(&shape, &ranks, &options).unwrap()
    };
    let (short, long, most) = (at(Context::Tokens(4096)), at(Context::Tokens(131_072)), at(Context::Max));
    assert!(short.fits && !long.fits && most.fits);
    assert_eq!([short.max_context, long.max_context], [most.context; 2]);
    assert!(long.shortfall.unwrap().advice.contains(&most.context.to_string()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn ranks_of_one_device_bear_its_context_once(ranks in shared_ranks(), context in 1_u64..20_000) {
        prop_assume!(ranks.iter().any(|rank| rank.1 > 0.0));
        let shape = small();
        let budgets = on_devices(&ranks);
        let Ok(made) = plan(&shape, &budgets, &tokens(context)) else { return Ok(()) };
        contexts_are_counted_once(&made);
        // Ranks without a budget change nothing but where the search stops, a few tokens before the last byte is used.
        let with_room: Vec<(usize, f64)> = ranks.iter().copied().filter(|rank| rank.1 > 0.0).collect();
        let without = plan(&shape, &on_devices(&with_room), &tokens(context)).unwrap();
        let (more, less) = (made.max_context.max(without.max_context), made.max_context.min(without.max_context));
        prop_assert!(more - less <= 64, "{} {}", made.max_context, without.max_context);
        if made.max_context > 0 {
            let largest = plan(&shape, &budgets, &tokens(made.max_context)).unwrap();
            prop_assert!(largest.fits, "{} tokens: {:?}", made.max_context, largest.shortfall);
            contexts_are_counted_once(&largest);
        }
    }

    /// One rank has no choice: the largest context is where its bytes end, to the token.
    #[test]
    fn one_rank_s_largest_context_is_exact(
        context in 1_u64..5000, spare in 0_u64..(16 << 20), whole in any::<bool>(), latent in any::<bool>(),
    ) {
        let shape = if latent { published("deepseek-v2-lite") } else { published("qwen1.5-moe-a2.7b") };
        let experts = if whole { ExpertSplit::Whole } else { ExpertSplit::Inside };
        let ample = |context| {
            let options = Options { experts, ..tokens(context) };
            plan(&shape, &[RankBudget::cpu(4000.0)], &options).unwrap().ranks[0].total
        };
        let bytes = ample(context) + spare;
        let budget = RankBudget::cpu(gib(bytes) + 1e-9);
        let asked = plan(&shape, std::slice::from_ref(&budget), &Options { experts, ..tokens(context) }).unwrap();
        prop_assert!(asked.fits);
        let most = Options { experts, context: Context::Max, ..Options::default() };
        let made = plan(&shape, std::slice::from_ref(&budget), &most).unwrap();
        prop_assert_eq!(made.max_context, asked.max_context);
        prop_assert!(made.fits && made.context >= context);
        // Budgets are a number of bytes or one more.
        prop_assert!(ample(made.context) <= bytes + 1);
        prop_assert!(ample(made.context + 1) > bytes, "{}", made.context);
    }

    #[test]
    fn largest_contexts_of_several_widths_fit(
        gib in prop::collection::vec(4.0_f64..24.0, 1..4), whole in any::<bool>(), context in 1_u64..60_000,
    ) {
        let shape = published("deepseek-v2-lite");
        let ranks: Vec<RankBudget> = gib.iter().map(|gib| RankBudget::cpu(*gib)).collect();
        let experts = if whole { ExpertSplit::Whole } else { ExpertSplit::Inside };
        let made = plan(&shape, &ranks, &Options { experts, ..tokens(context) }).unwrap();
        prop_assert!(!made.fits || made.max_context >= context);
        match plan(&shape, &ranks, &Options { experts, context: Context::Max, ..Options::default() }) {
            Ok(most) => {
                prop_assert!(most.fits && made.max_context > 0);
                let again = plan(&shape, &ranks, &Options { experts, ..tokens(most.context) }).unwrap();
                prop_assert!(again.fits);
            }
            Err(error) => prop_assert!(matches!(error, Error::DoesNotFit(_)) && !made.fits, "{}", error),
        }
        if made.max_context > 0 {
            let again = plan(&shape, &ranks, &Options { experts, ..tokens(made.max_context) }).unwrap();
            prop_assert!(again.fits, "{:?}", again.shortfall);
        }
    }

    /// The reference's splits depend on the context: only those made for a context say whether it fits.
    #[test]
    fn the_reference_s_largest_context_fits_with_its_own_splits(
        gib in prop::collection::vec(6.0_f64..26.0, 2..5), context in 1_u64..131_072, batch in 1_u64..3,
    ) {
        let shape = long_llama();
        let options = |context| {
            Options { strategy: tp_rs::split::Strategy::ExLlamaV2, batch, context, ..Options::default() }
        };
        let ranks: Vec<RankBudget> = gib.iter().enumerate().map(|(rank, gib)| RankBudget::cuda(rank, *gib)).collect();
        let at = |context| plan(&shape, &ranks, &options(Context::Tokens(context)));
        let asked = match at(context) {
            Err(error) => {
                prop_assert!(matches!(error, Error::NothingToApportion { .. }), "{}", error);
                return Ok(());
            }
            Ok(asked) => asked,
        };
        prop_assert!(!asked.fits || asked.max_context >= context);
        if asked.max_context > 0 {
            prop_assert!(at(asked.max_context).unwrap().fits, "{} tokens", asked.max_context);
            let beyond = at(asked.max_context + 1);
            let at_the_end = asked.max_context == 131_072 || asked.max_context == context;
            prop_assert!(at_the_end || !beyond.is_ok_and(|plan| plan.fits));
        }
        match plan(&shape, &ranks, &options(Context::Max)) {
            Ok(most) => {
                prop_assert!(most.fits && most.context == most.max_context);
                prop_assert!(asked.max_context == most.context || asked.max_context == context);
            }
            Err(Error::DoesNotFit(_) | Error::NothingToApportion { .. }) => prop_assert!(!asked.fits || context > 1),
            Err(error) => prop_assert!(false, "{error}"),
        }
        if let Some(shortfall) = asked.shortfall && asked.max_context > 0 {
            let advised = shortfall.advice.contains(&format!("context of {} tokens", asked.max_context));
            prop_assert!(advised, "{}", shortfall.advice);
        }
    }

    /// A chunk that no prompt fills takes what the longest prompt takes.
    #[test]
    fn tokens_beyond_the_context_are_not_counted(
        context in 1_u64..6000, batch in 1_u64..5, more in 0_u64..5000, devices in any::<bool>(),
    ) {
        let shape = small();
        let ranks = if devices { on_devices(&[(0, 60.0), (1, 40.0)]) } else { vec![RankBudget::cpu(50.0); 2] };
        let at = |chunk| plan(&shape, &ranks, &Options { batch, chunk, ..tokens(context) }).unwrap();
        let padded = if devices {
            [32, 128, 512, 2048].into_iter().filter(|step| *step >= context).min().unwrap_or(context)
        } else {
            context
        };
        let filled = at(batch * padded);
        let made = at(batch * padded + more);
        prop_assert_eq!(made.chunk, batch * padded + more);
        prop_assert_eq!(&made.ranks, &filled.ranks);
        prop_assert_eq!((made.buffer_bytes, made.pinned_bytes), (filled.buffer_bytes, filled.pinned_bytes));
        // Rows of 1024 columns of 2 bytes, or logits of 32000 rows in float32.
        let rows = (batch * padded * 1024 * 2).max(batch * 32_000 * 4);
        prop_assert_eq!(made.buffer_bytes, rows);
        prop_assert!(made.ranks.iter().all(|rank| rank.bytes(Item::Communicator) >= batch * padded * 1024 * 2));
        if batch * padded > 64 {
            let less = at(batch * padded - batch);
            prop_assert!(less.ranks.iter().zip(&made.ranks).all(|(less, more)| less.total < more.total));
        }
    }

    /// Times of any speeds that are taken are numbers that JSON has.
    #[test]
    fn plans_of_any_speeds_come_back_from_json(exponents in prop::collection::vec(prop_oneof![-320_i32..309, -12_i32..18], 2)) {
        let speeds: Vec<f64> =
            exponents.iter().map(|exponent| format!("1e{exponent}").parse().unwrap()).collect();
        let ranks: Vec<RankBudget> = speeds.iter().map(|speed| RankBudget::cpu(4.0).with_speed(*speed)).collect();
        let shares = ExplicitShares { kv: Some(vec![4, 4]), ..ExplicitShares::default() };
        let outside = speeds.iter().position(|speed| !(1e-9..=1e15).contains(speed));
        match (plan(&small(), &ranks, &Options { shares, ..tokens(64) }), outside) {
            (Ok(made), None) => {
                prop_assert!(made.step_time.total().is_finite());
                let text = serde_json::to_string(&made).unwrap();
                prop_assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), made);
            }
            (Err(Error::InvalidArgument { argument, got, wanted }), Some(rank)) => {
                prop_assert_eq!(argument, format!("speeds[{rank}]"));
                prop_assert_eq!(got.parse::<f64>().unwrap().to_bits(), speeds[rank].to_bits());
                prop_assert!(got.len() < 20, "{}", got);
                prop_assert!(wanted.contains("1e-9 to 1e15"), "{}", wanted);
            }
            (made, outside) => prop_assert!(false, "{:?} with {:?}", made.map(|made| made.step_time), outside),
        }
    }
}
