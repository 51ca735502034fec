//! Whether every layer has what its kind of layer needs, so that a checkpoint with a lost file is noticed.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::discriminant;

use super::Checkpoint;
use crate::error::Result;
use crate::model::roles::names::{Leaf, Module, Name, Scope};
use crate::model::{Layer, Mixer, Mlp, RawTensor};

/// What a layer has, under whatever name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Need {
    Query,
    Key,
    Value,
    Output,
    MlpIn,
    MlpOut,
    ExpertIn,
    ExpertOut,
}

/// The layers that have a module of one name.
struct Found<'a> {
    need: Option<Need>,
    is_attention: bool,
    layers: BTreeSet<u64>,
    example: &'a RawTensor,
    example_layer: u64,
}

/// Compares layers of a kind with each other, and both sides of every block.
pub(super) fn layers(checkpoint: &Checkpoint<'_>) -> Result<()> {
    let mut modules: BTreeMap<&str, Found<'_>> = BTreeMap::new();
    let mut has: BTreeSet<(u64, Need)> = BTreeSet::new();
    let mut experts: BTreeMap<(u64, &str), u64> = BTreeMap::new();
    let mut present = BTreeSet::new();
    for (name, tensor) in checkpoint.text() {
        let Some(layer) = name.layer else { continue };
        present.insert(layer);
        if name.leaf == Leaf::Bias || name.recurrent || is_optional(name.module) {
            continue;
        }
        let need = need(name);
        has.extend(need.map(|need| (layer, need)));
        let found = modules.entry(&name.pattern).or_insert_with(|| Found {
            need,
            is_attention: !matches!(name.module, Module::Gate | Module::Up | Module::GateUp | Module::Down),
            layers: BTreeSet::new(),
            example: tensor,
            example_layer: layer,
        });
        found.layers.insert(layer);
        let main = matches!(name.leaf, Leaf::Weight | Leaf::PackedWeight | Leaf::ExlWeight);
        if main && matches!(name.scope, Scope::Expert(_)) {
            *experts.entry((layer, &name.pattern)).or_default() += 1;
        }
    }
    let all = &checkpoint.dimensions.layers;
    for (layer, index) in all.iter().zip(0_u64..) {
        if !present.contains(&index) {
            let wanted = format!("num_hidden_layers {}", all.len());
            return Err(checkpoint.missing(&format!("any tensor of layer {index}"), &wanted));
        }
        let wanted = format!("the configuration of layer {index}");
        let has = |need| has.contains(&(index, need));
        for found in modules.values().filter(|found| !found.layers.contains(&index)) {
            // Layers that share the keys and values of another have neither of the two, and in some models the keys
            // of all layers of a kind are the values as well.
            let excused = match found.need {
                Some(Need::Key) => !has(Need::Value),
                Some(Need::Value) => !has(Need::Key),
                _ => false,
            };
            let alike = |other: &Layer| {
                if found.is_attention {
                    let has_heads = matches!(layer.mixer, Mixer::Attention { .. } | Mixer::Latent { .. });
                    has_heads && discriminant(&other.mixer) == discriminant(&layer.mixer)
                } else {
                    discriminant(&other.mlp) == discriminant(&layer.mlp)
                }
            };
            let of_kind = |at: &u64| usize::try_from(*at).ok().and_then(|at| all.get(at)).is_some_and(alike);
            if !excused && found.layers.iter().any(of_kind) {
                let lost = renumber(&found.example.name, found.example_layer, index);
                return Err(checkpoint.missing(&lost, &wanted));
            }
        }
        for &(need, other) in needs(layer).iter().filter(|(need, other)| !has(*need) && has(*other)) {
            // Without a layer of the same kind nothing tells whether the keys are the values as well.
            if (need, other) != (Need::Value, Need::Key) {
                let lost = format!("{} of layer {index}", describe(need));
                return Err(checkpoint.missing(&lost, &wanted));
            }
        }
        let Mlp::Experts { count, .. } = layer.mlp else { continue };
        if let Some(((_, pattern), _)) =
            experts.range((index, "")..(index + 1, "")).find(|(_, found)| **found < count)
        {
            let lost = missing_expert(checkpoint, index, pattern, count);
            return Err(checkpoint.missing(&lost, &format!("{count} routed experts in layer {index}")));
        }
    }
    Ok(())
}

/// Modules that layers of one kind may or may not have.
fn is_optional(module: Module) -> bool {
    matches!(
        module,
        Module::Small
            | Module::Unknown
            | Module::Sinks
            | Module::QueryNorm
            | Module::KeyNorm
            | Module::FinalNorm
    )
}

fn missing_expert(checkpoint: &Checkpoint<'_>, layer: u64, pattern: &str, count: u64) -> String {
    let present: BTreeSet<u64> = checkpoint
        .text()
        .filter(|(name, _)| name.layer == Some(layer) && name.pattern == pattern)
        .filter_map(|(name, _)| if let Scope::Expert(index) = name.scope { Some(index) } else { None })
        .collect();
    let lost = (0..count).find(|index| !present.contains(index)).unwrap_or(count);
    pattern.replacen('*', &layer.to_string(), 1).replacen('*', &lost.to_string(), 1)
}

fn need(name: &Name) -> Option<Need> {
    let routed = matches!(name.scope, Scope::Expert(_) | Scope::Stacked);
    Some(match name.module {
        Module::Query | Module::Qkv { .. } => Need::Query,
        Module::LatentUp if name.pattern.contains("q_b") => Need::Query,
        Module::Key => Need::Key,
        Module::Value => Need::Value,
        Module::Output => Need::Output,
        Module::Gate | Module::Up | Module::GateUp if routed => Need::ExpertIn,
        Module::Down if routed => Need::ExpertOut,
        Module::Gate | Module::Up | Module::GateUp if name.scope == Scope::Layer => Need::MlpIn,
        Module::Down if name.scope == Scope::Layer => Need::MlpOut,
        _ => return None,
    })
}

/// What a layer needs, each with the other side of the same block. A layer with neither side has names that no rule
/// knows, which is no loss.
fn needs(layer: &Layer) -> Vec<(Need, Need)> {
    let mut needs = Vec::new();
    if matches!(layer.mixer, Mixer::Attention { .. } | Mixer::Latent { .. }) {
        needs.extend([(Need::Query, Need::Output), (Need::Output, Need::Query)]);
    }
    if matches!(layer.mixer, Mixer::Attention { .. }) {
        needs.extend([(Need::Key, Need::Value), (Need::Value, Need::Key)]);
    }
    match layer.mlp {
        Mlp::Dense { .. } => needs.extend([(Need::MlpIn, Need::MlpOut), (Need::MlpOut, Need::MlpIn)]),
        Mlp::Experts { .. } => {
            needs.extend([(Need::ExpertIn, Need::ExpertOut), (Need::ExpertOut, Need::ExpertIn)]);
        }
        Mlp::None => {}
    }
    needs
}

fn describe(need: Need) -> &'static str {
    match need {
        Need::Query => "a query projection (q_proj, qkv_proj or the like)",
        Need::Key => "a key projection (k_proj or the like)",
        Need::Value => "a value projection (v_proj or the like)",
        Need::Output => "an output projection (o_proj, dense or the like)",
        Need::MlpIn => "the MLP's first projection (gate_proj, up_proj, fc1 or the like)",
        Need::MlpOut => "the MLP's second projection (down_proj, fc2 or the like)",
        Need::ExpertIn => "the experts' first projection (gate_up_proj or the like)",
        Need::ExpertOut => "the experts' second projection (down_proj or the like)",
    }
}

/// The same tensor's name in another layer.
fn renumber(name: &str, from: u64, to: u64) -> String {
    let from = from.to_string();
    let mut done = false;
    let renamed = name.split('.').map(|segment| {
        if !done && segment == from {
            done = true;
            to.to_string()
        } else {
            segment.to_owned()
        }
    });
    renamed.collect::<Vec<_>>().join(".")
}
