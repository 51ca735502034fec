//! The shape that a module must have by the geometry of its layer, and what its parts follow.

use crate::model::roles::names::{Module, Name, Scope, Size};
use crate::model::{CutAlong, Dimensions, Layer, Mixer, Mlp, Role};

/// The side of a linear layer that a cut divides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// Outputs: column-parallel.
    Output,
    /// Inputs: row-parallel, ranks' results are summed.
    Input,
}

/// A run of elements along the cut side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// What the run follows.
    pub(crate) along: CutAlong,
    /// Its elements.
    pub(crate) elements: u64,
    /// Elements of one head for runs of heads, 1 otherwise.
    pub(crate) per_unit: u64,
    /// How many runs of the same length follow each other (2 for a gate and its up).
    pub(crate) copies: u64,
}

/// What a linear layer must look like for its cut to be known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    /// The role of its tensors.
    pub(crate) role: Role,
    /// The side that is cut.
    pub(crate) side: Side,
    /// The runs along that side.
    pub(crate) segments: Vec<Segment>,
    /// Length of the other side, where it is known.
    pub(crate) other: Option<u64>,
    /// Experts (or heads) stacked in front of both sides.
    pub(crate) stack: Option<u64>,
    /// Whether the runs alternate head by head, so that the borders between them fall inside every head's rows.
    pub(crate) interleaved: bool,
    /// The tensor that is kept whole by ranks with heads only, where a part of the module is not cut.
    pub(crate) whole: CutAlong,
}

impl Rule {
    /// Elements along the cut side.
    pub(crate) fn total(&self) -> Option<u64> {
        self.segments.iter().try_fold(0_u64, |sum, s| sum.checked_add(s.elements.checked_mul(s.copies)?))
    }

    /// `(outputs, inputs)` that the weight must have.
    pub(crate) fn size(&self) -> Size {
        match self.side {
            Side::Output => Size { outputs: self.total(), inputs: self.other },
            Side::Input => Size { outputs: self.other, inputs: self.total() },
        }
    }
}

/// What the name and the layer's geometry say about a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Cut by the first of these rules whose shape is the tensor's.
    Cut(Vec<Rule>),
    /// A vector for every head, or one that all heads share: the rules for either, by its length.
    HeadNorm {
        /// Elements of one head.
        one: u64,
        /// All heads.
        all: Segment,
    },
    /// Kept by ranks that hold heads.
    WithAttention,
    /// Kept by every rank, as one would expect.
    Whole,
    /// Kept by every rank although it could be large, and why.
    Held(String),
}

/// The verdict on a module of the language model. `size` is what the module's own tensors tell of its lengths.
pub(crate) fn verdict(name: &Name, size: Size, dimensions: &Dimensions) -> Verdict {
    let hidden = dimensions.hidden;
    match name.module {
        Module::Embedding | Module::Head => {
            let role = if name.module == Module::Head { Role::Head } else { Role::Embedding };
            let segment = run(CutAlong::Vocabulary, dimensions.vocabulary, 1);
            return Verdict::Cut(linear(role, Side::Output, [segment], hidden));
        }
        Module::Small | Module::FinalNorm => return Verdict::Whole,
        Module::Unknown => return Verdict::Held("no rule knows a tensor of this name".to_owned()),
        _ => {}
    }
    let Some(layer) = name.layer.and_then(|i| dimensions.layers.get(usize::try_from(i).ok()?)) else {
        return Verdict::Held("it belongs to no layer of the configuration".to_owned());
    };
    match name.module {
        Module::Gate | Module::Up | Module::GateUp | Module::Down => feed_forward(name, layer, hidden),
        _ => attention(name, size, layer, dimensions),
    }
}

fn run(along: CutAlong, elements: u64, per_unit: u64) -> Segment {
    Segment { along, elements, per_unit, copies: 1 }
}

fn linear<const N: usize>(role: Role, side: Side, segments: [Segment; N], other: u64) -> Vec<Rule> {
    let whole = match role {
        Role::AttentionIn | Role::AttentionOut => CutAlong::WholeWithAttention,
        _ => CutAlong::Whole,
    };
    let segments = segments.to_vec();
    vec![Rule { role, side, segments, other: Some(other), stack: None, interleaved: false, whole }]
}

fn attention(name: &Name, size: Size, layer: &Layer, dimensions: &Dimensions) -> Verdict {
    let hidden = dimensions.hidden;
    match &layer.mixer {
        Mixer::Attention { query_heads, kv_heads, key_dim, value_dim, .. } => {
            let heads = |along, heads: u64, dim: u64| run(along, heads.saturating_mul(dim), dim);
            let query = heads(CutAlong::QueryHeads, *query_heads, *key_dim);
            let key = heads(CutAlong::KvHeads, *kv_heads, *key_dim);
            let value = heads(CutAlong::KvHeads, *kv_heads, *value_dim);
            let input = |segment| linear(Role::AttentionIn, Side::Output, [segment], hidden);
            let gated = heads(CutAlong::QueryHeads, *query_heads, key_dim.saturating_mul(2));
            match name.module {
                // Qwen3-Next computes a gate of the attention's output together with the query.
                Module::Query => Verdict::Cut([input(query), input(gated)].concat()),
                Module::Key => Verdict::Cut(input(key)),
                Module::Value => Verdict::Cut(input(value)),
                Module::Qkv { interleaved } => {
                    let mut rules = linear(Role::AttentionIn, Side::Output, [query, key, value], hidden);
                    rules.extend(linear(Role::AttentionIn, Side::Output, [gated, key, value], hidden));
                    for rule in &mut rules {
                        rule.interleaved = interleaved;
                    }
                    Verdict::Cut(rules)
                }
                Module::Output => {
                    let segment = heads(CutAlong::QueryHeads, *query_heads, *value_dim);
                    Verdict::Cut(linear(Role::AttentionOut, Side::Input, [segment], hidden))
                }
                Module::QueryNorm => Verdict::HeadNorm { one: *key_dim, all: query },
                Module::KeyNorm => Verdict::HeadNorm { one: *key_dim, all: key },
                Module::Sinks => {
                    let mut rules = input(run(CutAlong::QueryHeads, *query_heads, 1));
                    for rule in &mut rules {
                        rule.other = None;
                    }
                    Verdict::Cut(rules)
                }
                _ => Verdict::Held("the layer has no latent attention by its configuration".to_owned()),
            }
        }
        Mixer::Latent { query_heads, .. } => latent(name, size, *query_heads, hidden),
        Mixer::Recurrent { name, .. } => Verdict::Held(recurrent_reason(name)),
        Mixer::None => Verdict::Held("the layer has no attention by its configuration".to_owned()),
    }
}

/// Why a recurrent mixer is held whole.
pub(crate) fn recurrent_reason(mixer: &str) -> String {
    format!("{mixer}: its state is not made of attention heads, every rank computes it whole")
}

/// Multi-head latent attention. How many elements a head has is not in [`Mixer::Latent`]: it follows from the tensor.
fn latent(name: &Name, size: Size, heads: u64, hidden: u64) -> Verdict {
    let of_heads = |length: Option<u64>| match length {
        Some(n) if heads > 0 && n > 0 && n % heads == 0 => Ok(run(CutAlong::QueryHeads, n, n / heads)),
        got => Err(Verdict::Held(format!(
            "its {} elements are no multiple of the {heads} heads",
            got.map_or_else(|| "unknown number of".to_owned(), |n| n.to_string())
        ))),
    };
    let rules = match name.module {
        Module::LatentDown | Module::QueryNorm | Module::KeyNorm => return Verdict::WithAttention,
        Module::Query | Module::LatentUp => of_heads(size.outputs).map(|segment| {
            let mut rules = linear(Role::AttentionIn, Side::Output, [segment], hidden);
            for rule in rules.iter_mut().filter(|_| name.module == Module::LatentUp) {
                rule.other = None;
            }
            rules
        }),
        Module::LatentUpStack => {
            Ok(linear(Role::AttentionIn, Side::Output, [run(CutAlong::QueryHeads, heads, 1)], 0)
                .into_iter()
                .map(|rule| Rule { other: None, ..rule })
                .collect())
        }
        Module::Output => {
            of_heads(size.inputs).map(|segment| linear(Role::AttentionOut, Side::Input, [segment], hidden))
        }
        _ => Err(Verdict::Held("latent attention has no such projection".to_owned())),
    };
    rules.map_or_else(|held| held, Verdict::Cut)
}

fn feed_forward(name: &Name, layer: &Layer, hidden: u64) -> Verdict {
    let experts = |count, width| (CutAlong::Experts { count, width }, width, true);
    let dense = |width| (CutAlong::Intermediate { width }, width, false);
    let (along, width, routed) = match (&layer.mlp, name.scope) {
        (Mlp::Dense { width }, Scope::Layer) => dense(*width),
        (Mlp::Experts { count, width, .. }, Scope::Expert(_) | Scope::Stacked) => experts(*count, *width),
        (Mlp::Experts { shared_width, .. }, Scope::Shared | Scope::Layer) if *shared_width > 0 => {
            dense(*shared_width)
        }
        (mlp, _) => {
            let has = match mlp {
                Mlp::Dense { width } => format!("one MLP of {width} columns"),
                Mlp::Experts { count, width, .. } => {
                    format!("{count} routed experts of {width} columns and no shared expert")
                }
                Mlp::None => "no MLP".to_owned(),
            };
            return Verdict::Held(format!("the layer has {has} by its configuration"));
        }
    };
    let input = if routed { Role::ExpertIn } else { Role::MlpIn };
    let once = run(along, width, 1);
    let twice = Segment { copies: 2, ..once };
    let mut rules = match name.module {
        Module::Gate => linear(input, Side::Output, [once], hidden),
        // ChatGLM's dense_h_to_4h and the ffn_up of GGUF's Phi-3 hold the gate as well.
        Module::Up => {
            [linear(input, Side::Output, [once], hidden), linear(input, Side::Output, [twice], hidden)]
                .concat()
        }
        Module::GateUp => linear(input, Side::Output, [twice], hidden),
        _ => {
            let role = if routed { Role::ExpertOut } else { Role::MlpOut };
            linear(role, Side::Input, [once], hidden)
        }
    };
    if let (Scope::Stacked, CutAlong::Experts { count, .. }) = (name.scope, along) {
        for rule in &mut rules {
            rule.stack = Some(count);
        }
    }
    Verdict::Cut(rules)
}
