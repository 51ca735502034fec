//! One tensor of a checkpoint: its exact bytes, its role in the model, and where it may be cut.

use serde::{Deserialize, Serialize};

/// What a tensor does in the model, which decides how its bytes follow the splits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Projections into the heads: query, key, value, their biases and per-head extras. Cut by output.
    AttentionIn,
    /// The projection out of the heads. Cut by input.
    AttentionOut,
    /// MLP gate and up. Cut by output.
    MlpIn,
    /// MLP down. Cut by input.
    MlpOut,
    /// Gate and up of routed experts. Cut by output, or held whole by the rank that owns the expert.
    ExpertIn,
    /// Down of routed experts. Cut by input, or held whole by the rank that owns the expert.
    ExpertOut,
    /// Token embedding. Cut by vocabulary rows.
    Embedding,
    /// Output head. Cut by vocabulary rows.
    Head,
    /// Held whole by every rank: norms, routers, biases added after a sum, whatever cannot be cut.
    Replicated,
}

/// The amount that a part of a tensor's bytes is proportional to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CutAlong {
    /// Query heads of the layer.
    QueryHeads,
    /// Key and value heads of the layer.
    KvHeads,
    /// Columns of an MLP of this width (the layer's own: dense, shared expert and routed expert may differ).
    Intermediate {
        /// Columns of the whole MLP.
        width: u64,
    },
    /// Columns inside each routed expert, or whole experts, as the plan decides.
    Experts {
        /// How many routed experts the layer has.
        count: u64,
        /// Columns of one expert.
        width: u64,
    },
    /// Vocabulary rows.
    Vocabulary,
    /// Nothing: every rank that holds heads keeps all of it.
    WholeWithAttention,
    /// Nothing: every rank keeps all of it.
    Whole,
}

/// A part of a tensor's bytes and what it follows. Fused projections have several parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What the bytes are proportional to.
    pub along: CutAlong,
    /// Bytes of the whole part.
    pub bytes: u64,
    /// The cut must fall on a multiple of this many elements of the cut axis (columns of the intermediate, rows
    /// of the vocabulary, or elements inside the heads' rows: `heads × head_dim`): 1 where anything goes, a
    /// block or group length where the format packs or scales elements together.
    pub grid: u64,
}

/// A tensor of the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    /// Name as the checkpoint writes it.
    pub name: String,
    /// Element type as the checkpoint writes it (`"BF16"`, `"Q4_K"`, ...).
    pub dtype: String,
    /// Shape, outermost dimension first whatever the format's own order.
    pub shape: Vec<u64>,
    /// Bytes of the whole tensor, exact.
    pub bytes: u64,
    /// What it does.
    pub role: Role,
    /// How its bytes follow the splits; the parts' bytes add up to `bytes`.
    pub parts: Vec<Part>,
    /// Why it is held whole, where one might have expected a cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What a header says of one tensor, before anything is known about its role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawTensor {
    /// Name as the checkpoint writes it.
    pub name: String,
    /// Element type as the checkpoint writes it.
    pub dtype: String,
    /// Shape, outermost dimension first whatever the format's own order.
    pub shape: Vec<u64>,
    /// Bytes, exact.
    pub bytes: u64,
    /// Elements that share a scale or are packed together along the innermost dimension: 1 for plain types, the
    /// block length for GGUF's quantised types.
    pub block: u64,
}
