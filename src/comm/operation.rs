//! What is asked of the ranks: the operation, and what each of them brings to it.

use std::borrow::Cow;

use super::view::Tensor;
use crate::split::Split;

/// An operation with everything that all ranks have to agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Operation<'a> {
    /// Nothing moves; everybody waits for everybody.
    Barrier,
    /// Every output becomes the sum of the inputs.
    AllReduce,
    /// Every output becomes the input of `root`.
    Broadcast { root: usize },
    /// The output of `root` becomes the inputs side by side.
    /// The caller of a list call may not want to wait for it.
    Gather { root: usize, layout: Layout<'a>, blocking: bool },
    /// Every output becomes the inputs side by side.
    AllGather { layout: Layout<'a> },
    /// Every output becomes its rank's columns of the sum of the inputs.
    ReduceScatter { layout: Layout<'a> },
    /// Every output grows by its rank's columns of the input. Ranks do not meet for it.
    AddResidual { layout: Layout<'a> },
}

/// Who has which columns: the intervals of a split, `dim` columns a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout<'a> {
    pub(crate) split: Cow<'a, Split>,
    pub(crate) dim: u64,
}

#[cfg(feature = "cuda")]
const NAMES: [&str; 7] =
    ["barrier", "all_reduce", "broadcast", "gather", "all_gather", "reduce_scatter", "add_residual"];

impl<'a> Layout<'a> {
    pub(crate) fn new(split: &'a Split, dim: u64) -> Self {
        Self { split: Cow::Borrowed(split), dim }
    }

    pub(crate) fn into_owned(self) -> Layout<'static> {
        Layout { split: Cow::Owned(self.split.into_owned()), dim: self.dim }
    }

    /// First column and one past the last of `rank`; `None` where it has none. Only for checked layouts, whose
    /// columns fit a `usize`.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn columns(&self, rank: usize) -> Option<(usize, usize)> {
        let share = self.split.of(rank).filter(|share| !share.is_empty())?;
        Some(((share.start * self.dim) as usize, (share.end * self.dim) as usize))
    }

    /// Columns of `rank`.
    pub(crate) fn width(&self, rank: usize) -> usize {
        self.columns(rank).map_or(0, |(start, end)| end - start)
    }

    /// Columns in all.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn total(&self) -> usize {
        (self.split.total() * self.dim) as usize
    }
}

impl Operation<'_> {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Barrier => "barrier",
            Self::AllReduce => "all_reduce",
            Self::Broadcast { .. } => "broadcast",
            Self::Gather { .. } => "gather",
            Self::AllGather { .. } => "all_gather",
            Self::ReduceScatter { .. } => "reduce_scatter",
            Self::AddResidual { .. } => "add_residual",
        }
    }

    pub(crate) fn into_owned(self) -> Operation<'static> {
        match self {
            Self::Barrier => Operation::Barrier,
            Self::AllReduce => Operation::AllReduce,
            Self::Broadcast { root } => Operation::Broadcast { root },
            Self::Gather { root, layout, blocking } => {
                Operation::Gather { root, layout: layout.into_owned(), blocking }
            }
            Self::AllGather { layout } => Operation::AllGather { layout: layout.into_owned() },
            Self::ReduceScatter { layout } => Operation::ReduceScatter { layout: layout.into_owned() },
            Self::AddResidual { layout } => Operation::AddResidual { layout: layout.into_owned() },
        }
    }

    /// A number below 8 for the kind of operation.
    #[cfg(feature = "cuda")]
    pub(crate) fn tag(&self) -> u32 {
        let position = NAMES.iter().position(|name| *name == self.name());
        u32::try_from(position.unwrap_or(0)).unwrap_or(0)
    }

    /// The name of the kind that has this number.
    #[cfg(feature = "cuda")]
    pub(crate) fn name_of_tag(tag: u32) -> &'static str {
        NAMES.get(tag as usize).copied().unwrap_or("collective")
    }

    /// Whether elements are added up.
    pub(crate) fn sums(&self) -> bool {
        matches!(self, Self::AllReduce | Self::ReduceScatter { .. } | Self::AddResidual { .. })
    }

    pub(crate) fn layout(&self) -> Option<&Layout<'_>> {
        match self {
            Self::Gather { layout, .. }
            | Self::AllGather { layout }
            | Self::ReduceScatter { layout }
            | Self::AddResidual { layout } => Some(layout),
            Self::Barrier | Self::AllReduce | Self::Broadcast { .. } => None,
        }
    }
}

impl std::fmt::Display for Operation<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())?;
        if let Self::Broadcast { root } | Self::Gather { root, .. } = self {
            write!(f, " with root {root}")?;
        }
        if let Some(layout) = self.layout() {
            let shares = layout.split.0.iter().map(|share| (share.rank, share.start, share.end));
            write!(f, " over {:?} x {}", shares.collect::<Vec<_>>(), layout.dim)?;
        }
        Ok(())
    }
}

/// What one participant gives and gets. Participants are the ranks and, in list calls, one more behind them
/// that stands for the caller: it holds the source of a broadcast or the target of a gather.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Pair {
    pub(crate) input: Option<Tensor>,
    pub(crate) output: Option<Tensor>,
}

impl Pair {
    /// The input, if it has elements.
    pub(crate) fn gives(&self) -> Option<&Tensor> {
        self.input.as_ref().filter(|tensor| !tensor.is_empty())
    }

    /// The output, if it has elements.
    pub(crate) fn gets(&self) -> Option<&Tensor> {
        self.output.as_ref().filter(|tensor| !tensor.is_empty())
    }
}
