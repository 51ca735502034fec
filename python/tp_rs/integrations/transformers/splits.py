"""The splits that the rules read: the five of a plan, and what follows from them for other widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tp_rs.errors import InvalidInput

__all__ = ["Interval", "Split", "SplitSource", "Splits", "cover", "scale"]

Interval = tuple[int, int]
"""Start and end, the end not included."""

Split = Sequence[tuple[int, int, int]]
"""(rank, start, end) in ascending order; ranks with nothing are left out."""


class SplitSource(Protocol):
    """What a plan must carry to cut a model. `tp_rs.Plan` does."""

    @property
    def kv_split(self) -> Split:
        """KV heads. Intervals overlap where ranks keep copies of a head; `q_split` then says who uses it."""

    @property
    def q_split(self) -> Split:
        """Query heads."""

    @property
    def id_split(self) -> Split:
        """Intermediate columns."""

    @property
    def vc_split(self) -> Split:
        """Vocabulary rows."""

    @property
    def rs_split(self) -> Split:
        """Columns of the residual stream."""

    @property
    def experts_split(self) -> Split | None:
        """Whole experts, None where every expert is cut."""

    @property
    def width_splits(self) -> Mapping[int, Split]:
        """Splits of MLPs whose width is not `id_split`'s total, by width."""


@dataclass(frozen=True)
class Splits:
    """Splits without a plan, for tests and for callers who cut by hand."""

    kv_split: Split
    q_split: Split
    id_split: Split
    vc_split: Split
    rs_split: Split = ()
    experts_split: Split | None = None
    width_splits: Mapping[int, Split] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        *,
        kv: Sequence[int],
        intermediate: Sequence[int],
        vocabulary: Sequence[int],
        groups: int,
        experts: Sequence[int] | None = None,
    ) -> Splits:
        """From one number a rank; `groups` query heads follow each KV head."""
        return cls(
            kv_split=_split(kv),
            q_split=_split([groups * heads for heads in kv]),
            id_split=_split(intermediate),
            vc_split=_split(vocabulary),
            experts_split=None if experts is None else _split(experts),
        )


def _split(shares: Sequence[int]) -> Split:
    split, start = [], 0
    for rank, share in enumerate(shares):
        if share:
            split.append((rank, start, start + share))
        start += share
    return split


def cover(split: Split, ranks: int) -> list[Interval]:
    """One interval a rank, empty where the split leaves the rank out.

    Raises:
        InvalidInput: The split names a rank that is not there.
    """
    intervals: list[Interval] = [(0, 0)] * ranks
    for rank, start, end in split:
        if not 0 <= rank < ranks or start > end:
            message = f"split: got ({rank}, {start}, {end}), wanted a rank below {ranks} and start <= end"
            raise InvalidInput(message)
        intervals[rank] = (start, end)
    return intervals


def scale(split: Split, ranks: int, total: int, unit: int = 1) -> list[Interval]:
    """The same proportions over another total, at multiples of `unit`.

    Boundaries are rounded to the nearest unit, so equal totals give the split itself where it keeps to the
    unit.
    """
    intervals = cover(split, ranks)
    own = max((end for _, end in intervals), default=0)
    if own == 0:
        return [(0, total)] + [(0, 0)] * (ranks - 1)

    def moved(bound: int) -> int:
        return total if bound == own else (2 * bound * total + own * unit) // (2 * own * unit) * unit

    return [(min(moved(start), total), min(moved(end), total)) for start, end in intervals]
