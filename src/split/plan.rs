//! [`Plan`]: the splits with the bytes of every rank, item by item.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{CacheType, Split, Strategy};

/// Version of [`Plan`]'s JSON form.
pub const PLAN_VERSION: u32 = 1;

/// What fills a rank's memory. The order is that of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Item {
    /// Attention weights of the rank's heads.
    Attention,
    /// Weights of its columns of dense and shared MLPs.
    Mlp,
    /// Weights of its part of the routed experts.
    Experts,
    /// Its rows of the token embedding.
    Embedding,
    /// Its rows of the output head.
    Head,
    /// Weights that it holds whole.
    Replicated,
    /// Keys and values (and recurrent states) at the planned context.
    KvCache,
    /// Largest set of intermediate results alive at once, at the planned chunk.
    Activations,
    /// Logits, its own rows and gathered.
    Logits,
    /// Buffers of the communicator on the device.
    Communicator,
    /// The framework's own context on the device.
    Framework,
}

/// One rank of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankPlan {
    /// The rank.
    pub rank: usize,
    /// Its device.
    pub device: String,
    /// Bytes that it may use.
    pub budget: u64,
    /// Relative speed (GB/s of memory where known).
    pub speed: f64,
    /// Bytes of each item; items of 0 bytes are left out.
    pub items: BTreeMap<Item, u64>,
    /// Bytes in all.
    pub total: u64,
    /// Bytes of weights and cache that one decode step reads, at the full context.
    pub read_per_token: u64,
}

impl RankPlan {
    /// Bytes left of the budget; negative where it is exceeded.
    #[must_use]
    #[allow(clippy::cast_possible_wrap)]
    pub fn free(&self) -> i64 {
        self.budget as i64 - self.total as i64
    }

    /// Bytes of one item.
    #[must_use]
    pub fn bytes(&self, item: Item) -> u64 {
        self.items.get(&item).copied().unwrap_or(0)
    }
}

/// Why a plan does not fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortfall {
    /// The rank that misses the most.
    pub rank: usize,
    /// Its device.
    pub device: String,
    /// Bytes that it misses.
    pub missing: u64,
    /// Bytes that all ranks together miss.
    pub missing_total: u64,
    /// The item that could give way: the cache where a shorter context would fit, else activations where a smaller
    /// chunk would do, else the largest item.
    pub item: Item,
    /// What to do, with numbers.
    pub advice: String,
}

/// The splits of one model. `q` follows `kv`; `rs` covers every rank of `id`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Splits {
    /// KV heads. Intervals overlap where heads are duplicated.
    pub kv: Split,
    /// Query heads.
    pub q: Split,
    /// Intermediate columns.
    pub id: Split,
    /// Vocabulary rows.
    pub vc: Split,
    /// Columns of the residual stream.
    pub rs: Split,
    /// Whole experts, where they are divided so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<Split>,
    /// Columns of MLPs whose width is not that of `id`, by width.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub widths: BTreeMap<u64, Split>,
}

/// What a decode step waits for: at each sum over the ranks, for the slowest of them.
///
/// Bytes read over the rank's speed, the largest of all ranks: nanoseconds where speeds are in GB/s. Their sum is what
/// the balanced strategy minimises, and a floor of the time of a token that no kernel can be below.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct StepTime {
    /// Attention weights and cache.
    pub attention: f64,
    /// MLP and experts.
    pub mlp: f64,
    /// Output head.
    pub head: f64,
}

impl StepTime {
    /// All three.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.attention + self.mlp + self.head
    }
}

/// The model that a plan is for, in a few numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedModel {
    /// Path or name.
    pub name: String,
    /// `model_type` or GGUF architecture.
    pub architecture: String,
    /// Layers.
    pub layers: u64,
    /// Query heads.
    pub query_heads: u64,
    /// KV heads.
    pub kv_heads: u64,
    /// Elements of a head.
    pub head_dim: u64,
    /// Columns of the residual stream.
    pub hidden: u64,
    /// Intermediate columns that `id` divides.
    pub intermediate: u64,
    /// Vocabulary rows.
    pub vocabulary: u64,
    /// Bytes of all weights, each tensor once.
    pub weight_bytes: u64,
    /// How positions are rotated, as the fields of a transformers `config.json` say it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotary: Option<Map<String, Value>>,
}

/// A plan: who holds what, and what it takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// [`PLAN_VERSION`] of the version that wrote it.
    pub version: u32,
    /// The model.
    pub model: PlannedModel,
    /// How the splits were found.
    pub strategy: Strategy,
    /// Tokens a sequence that the plan is for.
    pub context: u64,
    /// Sequences at once.
    pub batch: u64,
    /// Tokens of a prompt that are computed at once.
    pub chunk: u64,
    /// How keys and values are stored.
    pub cache: CacheType,
    /// The splits.
    pub splits: Splits,
    /// Every rank, those with nothing included.
    pub ranks: Vec<RankPlan>,
    /// What a decode step at the full context waits for.
    pub step_time: StepTime,
    /// Whether the speeds were known, in GB/s or in proportion; if not they count as equal.
    pub speeds_known: bool,
    /// Bytes of each of the two buffers in host memory that gathered tensors go to.
    pub buffer_bytes: u64,
    /// Bytes of pinned host memory: both buffers, and what ranks stage messages through. 0 where one rank holds all.
    pub pinned_bytes: u64,
    /// Whether every rank stays within its budget.
    pub fits: bool,
    /// Why not, if not.
    pub shortfall: Option<Shortfall>,
    /// The largest context that would fit, with the same budgets and options, 0 if none.
    pub max_context: u64,
    /// What a reader should know: duplicated heads, what could not be split, limits that were exceeded.
    pub notes: Vec<String>,
}
