"""What the rules decide, as data: who holds which part of a parameter, and where ranks meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, Flag, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tp_rs.integrations.transformers.splits import Interval

__all__ = ["Attention", "Collective", "Cut", "Guesses", "Heads", "Kind", "Layout", "width"]


def width(intervals: Iterable[Interval]) -> int:
    """Elements that the intervals hold, copies counted."""
    return sum(end - start for start, end in intervals)


@dataclass(frozen=True)
class Cut:
    """A parameter's part on every rank."""

    dim: int
    """The dimension that is cut."""
    ranks: tuple[tuple[Interval, ...], ...]
    """The intervals of every rank, as they lie in the rank's tensor. One may come twice."""

    def size(self, rank: int) -> int:
        """Elements along `dim` on a rank."""
        return width(self.ranks[rank])


class Guesses(Flag):
    """What is cut without a plan that names it, by what the parts are called."""

    NOTHING = 0
    MLPS = auto()
    """MLPs and experts."""
    ATTENTIONS = auto()
    ALL = MLPS | ATTENTIONS


class Kind(Enum):
    """What the ranks do together at a module."""

    SUM = "sum"
    """Row-parallel: the output is summed, the bias added after that."""
    SUM_OWN_HEADS = "sum_own_heads"
    """Row-parallel with an output a head: summed, then every rank takes its heads."""
    GATHER = "gather"
    """Column-parallel: the outputs are put together."""
    SPLIT_INPUT = "split_input"
    """Row-parallel whose input is whole: every rank takes its columns, and the output is summed."""
    LOOKUP = "lookup"
    """An embedding cut by rows: rows of others count as zero, and the output is summed."""
    LOGITS = "logits"
    """The head: the outputs are put together on the leading rank."""
    WIDE_NORM = "wide_norm"
    """An RMS norm over a row that is cut: the sums of squares are summed."""
    EXPERTS = "experts"
    """Experts, all on every rank and each cut: the output is summed."""
    WHOLE_EXPERTS = "whole_experts"
    """Experts, each whole on one rank: choices of others' experts count as zero, and the output is summed."""
    SHARED = "shared"
    """A module with the same value on every rank inside something that is summed: its part is divided."""


@dataclass(frozen=True)
class Collective:
    """A module at which the ranks meet."""

    module: str
    kind: Kind
    ranks: tuple[tuple[Interval, ...], ...] = ()
    """The intervals that `kind` speaks of."""
    total: int = 0
    """What the intervals cover."""


@dataclass(frozen=True)
class Heads:
    """One rank's heads of one attention."""

    query: Interval
    kv: tuple[int, ...]
    """The KV heads in the rank's order. A head comes more than once where the rank's query heads divide
    unevenly over its KV heads."""
    groups: int
    """Query heads a KV head as it is stored."""

    @property
    def queries(self) -> int:
        """Query heads."""
        return self.query[1] - self.query[0]


@dataclass(frozen=True)
class Attention:
    """The heads of an attention, whole and by rank."""

    module: str
    queries: int
    kv: int
    ranks: tuple[Heads, ...]
    collectives: tuple[Collective, ...] = ()
    """Where the ranks meet inside it, in the order of its modules."""
    width: int = 0
    """Columns that all query heads give to the output projection."""


@dataclass
class Layout:
    """All that the rules decide about a model."""

    ranks: int
    cuts: dict[str, Cut] = field(default_factory=dict)
    """By parameter name. What is not named is whole on every rank."""
    attentions: dict[str, Attention] = field(default_factory=dict)
    collectives: dict[str, Collective] = field(default_factory=dict)
    once: set[str] = field(default_factory=set)
    """Parameters that are added before a sum: rank 0 keeps them, the others hold zeros."""
    experts: dict[str, str] = field(default_factory=dict)
    """Modules of experts, with the parameter that holds their down projection."""
    whole: dict[str, str] = field(default_factory=dict)
    """Modules that a plan cuts and that stay whole, with the reason."""
    guessed: set[str] = field(default_factory=set)
    """Modules that no plan names and that were cut by what their parts are called."""

    def lead(self) -> int:
        """The rank that the front listens to: the first one with heads everywhere."""
        for rank in range(self.ranks):
            if all(attention.ranks[rank].queries for attention in self.attentions.values()):
                return rank
        return 0
