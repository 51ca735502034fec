//! The exact bytes of a rank, item by item.

use std::collections::BTreeMap;

use super::activations::communicator_bytes;
use super::workload::{Basis, Holdings, Workload};
use super::{Item, RankBudget, RankPlan};

/// `bytes × count / total`, rounded up to a whole byte.
pub(crate) fn portion(bytes: u64, count: u64, total: u64) -> u64 {
    if total == 0 || count == 0 {
        return 0;
    }
    let exact = (u128::from(bytes) * u128::from(count)).div_ceil(u128::from(total));
    u64::try_from(exact).unwrap_or(u64::MAX)
}

/// Buffers in host memory for gathered tensors: one is read while the next is written.
const BUFFERS: u64 = 2;

/// Bytes of pinned host memory of a run over `ranks` ranks whose buffers are of `buffer_bytes` each.
pub(crate) fn pinned(buffer_bytes: u64, ranks: u64) -> u64 {
    buffer_bytes.saturating_mul(BUFFERS).saturating_add(ranks.saturating_mul(communicator_bytes(ranks)))
}

/// What a rank with these holdings takes, item by item, and what a decode step reads of it.
///
/// A rank that holds nothing takes nothing: no context is made on its device.
#[must_use]
pub fn account(workload: &Workload, holdings: &Holdings, rank: usize, budget: &RankBudget) -> RankPlan {
    let mut items: BTreeMap<Item, u64> = BTreeMap::new();
    let mut read = 0;
    let mut add = |item: Item, bytes: u64| {
        if bytes > 0 {
            *items.entry(item).or_default() += bytes;
        }
    };
    for cost in &workload.costs {
        let (count, total) = (holdings.count(cost.basis), workload.total(cost.basis));
        add(cost.item, portion(cost.bytes, count, total));
        read += portion(cost.read, count, total);
    }
    if !holdings.is_empty() {
        add(Item::Activations, activations(workload, holdings));
        for (item, bytes) in budget.beside(workload) {
            add(item, bytes);
        }
    }
    let total = items.values().sum();
    RankPlan {
        rank,
        device: budget.device.clone(),
        budget: budget.bytes(),
        speed: budget.speed.unwrap_or(1.0),
        items,
        total,
        read_per_token: read,
    }
}

/// Bytes that a decode step reads on one rank: of attention, of the MLP, of the head. What every rank reads whole
/// (norms, routers) is left out, since no split changes it.
pub(crate) fn phase_reads(workload: &Workload, holdings: &Holdings) -> [f64; 3] {
    let mut reads = [0.0; 3];
    for cost in &workload.costs {
        let phase = match cost.basis {
            Basis::Rank => continue,
            Basis::AttentionRank | Basis::QueryHeads | Basis::KvHeads => 0,
            Basis::Intermediate | Basis::Width(_) | Basis::Experts => 1,
            Basis::Vocabulary => 2,
        };
        reads[phase] += portion(cost.read, holdings.count(cost.basis), workload.total(cost.basis)) as f64;
    }
    reads
}

/// The largest set of intermediate results: what is always alive, and the largest of the attention phase, the MLP
/// phase and what is between them, which are never alive together.
fn activations(workload: &Workload, holdings: &Holdings) -> u64 {
    let mlp_basis = if workload.experts.is_some() { Basis::Experts } else { Basis::Intermediate };
    let phase = |bytes: u64, basis: Basis| portion(bytes, holdings.count(basis), workload.total(basis));
    let alone = phase(workload.activation_attention_alone, Basis::AttentionRank);
    workload.activation_base
        + (phase(workload.activation_attention, Basis::QueryHeads) + alone)
            .max(phase(workload.activation_mlp, mlp_basis))
            .max(workload.activation_floor)
}
