//! A split: which rank has which interval of a dimension.

use serde::{Deserialize, Serialize};

/// One rank's half-open interval of a dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "(usize, u64, u64)", from = "(usize, u64, u64)")]
pub struct Share {
    /// The rank.
    pub rank: usize,
    /// First unit.
    pub start: u64,
    /// One past the last unit.
    pub end: u64,
}

impl Share {
    /// Units in the interval.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether the interval holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }
}

impl From<(usize, u64, u64)> for Share {
    fn from((rank, start, end): (usize, u64, u64)) -> Self {
        Self { rank, start, end }
    }
}

impl From<Share> for (usize, u64, u64) {
    fn from(share: Share) -> Self {
        (share.rank, share.start, share.end)
    }
}

/// The intervals of one dimension, ascending; ranks with nothing are left out.
///
/// Intervals follow each other without gaps. Only the KV heads of a plan that duplicates heads may overlap.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Split(pub Vec<Share>);

impl Split {
    /// The split in which rank `i` has `counts[i]` units, one rank after the other.
    #[must_use]
    pub fn from_counts(counts: &[u64]) -> Self {
        let mut start = 0;
        let mut shares = Vec::with_capacity(counts.len());
        for (rank, &count) in counts.iter().enumerate() {
            if count > 0 {
                shares.push(Share { rank, start, end: start + count });
            }
            start += count;
        }
        Self(shares)
    }

    /// The interval of `rank`, if it has one.
    #[must_use]
    pub fn of(&self, rank: usize) -> Option<Share> {
        self.0.iter().copied().find(|share| share.rank == rank)
    }

    /// Units of `rank`, 0 if it has none.
    #[must_use]
    pub fn count(&self, rank: usize) -> u64 {
        self.of(rank).map_or(0, |share| share.len())
    }

    /// One past the last unit of the dimension.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.last().map_or(0, |share| share.end)
    }

    /// The ranks that have something, ascending.
    pub fn ranks(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().map(|share| share.rank)
    }

    /// Every interval multiplied by `factor` (heads to elements, units to columns).
    #[must_use]
    pub fn scaled(&self, factor: u64) -> Self {
        Self(
            self.0
                .iter()
                .map(|s| Share { rank: s.rank, start: s.start * factor, end: s.end * factor })
                .collect(),
        )
    }
}
