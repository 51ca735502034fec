//! Which feed-forward part each layer of a configuration has.

use crate::error::Result;
use crate::model::config::reader::{Config, LARGEST_DIMENSION, MOST_EXPERTS, MOST_LAYERS};
use crate::model::{Mixer, Mlp};

const INTERMEDIATE: &[&str] =
    &["intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "d_ff", "inner_dim"];
const EXPERTS: &[&str] =
    &["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"];
const ACTIVE: &[&str] = &[
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "num_experts_per_topk",
];
const EXPERT_WIDTH: &[&str] = &["moe_intermediate_size", "expert_ffn_hidden_size"];
const SHARED_WIDTH: &[&str] =
    &["shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"];
const SHARED_COUNT: &[&str] =
    &["n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"];

/// Architectures whose MLP is four times as wide as the residual stream unless a width is written.
const FOUR_TIMES: &[&str] = &[
    "bloom",
    "codegen",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gptj",
    "mpt",
    "RefinedWeb",
    "RefinedWebModel",
];

/// Architectures with one shared expert as wide as a routed one, which no key mentions.
const ONE_SHARED: &[&str] = &["llama4_text"];

/// Architectures whose recurrent layers carry no MLP, and whose MLPs are layers of their own.
const ONE_PART_A_LAYER: &[&str] = &["nemotron_h", "mamba", "mamba2", "falcon_mamba"];

/// The feed-forward part of each layer.
pub(in crate::model) fn mlps(config: &Config<'_>, hidden: u64, mixers: &[Mixer]) -> Result<Vec<Mlp>> {
    let layers = mixers.len();
    if ONE_PART_A_LAYER.contains(&config.architecture()) && mixers.iter().all(|mixer| *mixer != Mixer::None) {
        return Ok(vec![Mlp::None; layers]);
    }
    let experts = experts(config)?;
    let sparse = if experts.is_some() { sparse_layers(config, layers)? } else { vec![false; layers] };
    let has_mlp = |mixer: &Mixer| !ONE_PART_A_LAYER.contains(&config.architecture()) || *mixer == Mixer::None;
    let needs_dense = sparse.iter().zip(mixers).any(|(sparse, mixer)| !sparse && has_mlp(mixer));
    let widths = if needs_dense { dense_widths(config, hidden, layers)? } else { vec![0; layers] };
    let one = |((sparse, width), mixer): ((bool, u64), &Mixer)| match (&experts, sparse) {
        _ if !has_mlp(mixer) => Mlp::None,
        (Some(experts), true) => experts.clone(),
        _ if width == 0 => Mlp::None,
        _ => Mlp::Dense { width },
    };
    Ok(sparse.into_iter().zip(widths).zip(mixers).map(one).collect())
}

fn dense_widths(config: &Config<'_>, hidden: u64, layers: usize) -> Result<Vec<u64>> {
    // Llama 4 keeps its routed experts' width under the usual key.
    let keys = ["intermediate_size_mlp", "dense_intermediate_size"];
    if let Some(width) = config.size(&keys)? {
        return Ok(vec![width; layers]);
    }
    if let Some(widths) = config.per_layer(INTERMEDIATE, layers, LARGEST_DIMENSION)? {
        if widths.contains(&0) && widths.iter().all(|width| *width == 0) {
            return Err(config.broken(format!(
                "the MLP's width is 0, wanted 1 to {LARGEST_DIMENSION}; correct \"intermediate_size\""
            )));
        }
        return Ok(widths);
    }
    if let Some(width) = config.size(SHARED_WIDTH)? {
        // GraniteMoeHybrid without experts: the shared MLP is the only one.
        return Ok(vec![width; layers]);
    }
    if FOUR_TIMES.contains(&config.architecture()) {
        let width = match config.size(&["expansion_ratio"])? {
            Some(ratio) => hidden.checked_mul(ratio).filter(|width| *width <= LARGEST_DIMENSION),
            None => hidden.checked_mul(4),
        };
        return match width {
            Some(width) => Ok(vec![width; layers]),
            None => Err(config.broken(format!(
                "hidden size {hidden} times \"expansion_ratio\" is more than {LARGEST_DIMENSION}; correct one of the two"
            ))),
        };
    }
    Err(config.missing(INTERMEDIATE, "the MLP's width"))
}

/// What a layer of routed experts looks like; `None` where there are none.
fn experts(config: &Config<'_>) -> Result<Option<Mlp>> {
    let count = config.number(EXPERTS, MOST_EXPERTS)?.unwrap_or(0);
    // HunYuan's dense models write one expert.
    if count <= 1 {
        return Ok(None);
    }
    let active = config.required(ACTIVE, "the number of experts that a token uses")?;
    if active > count {
        return Err(config.contradiction(
            format!("{active} experts a token"),
            format!("{count} experts in all"),
            "correct one of the two",
        ));
    }
    let width = match config.size(EXPERT_WIDTH)? {
        Some(width) => width,
        None => config.required(INTERMEDIATE, "the width of an expert")?,
    };
    let shared_width = config.number(SHARED_WIDTH, LARGEST_DIMENSION)?.map_or_else(
        || {
            let unwritten = u64::from(ONE_SHARED.contains(&config.architecture()));
            let shared = config.number(SHARED_COUNT, MOST_EXPERTS)?.unwrap_or(unwritten);
            shared.checked_mul(width).filter(|all| *all <= LARGEST_DIMENSION).ok_or_else(|| {
                config.broken(format!(
                    "{shared} shared experts of {width} columns are more than {LARGEST_DIMENSION} columns; correct \
                     one of the two"
                ))
            })
        },
        Ok,
    )?;
    Ok(Some(Mlp::Experts { count, active, width, shared_width }))
}

/// Which layers have experts, by whichever rule the configuration uses; all of them without one.
fn sparse_layers(config: &Config<'_>, layers: usize) -> Result<Vec<bool>> {
    let all = || 0..layers as u64;
    if let Some((key, words)) = config.texts(&["mlp_layer_types"])? {
        config.same_length(key, words.len(), layers)?;
        let one = |word: &&str| match *word {
            "sparse" | "moe" => Ok(true),
            "dense" => Ok(false),
            other => {
                let shown: String = other.chars().take(60).collect();
                Err(config.broken(format!("{key} has the entry {shown:?}, wanted \"dense\" or \"sparse\"")))
            }
        };
        return words.iter().map(one).collect();
    }
    if let Some((_, sparse)) = config.numbers(&["moe_layers"], MOST_LAYERS)? {
        return Ok(all().map(|layer| sparse.contains(&layer)).collect());
    }
    if let Some(step) = config.size(&["interleave_moe_layer_step"])? {
        return Ok(all().map(|layer| (layer + 1) % step == 0).collect());
    }
    if let Some(period) = config.size(&["expert_layer_period"])? {
        let offset = config.number(&["expert_layer_offset"], MOST_LAYERS)?.unwrap_or(0);
        return Ok(all().map(|layer| layer % period == offset).collect());
    }
    if config.get(&["moe_layer_freq"]).is_some_and(|found| found.1.is_array()) {
        // MiMo writes a 0 or 1 a layer under DeepSeek's name.
        let Some((key, list)) = config.numbers(&["moe_layer_freq"], 1)? else {
            return Ok(vec![true; layers]);
        };
        config.same_length(key, list.len(), layers)?;
        return Ok(list.into_iter().map(|sparse| sparse == 1).collect());
    }
    let first = config.number(&["first_k_dense_replace", "num_dense_layers"], MOST_LAYERS)?.unwrap_or(0);
    let every = config.size(&["moe_layer_freq"])?.unwrap_or(1);
    let step = config.size(&["decoder_sparse_step"])?.unwrap_or(1);
    let start = config.number(&["moe_layer_start_index"], MOST_LAYERS)?.unwrap_or(0);
    // -1 stands for the last layer here, as Python has it.
    let end = match config.get(&["moe_layer_end_index"]) {
        Some((_, value)) if value.as_i64() == Some(-1) => None,
        Some((key, value)) => Some(config.whole(key, value, 0, MOST_LAYERS)?),
        None => None,
    };
    let interval = config.size(&["moe_layer_interval"])?.unwrap_or(1);
    let dense = config.numbers(&["mlp_only_layers"], MOST_LAYERS)?.map_or_else(Vec::new, |found| found.1);
    Ok(all()
        .map(|layer| {
            layer >= first
                && layer % every == 0
                && (layer + 1) % step == 0
                && layer >= start
                && end.is_none_or(|end| layer <= end)
                && (layer + 1) % interval == 0
                && !dense.contains(&layer)
        })
        .collect())
}
