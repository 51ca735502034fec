//! From a [`ModelShape`] to the [`Workload`] that splits are planned by.

use std::collections::BTreeMap;

use super::{CutAlong, Dimensions, Mixer, Mlp, ModelShape, Role, Tensor, activations};
use crate::error::{Error, Result};
use crate::split::activations::{PROMPT_STEPS, communicator_bytes};
use crate::split::pinned;
use crate::split::workload::{Axis, Basis, Block, Blocks, Cost, Workload, gcd, lcm};
use crate::split::{ExpertSplit, Item, Options, PlannedModel};

/// Columns and rows that the solver cuts at, where the format does not ask for more: whole tiles of a matrix product.
const PREFERRED_STEP: u64 = 32;
/// Bytes of an element of a recurrent state: kept in float32 whatever the model's dtype.
const STATE_BYTES: u64 = 4;

/// A model's costs, the parts that do not change with context and chunk summed once.
pub(crate) struct Costs<'a> {
    shape: &'a ModelShape,
    dimensions: &'a Dimensions,
    options: &'a Options,
    ranks: u64,
    /// Whether ranks are on CUDA devices, whose activations were measured.
    on_devices: bool,
    /// Axes and weights; cache and activations are filled in for each context.
    weights: Workload,
}

impl<'a> Costs<'a> {
    /// The costs of `shape` over `ranks` ranks, on CUDA devices or on host memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where whole experts are asked of a model that has none, or different numbers of
    /// them in different layers.
    pub(crate) fn new(
        shape: &'a ModelShape,
        options: &'a Options,
        ranks: usize,
        on_devices: bool,
    ) -> Result<Self> {
        let dimensions = &shape.dimensions;
        let experts = whole_experts(dimensions, options)?;
        let grids = Grids::of(&shape.tensors, experts.is_some());
        let axis = |total: u64, grid: u64| Axis::new(total, grid, PREFERRED_STEP);
        let width_axis = |width: u64| axis(width, grids.widths.get(&width).copied().unwrap_or(1));
        let others = grids.widths.keys().copied().filter(|width| *width != dimensions.intermediate);
        let (kv_heads, query_head_step) = head_axis(dimensions, &grids);
        let mut weights = Workload {
            kv_heads,
            query_heads_per_kv_head: dimensions
                .query_heads
                .checked_div(dimensions.kv_heads)
                .unwrap_or(1)
                .max(1),
            query_head_step,
            hidden: axis(dimensions.hidden, 1),
            intermediate: width_axis(dimensions.intermediate),
            widths: others.map(width_axis).collect(),
            vocabulary: axis(dimensions.vocabulary, grids.vocabulary),
            blocks: blocks(&shape.tensors, dimensions.intermediate),
            experts,
            costs: Vec::new(),
            activation_base: 0,
            activation_attention: 0,
            activation_attention_alone: 0,
            activation_mlp: 0,
            communicator_bytes: 0,
            activation_floor: 0,
            buffer_bytes: 0,
            pinned_bytes: 0,
        };
        weights.costs = weight_costs(shape, &weights);
        Ok(Self { shape, dimensions, options, ranks: ranks as u64, on_devices, weights })
    }

    /// The workload at `context` tokens a sequence, prefilled in chunks of `chunk` tokens.
    pub(crate) fn at(&self, context: u64, chunk: u64) -> Workload {
        let chunk = self.at_once(context, chunk);
        let mut workload = self.weights.clone();
        self.add_cache(&mut workload, context);
        if self.on_devices {
            activations::on_devices(&mut workload, self.shape, self.options, context, chunk);
        } else {
            activations::on_host(&mut workload, self.dimensions, context, chunk);
        }
        self.add_buffers(&mut workload, chunk);
        workload
    }

    /// Tokens of a chunk, over all sequences: no more than there are, on devices with those that fill up a recorded step.
    fn at_once(&self, context: u64, chunk: u64) -> u64 {
        let own = if self.on_devices {
            PROMPT_STEPS.into_iter().find(|step| *step >= context).unwrap_or(context)
        } else {
            context
        };
        chunk.min(own.saturating_mul(self.options.batch))
    }

    fn add_cache(&self, workload: &mut Workload, context: u64) {
        let (mut per_head, mut whole, mut states) = (0_u64, 0_u64, 0_u64);
        for layer in &self.dimensions.layers {
            match &layer.mixer {
                Mixer::Attention { kv_heads, key_dim, value_dim, window, .. } => {
                    let tokens = context.min(window.unwrap_or(u64::MAX)).saturating_mul(self.options.batch);
                    per_head =
                        per_head.saturating_add((kv_heads * (key_dim + value_dim)).saturating_mul(tokens));
                }
                Mixer::Latent { latent_dim, rope_dim, .. } => {
                    let tokens = context.saturating_mul(self.options.batch);
                    whole = whole.saturating_add((latent_dim + rope_dim).saturating_mul(tokens));
                }
                Mixer::Recurrent { state_elements, .. } => {
                    states = states.saturating_add(state_elements.saturating_mul(self.options.batch));
                }
                Mixer::None => {}
            }
        }
        let cache = self.options.cache;
        let mut add = |basis: Basis, bytes: u64| {
            if bytes > 0 {
                workload.costs.push(Cost { item: Item::KvCache, basis, bytes, read: bytes });
            }
        };
        add(Basis::KvHeads, cache.bytes(per_head));
        add(Basis::AttentionRank, cache.bytes(whole));
        add(Basis::Rank, states.saturating_mul(STATE_BYTES));
    }

    fn add_buffers(&self, workload: &mut Workload, chunk: u64) {
        let dimensions = self.dimensions;
        let logits = self.options.batch.saturating_mul(dimensions.vocabulary);
        let mut add = |item: Item, basis: Basis, bytes: u64| {
            if bytes > 0 {
                workload.costs.push(Cost { item, basis, bytes, read: 0 });
            }
        };
        add(Item::Logits, Basis::Vocabulary, logits.saturating_mul(dimensions.element_bytes));
        // Gathered for sampling, in float32.
        add(Item::Logits, Basis::Rank, logits.saturating_mul(4));
        if self.ranks > 1 {
            let residual = chunk.saturating_mul(dimensions.hidden).saturating_mul(dimensions.element_bytes);
            add(Item::Communicator, Basis::Rank, residual);
            workload.communicator_bytes = communicator_bytes(self.ranks);
        }
        workload.buffer_bytes = self.gathered(chunk);
        workload.pinned_bytes = pinned(workload.buffer_bytes, self.ranks);
    }

    /// Bytes of the largest tensor that is gathered in host memory: a chunk of the residual stream or of attention's
    /// output, or the logits to sample from, in float32.
    fn gathered(&self, chunk: u64) -> u64 {
        let dimensions = self.dimensions;
        let attention = dimensions.layers.iter().map(|layer| match layer.mixer {
            Mixer::Attention { query_heads, key_dim, value_dim, .. } => query_heads * key_dim.max(value_dim),
            Mixer::Latent { query_heads, .. } => query_heads * dimensions.head_dim,
            Mixer::Recurrent { .. } | Mixer::None => 0,
        });
        let columns = attention.fold(dimensions.hidden, u64::max);
        let rows = chunk.saturating_mul(columns).saturating_mul(dimensions.element_bytes);
        // The reference's split of the vocabulary ends at a multiple of 32.
        let vocabulary = dimensions.vocabulary.next_multiple_of(32);
        rows.max(self.options.batch.saturating_mul(vocabulary).saturating_mul(4))
    }
}

impl ModelShape {
    /// The model's numbers as a plan repeats them.
    pub(crate) fn planned(&self) -> PlannedModel {
        let dimensions = &self.dimensions;
        PlannedModel {
            name: self.name.clone(),
            architecture: dimensions.architecture.clone(),
            layers: dimensions.layers.len() as u64,
            query_heads: dimensions.query_heads,
            kv_heads: dimensions.kv_heads,
            head_dim: dimensions.head_dim,
            hidden: dimensions.hidden,
            intermediate: dimensions.intermediate,
            vocabulary: dimensions.vocabulary,
            weight_bytes: self.tensors.iter().map(|tensor| tensor.bytes).sum(),
            rotary: dimensions.rotary.clone(),
        }
    }

    /// Bytes of the attention weights of each attention layer: their mean, since checkpoints' layers are alike.
    pub(crate) fn attention_footprints(&self) -> Vec<u64> {
        let layers = self.dimensions.layers.iter();
        let layers =
            layers.filter(|l| matches!(l.mixer, Mixer::Attention { .. } | Mixer::Latent { .. })).count();
        let attention = |tensor: &&Tensor| matches!(tensor.role, Role::AttentionIn | Role::AttentionOut);
        let bytes: u64 = self.tensors.iter().filter(attention).map(|tensor| tensor.bytes).sum();
        vec![bytes.checked_div(layers as u64).unwrap_or(0); layers]
    }

    /// What cannot be split, as notes of a plan.
    pub(crate) fn notes(&self) -> Vec<String> {
        let note = |part: &super::Unsplittable| {
            let mib = part.bytes as f64 / 1_048_576.0;
            format!("{} cannot be split: {} ({mib:.1} MiB on every rank)", part.what, part.reason)
        };
        self.unsplittable.iter().map(note).collect()
    }
}

fn whole_experts(dimensions: &Dimensions, options: &Options) -> Result<Option<u64>> {
    if options.experts == ExpertSplit::Inside {
        return Ok(None);
    }
    let mut counts: Vec<u64> =
        dimensions.layers.iter().filter_map(|layer| expert_count(&layer.mlp)).collect();
    counts.dedup();
    match counts.as_slice() {
        [count] => Ok(Some(*count)),
        [] => Err(Error::invalid(
            "experts",
            format!("\"whole\" for {}, which has no routed experts", dimensions.architecture),
            "experts=\"inside\"",
        )),
        several => Err(Error::invalid(
            "experts",
            format!("\"whole\" for a model whose layers have {several:?} experts"),
            "experts=\"inside\", or a model with as many experts in every layer",
        )),
    }
}

fn expert_count(mlp: &Mlp) -> Option<u64> {
    match mlp {
        Mlp::Experts { count, .. } => Some(*count),
        Mlp::Dense { .. } | Mlp::None => None,
    }
}

/// Where the format allows cuts, over all tensors.
#[derive(Default)]
struct Grids {
    query_heads: u64,
    kv_heads: u64,
    vocabulary: u64,
    /// By width, of every MLP that is cut inside.
    widths: BTreeMap<u64, u64>,
}

impl Grids {
    fn of(tensors: &[Tensor], whole_experts: bool) -> Self {
        let mut grids = Self { query_heads: 1, kv_heads: 1, vocabulary: 1, widths: BTreeMap::new() };
        for part in tensors.iter().flat_map(|tensor| &tensor.parts) {
            let grid = match part.along {
                CutAlong::QueryHeads => &mut grids.query_heads,
                CutAlong::KvHeads => &mut grids.kv_heads,
                CutAlong::Vocabulary => &mut grids.vocabulary,
                CutAlong::Intermediate { width } => grids.widths.entry(width).or_insert(1),
                CutAlong::Experts { width, .. } if !whole_experts => grids.widths.entry(width).or_insert(1),
                CutAlong::Experts { .. } | CutAlong::WholeWithAttention | CutAlong::Whole => continue,
            };
            *grid = lcm(*grid, part.grid);
        }
        grids
    }
}

/// The first of the tensors with the largest blocks along each dimension.
fn blocks(tensors: &[Tensor], intermediate: u64) -> Blocks {
    let mut blocks = Blocks::default();
    for tensor in tensors {
        for part in &tensor.parts {
            let largest = match part.along {
                CutAlong::QueryHeads | CutAlong::KvHeads => &mut blocks.heads,
                CutAlong::Intermediate { width } | CutAlong::Experts { width, .. }
                    if width == intermediate =>
                {
                    &mut blocks.intermediate
                }
                CutAlong::Vocabulary => &mut blocks.vocabulary,
                _ => continue,
            };
            if part.grid > largest.as_ref().map_or(1, |block| block.elements) {
                *largest = Some(Block { tensor: tensor.name.clone(), elements: part.grid });
            }
        }
    }
    blocks
}

/// The KV heads' axis, and the query heads that sharers of one KV head may take.
///
/// Heads go to a rank in groups that exist in every layer (layers may have different numbers of them) and whose
/// elements fall on the format's grid in every projection.
fn head_axis(dimensions: &Dimensions, grids: &Grids) -> (Axis, u64) {
    let total = dimensions.kv_heads;
    if total == 0 {
        return (Axis { total: 0, grid: 1, step: 1 }, 1);
    }
    // (query heads, KV heads, elements of heads that a cut runs through)
    let layers: Vec<(u64, u64, [u64; 2])> = dimensions
        .layers
        .iter()
        .filter_map(|layer| match layer.mixer {
            Mixer::Attention { query_heads, kv_heads, key_dim, value_dim, .. } => {
                Some((query_heads, kv_heads, [key_dim, value_dim]))
            }
            Mixer::Latent { query_heads, .. } => Some((query_heads, query_heads, [dimensions.head_dim; 2])),
            Mixer::Recurrent { .. } | Mixer::None => None,
        })
        .collect();
    let common = layers.iter().fold(total, |common, (_, kv_heads, _)| gcd(common, *kv_heads));
    let on_grid =
        |heads: u64, dims: &[u64; 2], grid: u64| dims.iter().all(|dim| (heads * dim).is_multiple_of(grid));
    let groups = (1..=common).rev().find(|groups| {
        common.is_multiple_of(*groups)
            && layers.iter().all(|(query_heads, kv_heads, dims)| {
                on_grid(query_heads / groups, dims, grids.query_heads)
                    && on_grid(kv_heads / groups, dims, grids.kv_heads)
            })
    });
    // Where no grouping falls on the grid, all heads stay together on one rank.
    let axis = Axis::new(total, total / groups.unwrap_or(1), 1);
    let group = (dimensions.query_heads / total).max(1);
    let uniform = layers.iter().all(|(query_heads, kv_heads, _)| *query_heads == kv_heads * group);
    let step = (1..=group).find(|step| {
        uniform
            && group.is_multiple_of(*step)
            && layers.iter().all(|(_, _, dims)| on_grid(*step, dims, grids.query_heads))
    });
    (axis, step.unwrap_or(group))
}

/// Bytes of the weights, summed by what they are reported as and what they follow.
fn weight_costs(shape: &ModelShape, axes: &Workload) -> Vec<Cost> {
    let has_head = shape.tensors.iter().any(|tensor| tensor.role == Role::Head);
    let active = |count: u64| {
        let experts = shape.dimensions.layers.iter().filter_map(|layer| match layer.mlp {
            Mlp::Experts { count: of, active, .. } if of == count => Some(active),
            _ => None,
        });
        experts.max().unwrap_or(count)
    };
    let width_basis = |width: u64| {
        if width == axes.intermediate.total {
            return Basis::Intermediate;
        }
        let index = axes.widths.iter().position(|axis| axis.total == width);
        index.map_or(Basis::Rank, Basis::Width)
    };
    let mut sums: BTreeMap<(Item, Basis), (u64, u64)> = BTreeMap::new();
    for tensor in &shape.tensors {
        let item = match tensor.role {
            Role::AttentionIn | Role::AttentionOut => Item::Attention,
            Role::MlpIn | Role::MlpOut => Item::Mlp,
            Role::ExpertIn | Role::ExpertOut => Item::Experts,
            Role::Embedding => Item::Embedding,
            Role::Head => Item::Head,
            Role::Replicated => Item::Replicated,
        };
        for part in &tensor.parts {
            let (basis, read) = match part.along {
                CutAlong::QueryHeads => (Basis::QueryHeads, part.bytes),
                CutAlong::KvHeads => (Basis::KvHeads, part.bytes),
                CutAlong::Intermediate { width } => (width_basis(width), part.bytes),
                CutAlong::Experts { count, width } => {
                    let basis = if axes.experts.is_some() { Basis::Experts } else { width_basis(width) };
                    // A token reads its own experts only.
                    let read = u128::from(part.bytes) * u128::from(active(count)) / u128::from(count.max(1));
                    (basis, u64::try_from(read).unwrap_or(part.bytes))
                }
                // One row of an embedding is looked up; as the head of a tied model all of it is read.
                CutAlong::Vocabulary if tensor.role == Role::Embedding && has_head => (Basis::Vocabulary, 0),
                CutAlong::Vocabulary => (Basis::Vocabulary, part.bytes),
                CutAlong::WholeWithAttention => (Basis::AttentionRank, part.bytes),
                CutAlong::Whole => (Basis::Rank, part.bytes),
            };
            let sum = sums.entry((item, basis)).or_default();
            sum.0 = sum.0.saturating_add(part.bytes);
            sum.1 = sum.1.saturating_add(read);
        }
    }
    sums.into_iter().map(|((item, basis), (bytes, read))| Cost { item, basis, bytes, read }).collect()
}
