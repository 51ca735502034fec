"""Which heads of an attention every rank holds."""

from __future__ import annotations

from math import gcd

from tp_rs.integrations.transformers.layout import Heads
from tp_rs.integrations.transformers.splits import Interval, SplitSource, cover, scale

__all__ = ["divide_heads", "rows"]


def divide_heads(splits: SplitSource, ranks: int, queries: int, kv: int) -> tuple[Heads, ...]:
    """The heads of every rank, for an attention of its own head counts.

    An attention with the plan's counts follows its query split, copies of KV heads included. Any other
    follows its proportions in whole KV heads.
    """
    planned = cover(splits.q_split, ranks)
    if max((end for _, end in planned), default=0) == queries and _kv_total(splits) == kv:
        query = planned
    elif kv == queries and max((end for _, end in planned), default=0) == queries:
        query = planned  # latent attention: every query head has keys of its own
    else:
        groups = queries // kv
        query = [(start * groups, end * groups) for start, end in _whole(splits, ranks, kv)]
    return tuple(_heads(interval, queries // kv) for interval in query)


def _kv_total(splits: SplitSource) -> int:
    return max((end for _, _, end in splits.kv_split), default=0)


def _whole(splits: SplitSource, ranks: int, kv: int) -> list[Interval]:
    return scale(splits.q_split, ranks, kv)


def _heads(query: Interval, groups: int) -> Heads:
    start, end = query
    if start == end:
        return Heads(query, (), groups)
    used = range(start // groups, -(-end // groups))
    sizes = [min(end, (head + 1) * groups) - max(start, head * groups) for head in used]
    # Attention repeats every stored KV head the same number of times, so one whose share is larger is stored
    # more than once: 5 query heads on KV heads of 3 are stored as 3 + 2 copies for one query head each.
    unit = gcd(*sizes)
    kv = tuple(head for head, size in zip(used, sizes, strict=True) for _ in range(size // unit))
    return Heads(query, kv, unit)


def rows(heads: Heads, size: int, *, keys: bool, offset: int = 0) -> tuple[Interval, ...]:
    """The rows of a rank in a projection with `size` rows a head, neighbours joined."""
    chosen = heads.kv if keys else tuple(range(*heads.query))
    joined: list[Interval] = []
    for head in chosen:
        start = offset + head * size
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], start + size)
        else:
            joined.append((start, start + size))
    return tuple(joined)
