//! The bytes that a run takes beside weights and cache: documented formulas with named constants.
//!
//! # On CUDA devices
//! What transformers' modules have alive at once, read from their code and measured (`benches/plan_truth.py`). For a
//! chunk of `T` tokens of all sequences (`t` of each), a context of `L` tokens, `B` sequences, elements of `e` bytes, a
//! residual stream of `h` columns, and per rank `q` query, `k` key and `v` value elements:
//! - always: [`STREAM_COPIES`] × `T·h·e`, and one more for each expert that a token is sent to; `T·L` bytes of mask, and
//!   another mask for layers with windows; [`ROTARY_COPIES`] × `T·e` a column of a head;
//! - while attention runs, the largest of: queries, keys and values being rotated ([`ROTATED_COPIES`] of the query, or
//!   of the keys); a norm of the queries in float32; and attention itself: [`ATTENTION_COPIES`] × `T·e` a query element,
//!   keys and values of all `L` tokens repeated for every query head (where heads share keys), and those of a window
//!   beside those of the chunk (`w + t` tokens instead of `L`). Beside it [`MASK_COPIES`] × `T·L·e`, the mask in numbers.
//!   In float32, heads that share keys take [`SCORE_COPIES`] × `t·T` scores each, where the chunk is the first;
//! - while the MLP runs: [`MLP_COPIES`] × `T·e` a column, [`FUSED_MLP_COPIES`] where gate and up are one tensor,
//!   [`EXPERT_COPIES`] for each expert that a token is sent to;
//! - between them: two rows of a norm in float32, or for each expert that a token is sent to a row of its output, and
//!   two of it multiplied with the router's weights, before and after they are put in order: of `e` bytes an element
//!   where the router makes its weights of the model's type ([`WEIGHTS_LIKE_ROWS`]), else in float32.
//!
//! And of all that one part in [`FRAGMENTS`] more, for gaps. What lies between the two is known where that is more: what
//! was there before and is too small. Before a norm's rows in float32 that is a row; before experts' rows it is their
//! gate and up, as far as a row is larger, and the row of an expert's output where the next ones are in float32.
//!
//! # On host memory
//! Counted for a chunk of `T` tokens, elements of `e` bytes and a residual stream of `h` columns:
//! - always alive: [`RESIDUAL_COPIES`] × `T·h·e` (the residual stream, its normalised copy and the block's output)
//!   and one mask byte for every token of the chunk and every cached token;
//! - while attention runs: [`QUERY_COPIES`] × `T·e` a query element (the query before and after its rotation, and the
//!   attention's output) and [`KEY_COPIES`] × `T·e` a key or value element;
//! - while the MLP runs: [`MLP_COPIES`] × `T·e` a column (gate, up and their product). A token passes through each
//!   of its experts, and its residual row is copied for each.
//!
//! A chunk is counted with no more tokens than the context has in all sequences; on CUDA devices with those that fill up
//! a recorded step ([`PROMPT_STEPS`]).
//!
//! Logits are kept for the last position of every sequence only.

/// Copies of the residual stream alive at once.
pub const RESIDUAL_COPIES: u64 = 3;
/// Copies of a query element alive at once.
pub const QUERY_COPIES: u64 = 3;
/// Copies of a key or value element alive at once, beside the cache.
pub const KEY_COPIES: u64 = 2;
/// Copies of an intermediate element alive at once: gate, up and their product.
pub const MLP_COPIES: u64 = 3;

/// Rows of the residual stream alive on a device: the embedding, a layer's input, its sum with the attention's output,
/// and that normalised.
pub const STREAM_COPIES: u64 = 4;
/// Copies of an intermediate element where gate and up are computed as one tensor, which stays until both are used.
pub const FUSED_MLP_COPIES: u64 = 4;
/// Copies of an expert's intermediate element: gate and up as one tensor, and a copy of it without rows of others.
pub const EXPERT_COPIES: u64 = 4;
/// Rows for each expert of a token while its outputs are multiplied with the router's weights: before and after they
/// are put in order.
pub const WEIGHTED_ROWS: u64 = 2;
/// Types whose routers make their weights of the model's type, as transformers (`model_type`) or GGUF files
/// (`general.architecture`) name them. Others leave them in float32, which makes float32 of the rows that they are
/// multiplied with. Small ones of each type were run in bfloat16 with transformers 5.17
/// (`tests/python/models/test_planned_gaps.py`).
pub const WEIGHTS_LIKE_ROWS: &[&str] = &[
    "cohere2_moe",
    "ernie4_5_moe",
    "flex_olmo",
    "gpt-oss",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "jamba",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen2moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3moe",
];
/// Copies of an element while it is rotated: itself, by the cosine, its halves exchanged, by the sine.
pub const ROTATED_COPIES: u64 = 4;
/// Copies of a query element while attention runs: the query and the output.
pub const ATTENTION_COPIES: u64 = 2;
/// Copies of the mask as numbers of the query's type: one, and one padded to whole vectors.
pub const MASK_COPIES: u64 = 2;
/// Copies of a score where there is no fused attention, and one byte beside them.
pub const SCORE_COPIES: u64 = 3;
/// Copies of a column of cosines and sines, with those in float32 that they are made from.
pub const ROTARY_COPIES: u64 = 8;
/// Tokens of a sequence in the steps of prompts that are recorded on devices (`captured.py`): shorter prompts are filled
/// up, unless the chunk is shorter.
pub const PROMPT_STEPS: [u64; 4] = [32, 128, 512, 2048];
/// Bytes of a float32 number.
pub const FLOAT_BYTES: u64 = 4;

/// One part in so many of the activations on a device, which the allocator cannot hand out because it lies between
/// tensors. In a replay of all that a prompt and some tokens allocate, through a model of torch's allocator with one
/// block for activations, between a fiftieth and a sixth was needed beside the tensors (least where they are few and
/// large).
pub const FRAGMENTS: u64 = 7;

/// Bytes that a CUDA process takes on a device whatever it runs: the context, loaded kernels, and what is sampled from.
///
/// Measured on an H100 with torch 2.11 (driver of CUDA 13): 619 MiB for the context with torch's own kernels, 771 to
/// 777 MiB once matrix products, attention, elementwise kernels and the communicator's had run.
pub const CUDA_CONTEXT_BYTES: u64 = 800 << 20;
/// Bytes that each rank takes on its CUDA device beside its tensors: the workspace of the matrix products on its stream
/// (32 MiB on an H100), small tensors, and what the allocator rounds up.
pub const CUDA_RANK_BYTES: u64 = 64 << 20;
/// Bytes that the context grows by for every further rank on a device (86 to 88 MiB on an H100).
pub const CUDA_STREAM_BYTES: u64 = 88 << 20;
/// Bytes of the framework for the first rank on a device.
pub const CUDA_FRAMEWORK_BYTES: u64 = CUDA_CONTEXT_BYTES + CUDA_RANK_BYTES;

/// Bytes of memory that a rank stages chunks of large messages through where a peer does not reach its device.
pub const STAGING_BYTES: u64 = 4 << 20;
/// Bytes of a rank's record, and of each peer's inbox beside the areas for small messages.
const RECORD_BYTES: u64 = 32 << 10;
/// What devices round an allocation up to.
const ALLOCATION_STEP: u64 = 2 << 20;

/// Bytes of a pushed piece, which is written and read in one access.
pub const PIECE_BYTES: u64 = 16;
/// Bytes of a tensor in a pushed piece; beside them lies the operation's number.
pub const PIECE_DATA_BYTES: u64 = 12;

/// The most bytes of a tensor that ranks push to each other in one step, by the number of ranks.
#[must_use]
pub fn pushed_bytes(ranks: usize) -> u64 {
    match ranks {
        0..=2 => 2 << 20,
        3..=4 => 768 << 10,
        5..=8 => 384 << 10,
        _ => 192 << 10,
    }
}

/// Bytes of the pieces that carry the largest pushed tensor. Every rank has room for two of each peer's.
#[must_use]
pub fn pushed_area_bytes(ranks: usize) -> u64 {
    pushed_bytes(ranks).div_ceil(PIECE_DATA_BYTES) * PIECE_BYTES
}

/// Bytes of scratch memory on its device that a rank has where copy engines carry large operations, and bytes of its
/// slots in pinned host memory. Two ranks have them whose communicator is told to (`CommOptions::engines_above`); plans
/// count them for none, since by default no engines carry anything.
pub const ENGINE_BYTES: u64 = 8 << 20;

/// The most bytes that a communicator takes for one rank, on its device or, for peers that do not reach that, in pinned
/// host memory.
#[must_use]
pub fn communicator_bytes(ranks: u64) -> u64 {
    if ranks < 2 {
        return ALLOCATION_STEP;
    }
    let area = pushed_area_bytes(usize::try_from(ranks).unwrap_or(usize::MAX));
    let inboxes = (ranks - 1).saturating_mul(2 * area + RECORD_BYTES);
    STAGING_BYTES.saturating_add(RECORD_BYTES).saturating_add(inboxes).next_multiple_of(ALLOCATION_STEP)
}
