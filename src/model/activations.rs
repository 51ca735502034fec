//! What is alive at once while a chunk of a prompt is computed; the formulas are in [`crate::split::activations`].

use super::{Dimensions, Layer, Mixer, Mlp, ModelShape, Role, Source};
use crate::split::Options;
use crate::split::activations::{
    ATTENTION_COPIES, EXPERT_COPIES, FLOAT_BYTES, FRAGMENTS, FUSED_MLP_COPIES, KEY_COPIES, MASK_COPIES,
    MLP_COPIES, QUERY_COPIES, RESIDUAL_COPIES, ROTARY_COPIES, ROTATED_COPIES, SCORE_COPIES, STREAM_COPIES,
    WEIGHTED_ROWS, WEIGHTS_LIKE_ROWS,
};
use crate::split::workload::Workload;

/// A context and a chunk, in tokens, and what the model's numbers are multiplied with.
#[derive(Clone, Copy)]
struct Chunk {
    /// Tokens of one sequence that are computed at once.
    own: u64,
    /// Of all sequences.
    rows: u64,
    /// Tokens of one sequence, those of the chunk the last of them.
    context: u64,
    batch: u64,
    element: u64,
}

/// Fills in the activations of a run on CUDA devices, through transformers' modules.
pub(super) fn on_devices(
    workload: &mut Workload,
    shape: &ModelShape,
    options: &Options,
    context: u64,
    chunk: u64,
) {
    let dimensions = &shape.dimensions;
    let batch = options.batch.max(1);
    let own = (chunk / batch).max(1);
    let chunk =
        Chunk { own, rows: own.saturating_mul(batch), context, batch, element: dimensions.element_bytes };
    let fused = shape.source == Source::Config || has_fused_mlps(shape);
    let row = chunk.rows.saturating_mul(dimensions.hidden).saturating_mul(chunk.element);
    let float_row = chunk.rows.saturating_mul(dimensions.hidden).saturating_mul(FLOAT_BYTES);
    let (mut routed, mut own_experts, mut gate_and_up) = (0, 0, 0);
    let (mut attention, mut attention_alone, mut mlp) = (0, 0, 0);
    for layer in &dimensions.layers {
        attention = attention.max(chunk.of_heads(layer, dimensions));
        attention_alone = attention_alone.max(chunk.masks(layer, MASK_COPIES, chunk.element));
        let columns = match &layer.mlp {
            Mlp::Dense { width } => width * if fused { FUSED_MLP_COPIES } else { MLP_COPIES },
            Mlp::Experts { active, width, shared_width, .. } => {
                routed = routed.max(*active);
                gate_and_up = gate_and_up.max(2 * active * width);
                let inside = (active * width * EXPERT_COPIES).max(shared_width * FUSED_MLP_COPIES);
                if workload.experts.is_some() {
                    // Every chosen row goes through one of the rank's experts, whoever it was meant for.
                    own_experts = own_experts.max(inside);
                    0
                } else {
                    inside
                }
            }
            Mlp::None => 0,
        };
        mlp = mlp.max(chunk.rows.saturating_mul(chunk.element).saturating_mul(columns));
    }
    let masks = dimensions.layers.iter().map(|layer| chunk.masks(layer, 1, 1));
    // Layers with windows have a mask of their own.
    let (widest, narrowest) =
        masks.fold((0, u64::MAX), |(most, least), mask| (mask.max(most), mask.min(least)));
    let masks = if narrowest < widest { widest.saturating_add(narrowest) } else { widest };
    let rotary = chunk.rows.saturating_mul(ROTARY_COPIES * dimensions.head_dim * chunk.element);
    workload.activation_base = row
        .saturating_mul(STREAM_COPIES + routed)
        .saturating_add(masks)
        .saturating_add(rotary)
        .saturating_add(chunk.rows.saturating_mul(chunk.element).saturating_mul(own_experts));
    workload.activation_attention = attention;
    workload.activation_attention_alone = attention_alone;
    workload.activation_mlp = mlp;
    // What a norm makes in float32; what experts make of the rows that are sent to them.
    let too_small = if chunk.element < FLOAT_BYTES { row } else { 0 };
    let norm = with_gaps(float_row.saturating_mul(2), too_small);
    workload.activation_floor = norm.max(chunk.of_experts(dimensions, routed, gate_and_up));
    for bytes in [
        &mut workload.activation_base,
        &mut workload.activation_attention,
        &mut workload.activation_attention_alone,
        &mut workload.activation_mlp,
    ] {
        *bytes = with_gaps(*bytes, 0);
    }
}

/// Bytes of tensors with those of the gaps between them, of which `known` are sure to be there.
fn with_gaps(bytes: u64, known: u64) -> u64 {
    bytes.saturating_add(known.max(bytes.div_ceil(FRAGMENTS)))
}

impl Chunk {
    /// Bytes of the rows that experts give, gaps between them counted; those that they are given are not.
    ///
    /// `gate_and_up` are the columns of both, for all experts of a token.
    fn of_experts(self, dimensions: &Dimensions, routed: u64, gate_and_up: u64) -> u64 {
        let elements = self.rows.saturating_mul(dimensions.hidden).saturating_mul(routed);
        let alike = WEIGHTS_LIKE_ROWS.contains(&dimensions.architecture.as_str());
        let weighted =
            elements.saturating_mul(if alike { self.element } else { self.element.max(FLOAT_BYTES) });
        let given = elements.saturating_mul(self.element);
        // Larger than a row, it is used again.
        let mut too_small = given.min(self.rows.saturating_mul(self.element).saturating_mul(gate_and_up));
        if weighted > given {
            too_small = too_small.saturating_add(given);
        }
        with_gaps(given.saturating_add(weighted.saturating_mul(WEIGHTED_ROWS)), too_small)
    }

    /// Bytes of what attention makes of all heads.
    fn of_heads(self, layer: &Layer, dimensions: &Dimensions) -> u64 {
        let rows = self.rows.saturating_mul(self.element);
        match &layer.mixer {
            Mixer::Attention { query_heads, kv_heads, key_dim, value_dim, .. } => {
                let (query, keys) = (query_heads * key_dim, kv_heads * key_dim.max(value_dim));
                let normalised =
                    self.rows.saturating_mul(query).saturating_mul(self.element + 2 * FLOAT_BYTES);
                let rotated = rows
                    .saturating_mul(ROTATED_COPIES * query + 2 * keys)
                    .max(rows.saturating_mul(2 * query + (ROTATED_COPIES + 1) * keys))
                    .max(normalised.saturating_add(rows.saturating_mul(2 * keys)));
                rotated.max(self.attended(layer))
            }
            Mixer::Latent { query_heads, .. } => {
                let width = query_heads * dimensions.head_dim;
                let expanded = self.batch.saturating_mul(self.context).saturating_mul(self.element * width);
                rows.saturating_mul(ROTATED_COPIES * width).saturating_add(expanded.saturating_mul(4))
            }
            Mixer::Recurrent { .. } | Mixer::None => 0,
        }
    }

    /// The query, the output, and keys and values as the attention itself reads them.
    fn attended(self, layer: &Layer) -> u64 {
        let Mixer::Attention { query_heads, kv_heads, key_dim, value_dim, window } = &layer.mixer else {
            return 0;
        };
        let seen = self.seen(*window);
        let tokens = |count: u64| {
            self.batch.saturating_mul(count).saturating_mul(self.element * (key_dim + value_dim))
        };
        let own =
            self.rows.saturating_mul(ATTENTION_COPIES * query_heads * key_dim.max(value_dim) * self.element);
        // Keys and values are repeated for every query head where there is a mask.
        let repeated = if query_heads > kv_heads { tokens(seen).saturating_mul(*query_heads) } else { 0 };
        // What is left of the window and the chunk are joined.
        let joined = if window.is_some_and(|window| window < self.context) {
            tokens(seen).saturating_mul(*kv_heads)
        } else {
            0
        };
        let masked = own.saturating_add(repeated).saturating_add(joined);
        if self.element < FLOAT_BYTES || query_heads <= kv_heads {
            return masked;
        }
        // Without a mask, which only a first chunk is, heads that share keys have no fused attention in float32.
        let scores = self.rows.saturating_mul(self.own).saturating_mul(*query_heads);
        masked.max(
            own.saturating_mul(2)
                .saturating_add(tokens(self.own).saturating_mul(*query_heads))
                .saturating_add(scores.saturating_mul(SCORE_COPIES * self.element + 1)),
        )
    }

    /// Tokens that the chunk's queries see, of one sequence.
    fn seen(self, window: Option<u64>) -> u64 {
        window.map_or(self.context, |window| self.context.min(window.saturating_add(self.own)))
    }

    /// Bytes of `copies` masks of the layer with `element` bytes for each pair of tokens.
    fn masks(self, layer: &Layer, copies: u64, element: u64) -> u64 {
        let seen = match &layer.mixer {
            Mixer::Attention { window, .. } => self.seen(*window),
            Mixer::Latent { .. } => self.context,
            Mixer::Recurrent { .. } | Mixer::None => return 0,
        };
        self.rows.saturating_mul(seen).saturating_mul(copies * element)
    }
}

fn has_fused_mlps(shape: &ModelShape) -> bool {
    let widths: Vec<u64> = shape
        .dimensions
        .layers
        .iter()
        .filter_map(|layer| match layer.mlp {
            Mlp::Dense { width } => Some(2 * width),
            Mlp::Experts { .. } | Mlp::None => None,
        })
        .collect();
    let mut inputs = shape.tensors.iter().filter(|tensor| tensor.role == Role::MlpIn);
    inputs.any(|tensor| tensor.shape.iter().any(|size| widths.contains(size)))
}

/// Fills in the activations of a run on host memory.
pub(super) fn on_host(workload: &mut Workload, dimensions: &Dimensions, context: u64, chunk: u64) {
    let element = dimensions.element_bytes;
    let row = chunk.saturating_mul(element);
    let mut routed_rows = 0;
    let mut whole_expert_bytes = 0;
    for layer in &dimensions.layers {
        let heads = match layer.mixer {
            Mixer::Attention { query_heads, kv_heads, key_dim, value_dim, .. } => {
                QUERY_COPIES * query_heads * key_dim + KEY_COPIES * kv_heads * (key_dim + value_dim)
            }
            // The latent is expanded to a key and a value for every head.
            Mixer::Latent { query_heads, .. } => (QUERY_COPIES + 2) * query_heads * dimensions.head_dim,
            Mixer::Recurrent { .. } | Mixer::None => 0,
        };
        workload.activation_attention = workload.activation_attention.max(row.saturating_mul(heads));
        let columns = match layer.mlp {
            Mlp::Dense { width } => width,
            Mlp::Experts { active, width, shared_width, .. } => {
                routed_rows = routed_rows.max(active);
                if workload.experts.is_some() {
                    // Every token of a chunk may choose the same rank's experts.
                    let all = row.saturating_mul(MLP_COPIES * (active * width + shared_width));
                    whole_expert_bytes = whole_expert_bytes.max(all);
                    0
                } else {
                    active * width + shared_width
                }
            }
            Mlp::None => 0,
        };
        workload.activation_mlp = workload.activation_mlp.max(row.saturating_mul(MLP_COPIES * columns));
    }
    let mask = chunk.saturating_mul(context);
    let residual = row.saturating_mul(dimensions.hidden * (RESIDUAL_COPIES + routed_rows));
    workload.activation_base = residual.saturating_add(mask).saturating_add(whole_expert_bytes);
}
