//! [`Workload`]: what a model costs, said in the units that splits divide. The solver and the accounting of memory
//! know a model only through it.

use super::{Item, Splits};

/// A dimension that a split divides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Axis {
    /// Units in all: heads, columns or rows.
    pub total: u64,
    /// Every cut must fall on a multiple of this. Divides `total`; equal to it where the dimension cannot be cut.
    pub grid: u64,
    /// The cuts that the solver makes fall on multiples of this. A multiple of `grid` that divides `total`.
    pub step: u64,
}

impl Axis {
    /// An axis cut on multiples of `grid`, and by the solver on multiples of about `preferred`. A grid that does not
    /// divide the total is widened until it does, up to the whole axis.
    #[must_use]
    pub fn new(total: u64, grid: u64, preferred: u64) -> Self {
        if total == 0 {
            return Self { total, grid: 1, step: 1 };
        }
        let grid = grid.clamp(1, total);
        let grid = (1..=total / grid)
            .map(|multiple| multiple * grid)
            .find(|candidate| total.is_multiple_of(*candidate))
            .unwrap_or(total);
        let missing = preferred.max(1) / gcd(grid, preferred.max(1));
        Self { total, grid, step: grid * gcd(total / grid, missing) }
    }

    /// How many steps the axis has.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.total / self.step
    }
}

/// A tensor whose format keeps elements together, which is why an axis has a grid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Its name.
    pub tensor: String,
    /// Elements that stay together along the cut side.
    pub elements: u64,
}

/// The largest block along each dimension that splits divide, for messages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Blocks {
    /// Along query or KV heads.
    pub heads: Option<Block>,
    /// Along the intermediate.
    pub intermediate: Option<Block>,
    /// Along the vocabulary.
    pub vocabulary: Option<Block>,
}

pub(crate) fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

pub(crate) fn lcm(a: u64, b: u64) -> u64 {
    if a == 0 || b == 0 { a.max(b) } else { (a / gcd(a, b)).saturating_mul(b) }
}

/// What an amount of bytes is proportional to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Basis {
    /// Every rank that holds anything pays all of it.
    Rank,
    /// Every rank that holds query heads pays all of it.
    AttentionRank,
    /// Query heads.
    QueryHeads,
    /// KV heads that the rank stores, copies included.
    KvHeads,
    /// Columns of the intermediate.
    Intermediate,
    /// Columns of [`Workload::widths`] at this index.
    Width(usize),
    /// Whole experts.
    Experts,
    /// Vocabulary rows.
    Vocabulary,
}

/// Bytes of one kind of thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// What they are reported as.
    pub item: Item,
    /// What a rank's part is proportional to.
    pub basis: Basis,
    /// Bytes over the whole basis (over one rank for [`Basis::Rank`] and [`Basis::AttentionRank`]).
    pub bytes: u64,
    /// Bytes of them that one decode step reads.
    pub read: u64,
}

/// A model at one context, batch, chunk and cache type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// KV heads.
    pub kv_heads: Axis,
    /// Query heads a KV head.
    pub query_heads_per_kv_head: u64,
    /// Parts of a KV head's query heads that ranks sharing it may take: a divisor of
    /// `query_heads_per_kv_head`, in query heads.
    pub query_head_step: u64,
    /// Columns of the residual stream.
    pub hidden: Axis,
    /// Columns of the intermediate.
    pub intermediate: Axis,
    /// MLP widths other than the intermediate's: cut where the intermediate is, to the nearest of their own steps.
    pub widths: Vec<Axis>,
    /// Vocabulary rows.
    pub vocabulary: Axis,
    /// What the grids come from.
    pub blocks: Blocks,
    /// Routed experts a layer, where they are divided whole; the intermediate's cuts then follow theirs.
    pub experts: Option<u64>,
    /// Bytes.
    pub costs: Vec<Cost>,
    /// Bytes of activations that every rank has alive.
    pub activation_base: u64,
    /// More of them while attention runs, over all query heads.
    pub activation_attention: u64,
    /// And on every rank with heads, however many.
    pub activation_attention_alone: u64,
    /// More of them while the MLP runs, over all columns (or whole experts).
    pub activation_mlp: u64,
    /// Bytes of the communicator's own buffers for each rank on a CUDA device.
    pub communicator_bytes: u64,
    /// What every rank has alive beside the first, at some time when neither runs.
    pub activation_floor: u64,
    /// Bytes of each of the two buffers in host memory that gathered tensors go to.
    pub buffer_bytes: u64,
    /// Bytes of pinned host memory: both buffers, and what ranks stage messages through.
    pub pinned_bytes: u64,
}

impl Workload {
    /// Query heads in all.
    #[must_use]
    pub fn query_heads(&self) -> u64 {
        self.kv_heads.total * self.query_heads_per_kv_head
    }

    /// Units of `basis` in all; 1 for what is paid whole.
    #[must_use]
    pub fn total(&self, basis: Basis) -> u64 {
        match basis {
            Basis::Rank | Basis::AttentionRank => 1,
            Basis::QueryHeads => self.query_heads(),
            Basis::KvHeads => self.kv_heads.total,
            Basis::Intermediate => self.intermediate.total,
            Basis::Width(index) => self.widths.get(index).map_or(0, |axis| axis.total),
            Basis::Experts => self.experts.unwrap_or(0),
            Basis::Vocabulary => self.vocabulary.total,
        }
    }

    /// Bytes and read bytes of all costs with this basis.
    pub(crate) fn sum(&self, basis: Basis) -> (u64, u64) {
        self.costs
            .iter()
            .filter(|cost| cost.basis == basis)
            .fold((0, 0), |(bytes, read), cost| (bytes + cost.bytes, read + cost.read))
    }

    /// What one rank holds under `splits`.
    #[must_use]
    pub fn holdings(&self, splits: &Splits, rank: usize) -> Holdings {
        let within = |end: u64, share: Option<super::Share>| {
            // The reference's vocabulary split may end beyond the last row.
            share.map_or(0, |share| share.end.min(end).saturating_sub(share.start))
        };
        Holdings {
            query_heads: splits.q.count(rank),
            kv_heads: splits.kv.count(rank),
            intermediate: splits.id.count(rank),
            widths: self
                .widths
                .iter()
                .map(|axis| splits.widths.get(&axis.total).map_or(0, |split| split.count(rank)))
                .collect(),
            experts: splits.experts.as_ref().map_or(0, |split| split.count(rank)),
            vocabulary: within(self.vocabulary.total, splits.vc.of(rank)),
            hidden: splits.rs.count(rank),
        }
    }
}

/// What one rank holds, in units of each dimension.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Holdings {
    /// Query heads.
    pub query_heads: u64,
    /// KV heads, copies included.
    pub kv_heads: u64,
    /// Columns of the intermediate.
    pub intermediate: u64,
    /// Columns of each other width.
    pub widths: Vec<u64>,
    /// Whole experts.
    pub experts: u64,
    /// Vocabulary rows.
    pub vocabulary: u64,
    /// Residual columns.
    pub hidden: u64,
}

impl Holdings {
    /// Whether the rank holds nothing at all, and so need not take part.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.query_heads == 0
            && self.kv_heads == 0
            && self.intermediate == 0
            && self.experts == 0
            && self.vocabulary == 0
            && self.hidden == 0
            && self.widths.iter().all(|columns| *columns == 0)
    }

    /// Units of `basis`; 0 or 1 for what is paid whole.
    #[must_use]
    pub fn count(&self, basis: Basis) -> u64 {
        match basis {
            Basis::Rank => u64::from(!self.is_empty()),
            Basis::AttentionRank => u64::from(self.query_heads > 0),
            Basis::QueryHeads => self.query_heads,
            Basis::KvHeads => self.kv_heads,
            Basis::Intermediate => self.intermediate,
            Basis::Width(index) => self.widths.get(index).copied().unwrap_or(0),
            Basis::Experts => self.experts,
            Basis::Vocabulary => self.vocabulary,
        }
    }
}
