//! Which kind of mixer each layer of a configuration has, and how large a recurrent state is.

use crate::error::{Error, Result};
use crate::model::config::reader::{Config, LARGEST_DIMENSION, MOST_LAYERS, quoted};

/// What a layer looks back on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::model) enum Kind {
    /// Attention to every token before it.
    Full,
    /// Attention to this many tokens, its own included.
    Window(u64),
    /// A state of fixed size.
    Recurrent {
        /// What the configuration calls it.
        name: &'static str,
        /// Elements of the state of one sequence.
        state_elements: u64,
    },
    /// No mixer.
    None,
}

/// How a configuration writes a kind of layer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Written {
    Full,
    Sliding,
    Chunked,
    Recurrent(&'static str),
    /// Only an MLP.
    Mlp,
}

/// The words of `layer_types` and its older names. `"hybrid"` (attention beside a state-space mixer) is missing
/// on purpose: a layer has one mixer here.
const WORDS: &[(&str, Written)] = &[
    ("full_attention", Written::Full),
    ("attention", Written::Full),
    ("global_attention", Written::Full),
    ("global", Written::Full),
    ("sliding_attention", Written::Sliding),
    ("sliding_window_attention", Written::Sliding),
    ("local_attention", Written::Sliding),
    ("local", Written::Sliding),
    ("chunked_attention", Written::Chunked),
    ("linear_attention", Written::Recurrent("linear_attention")),
    ("mamba", Written::Recurrent("mamba")),
    ("mamba2", Written::Recurrent("mamba")),
    ("conv", Written::Recurrent("short_convolution")),
    ("short_conv", Written::Recurrent("short_convolution")),
    ("recurrent", Written::Recurrent("rg_lru")),
    ("moe", Written::Mlp),
    ("mlp", Written::Mlp),
];

/// Architectures of one recurrence and no attention at all.
const PURE: &[(&str, &str)] = &[
    ("mamba", "mamba"),
    ("falcon_mamba", "mamba"),
    ("mamba2", "mamba"),
    ("rwkv", "rwkv"),
    ("rwkv5", "rwkv"),
];

/// Architectures with attention and a state-space mixer side by side in one layer.
const SIDE_BY_SIDE: &[&str] = &["falcon_h1", "zamba", "zamba2", "hymba"];

/// `max_window_layers` is where windows begin, but here they end there, and only every second layer has one.
const EVERY_SECOND_BELOW: &[&str] = &["qwen2_moe"];

/// Classes whose every layer has the window that the configuration names. Other classes ignore the key or choose
/// layers by a rule of their own; where that is not known, a layer counts as one that sees everything, because
/// then its cache can only turn out smaller than planned.
const EVERY_LAYER: &[&str] = &[
    "doge",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "moshi",
    "phi3",
    "phi4_multimodal",
    "phimoe",
    "qwen3_moe",
    "starcoder2",
];

/// Classes whose layers are recurrent unless the configuration says which attend.
const RECURRENT_UNLESS_SAID: &[&str] = &["bamba", "granitemoehybrid"];

/// The kind of each of `layers` layers.
pub(in crate::model) fn kinds(config: &Config<'_>, layers: usize) -> Result<Vec<Kind>> {
    let architecture = config.architecture();
    if SIDE_BY_SIDE.contains(&architecture) {
        return Err(Error::NoModel {
            path: config.name().into(),
            found: format!(
                "layers that hold attention and a state-space mixer side by side ({architecture})"
            ),
            wanted: "layers with one mixer each, whose cache can be told; such a model cannot be planned"
                .to_owned(),
        });
    }
    let written = written(config, layers)?;
    // Every kind is resolved once: the sizes are the same for all layers of a kind.
    let mut known: Vec<(Written, Kind)> = Vec::new();
    let mut kinds = Vec::with_capacity(layers);
    for word in written {
        let kind = if let Some((_, kind)) = known.iter().find(|(other, _)| *other == word) {
            kind.clone()
        } else {
            let kind = match word {
                Written::Full => Kind::Full,
                Written::Mlp => Kind::None,
                Written::Sliding => Kind::Window(config.required(
                    &["sliding_window", "sliding_window_size", "window_size", "attention_window_size"],
                    "the width of the sliding window",
                )?),
                Written::Chunked => Kind::Window(
                    config.required(&["attention_chunk_size"], "the width of an attention chunk")?,
                ),
                Written::Recurrent(name) => {
                    Kind::Recurrent { name, state_elements: state_elements(config, name)? }
                }
            };
            known.push((word, kind.clone()));
            kind
        };
        kinds.push(kind);
    }
    Ok(kinds)
}

/// The kinds as the configuration writes them, in whichever of its ways.
fn written(config: &Config<'_>, layers: usize) -> Result<Vec<Written>> {
    if let Some((_, name)) = PURE.iter().find(|entry| entry.0 == config.architecture()) {
        return Ok(vec![Written::Recurrent(name); layers]);
    }
    if let Some((key, words)) = config.texts(&["layer_types", "layers_block_type"])? {
        config.same_length(key, words.len(), layers)?;
        return words.iter().map(|word| by_word(config, key, word)).collect();
    }
    if let Some((key, words)) = config.texts(&["block_types", "_block_types"])? {
        // RecurrentGemma repeats a short pattern.
        if words.is_empty() {
            return Err(config.broken(format!("{key} is an empty list, wanted at least one kind of layer")));
        }
        // Its attention is local, which its word for it does not say.
        let local = config.get(&["attention_window_size"]).is_some();
        let one = |word: &&str| match by_word(config, key, word)? {
            Written::Full if local => Ok(Written::Sliding),
            other => Ok(other),
        };
        return words.iter().cycle().take(layers).map(one).collect();
    }
    if let Some(pattern) = config.get(&["hybrid_override_pattern"]).and_then(|found| found.1.as_str()) {
        config.same_length("hybrid_override_pattern", pattern.chars().count(), layers)?;
        return pattern.chars().map(|letter| by_letter(config, letter)).collect();
    }
    if let Some(indices) = config.numbers(&["attn_layer_indices"], MOST_LAYERS)? {
        return Ok((0..layers as u64)
            .map(|i| if indices.1.contains(&i) { Written::Full } else { Written::Recurrent("mamba") })
            .collect());
    }
    if let Some(period) = config.size(&["attn_layer_period"])? {
        let offset = config.number(&["attn_layer_offset"], LARGEST_DIMENSION)?.unwrap_or(0);
        let full = |i: u64| i % period == offset;
        return Ok((0..layers as u64)
            .map(|i| if full(i) { Written::Full } else { Written::Recurrent("mamba") })
            .collect());
    }
    if let Some(interval) = config.size(&["full_attention_interval"])? {
        let full = |i: u64| (i + 1).is_multiple_of(interval);
        return Ok((0..layers as u64)
            .map(|i| if full(i) { Written::Full } else { Written::Recurrent("linear_attention") })
            .collect());
    }
    if RECURRENT_UNLESS_SAID.contains(&config.architecture()) {
        return Ok(vec![Written::Recurrent("mamba"); layers]);
    }
    windows(config, layers)
}

/// Attention layers only, told apart by a window and a rule.
fn windows(config: &Config<'_>, layers: usize) -> Result<Vec<Written>> {
    let all = 0..layers as u64;
    let chosen = |sliding: bool, word: Written| if sliding { word } else { Written::Full };
    let interval = config.size(&["no_rope_layer_interval"])?;
    if config.size(&["attention_chunk_size"])?.is_some() {
        // Llama 4: layers with rotary embeddings see their chunk only. An empty list means the interval.
        let with_rope = match config.numbers(&["no_rope_layers"], 1)? {
            Some((key, list)) if !list.is_empty() => {
                config.same_length(key, list.len(), layers)?;
                list
            }
            _ => all.map(|i| u64::from((i + 1) % interval.unwrap_or(4) != 0)).collect(),
        };
        return Ok(with_rope.into_iter().map(|rope| chosen(rope == 1, Written::Chunked)).collect());
    }
    let window =
        config.number(&["sliding_window", "sliding_window_size"], LARGEST_DIMENSION)?.is_some_and(|w| w > 0);
    let used = config.flag(&["use_sliding_window"])?.unwrap_or(true);
    if !window || !used {
        return Ok(vec![Written::Full; layers]);
    }
    if let Some((_, pattern)) = config.get(&["sliding_window_pattern", "_sliding_window_pattern"])
        && let Some(pattern) = pattern.as_str()
    {
        // EXAONE 4 writes "LLLG": local layers and a global one, repeated.
        if pattern.is_empty() || !pattern.chars().all(|letter| matches!(letter, 'L' | 'G')) {
            return Err(config.broken(format!(
                "sliding_window_pattern is {pattern:?}, wanted a whole number or letters L and G"
            )));
        }
        return Ok(pattern
            .chars()
            .cycle()
            .take(layers)
            .map(|l| chosen(l == 'L', Written::Sliding))
            .collect());
    }
    if let Some(pattern) = config.size(&["sliding_window_pattern", "_sliding_window_pattern"])? {
        return Ok(all.map(|i| chosen((i + 1) % pattern != 0, Written::Sliding)).collect());
    }
    let bound = config.number(&["max_window_layers"], LARGEST_DIMENSION)?;
    if let Some(bound) = bound.filter(|_| !EVERY_LAYER.contains(&config.architecture())) {
        let every_second = EVERY_SECOND_BELOW.contains(&config.architecture());
        let sliding = |i: u64| if every_second { i < bound && i.is_multiple_of(2) } else { i >= bound };
        return Ok(all.map(|i| chosen(sliding(i), Written::Sliding)).collect());
    }
    if let Some(interval) = interval {
        // SmolLM3: the window is for layers without rotary embeddings.
        return Ok(all.map(|i| chosen((i + 1) % interval == 0, Written::Sliding)).collect());
    }
    let everywhere = EVERY_LAYER.contains(&config.architecture());
    Ok(vec![if everywhere { Written::Sliding } else { Written::Full }; layers])
}

fn by_word(config: &Config<'_>, key: &str, word: &str) -> Result<Written> {
    WORDS.iter().find(|entry| entry.0 == word).map(|entry| entry.1).ok_or_else(|| {
        let known = WORDS.iter().map(|entry| entry.0).collect::<Vec<_>>();
        let shown: String = word.chars().take(60).collect();
        config.broken(format!("{key} has the entry {shown:?}; known are {}", quoted(&known)))
    })
}

/// Nemotron-H writes a letter a layer.
fn by_letter(config: &Config<'_>, letter: char) -> Result<Written> {
    match letter {
        'M' => Ok(Written::Recurrent("mamba")),
        '*' => Ok(Written::Full),
        '-' | 'E' => Ok(Written::Mlp),
        other => Err(config.broken(format!(
            "hybrid_override_pattern has the letter {other:?}, wanted M (mamba), * (attention), - (MLP) or E (experts)"
        ))),
    }
}

/// Elements of the state that a recurrent layer keeps a sequence: the recurrence and its short convolution, as
/// transformers' cache classes hold them.
fn state_elements(config: &Config<'_>, name: &str) -> Result<u64> {
    let hidden = || config.required(&["hidden_size", "d_model"], "the hidden size");
    let elements = match name {
        "rwkv" => {
            // Two shifted inputs and numerator, denominator and maximum of the mean.
            let hidden = hidden()?;
            let attention = config.size(&["attention_hidden_size"])?.unwrap_or(hidden);
            sum(&[product(&[2, hidden]), product(&[3, attention])])
        }
        "short_convolution" => product(&[
            hidden()?,
            config.required(&["conv_L_cache", "conv_kernel"], "the length of the convolution")?,
        ]),
        "rg_lru" => {
            let width = config.size(&["lru_width"])?.map_or_else(hidden, Ok)?;
            sum(&[Some(width), product(&[width, config.size(&["conv1d_width"])?.unwrap_or(4)])])
        }
        "linear_attention" => linear_attention(config)?,
        _ => mamba(config, hidden()?)?,
    };
    elements.ok_or_else(|| {
        config.broken(format!(
            "the state of a {name} layer has more than 2^64 elements; correct its dimensions"
        ))
    })
}

fn linear_attention(config: &Config<'_>) -> Result<Option<u64>> {
    if let Some(value_heads) = config.size(&["linear_num_value_heads"])? {
        // Gated delta rule: a matrix a value head; the convolution runs over queries, keys and values.
        let key_heads = config.required(&["linear_num_key_heads"], "the number of linear key heads")?;
        let key_dim = config.required(&["linear_key_head_dim"], "the dimension of a linear key head")?;
        let value_dim =
            config.required(&["linear_value_head_dim"], "the dimension of a linear value head")?;
        let kernel = config.required(&["linear_conv_kernel_dim"], "the length of the convolution")?;
        let columns = sum(&[product(&[2, key_heads, key_dim]), product(&[value_heads, value_dim])]);
        let convolution = columns.and_then(|columns| columns.checked_mul(kernel));
        return Ok(sum(&[product(&[value_heads, key_dim, value_dim]), convolution]));
    }
    // Lightning attention (MiniMax): a square matrix a head.
    let heads = config.required(&["num_attention_heads"], "the number of heads")?;
    let head_dim = match config.size(&["head_dim"])? {
        Some(head_dim) => head_dim,
        None => config.required(&["hidden_size"], "the hidden size")? / heads,
    };
    Ok(product(&[heads, head_dim, head_dim]))
}

fn mamba(config: &Config<'_>, hidden: u64) -> Result<Option<u64>> {
    let state = config.required(&["state_size", "mamba_d_state", "ssm_state_size"], "the state size")?;
    let kernel = config.required(&["conv_kernel", "mamba_d_conv"], "the length of the convolution")?;
    let heads = config.size(&["mamba_n_heads", "mamba_num_heads", "num_heads"])?;
    // Bamba writes "auto" for the width divided by the heads.
    let automatic = config.get(&["mamba_d_head"]).is_some_and(|found| found.1.as_str() == Some("auto"));
    let head_dim_keys: &[_] =
        if config.architecture() == "mamba2" { &["head_dim"] } else { &["mamba_d_head", "mamba_head_dim"] };
    let head_dim = if automatic { None } else { config.size(head_dim_keys)? };
    let expand = config.size(&["expand", "mamba_expand"])?;
    let inner = match (heads, head_dim, expand) {
        (Some(heads), Some(head_dim), _) => product(&[heads, head_dim]),
        (_, _, Some(expand)) => product(&[expand, hidden]),
        _ => {
            return Err(config.missing(&["expand", "mamba_expand", "mamba_d_head"], "the width of the mixer"));
        }
    };
    // Mamba 2 convolves its input and output matrices as well, a group of heads sharing one.
    let groups = if heads.is_some() {
        let groups = config.size(&["n_groups", "mamba_n_groups"])?.unwrap_or(1);
        product(&[2, groups, state])
    } else {
        Some(0)
    };
    let convolved = sum(&[inner, groups]).and_then(|columns| columns.checked_mul(kernel));
    Ok(sum(&[inner.and_then(|inner| inner.checked_mul(state)), convolved]))
}

fn product(factors: &[u64]) -> Option<u64> {
    factors.iter().try_fold(1_u64, |all, factor| all.checked_mul(*factor))
}

fn sum(terms: &[Option<u64>]) -> Option<u64> {
    terms.iter().try_fold(0_u64, |all, term| all.checked_add((*term)?))
}
