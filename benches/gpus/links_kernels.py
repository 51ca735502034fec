# Triton reads the kernels, not Python: their arguments have no types.
# ruff: noqa: ANN001
"""Kernels that only move data, for `links`."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

__all__ = ["move", "move_sum"]


@triton.jit  # type: ignore[untyped-decorator]
def move(source, target, count, block: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """Copy `count` words."""
    for first in range(tl.program_id(0) * block, count, tl.num_programs(0) * block):
        place = first + tl.arange(0, block)
        inside = place < count
        words = tl.load(source + place, mask=inside, eviction_policy="evict_first")
        tl.store(target + place, words, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def move_sum(own, other, target, count, block: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """Add `count` words of `other` to `own`, and write the sums to `target` too."""
    for first in range(tl.program_id(0) * block, count, tl.num_programs(0) * block):
        place = first + tl.arange(0, block)
        inside = place < count
        sums = tl.load(own + place, mask=inside) + tl.load(
            other + place, mask=inside, eviction_policy="evict_first"
        )
        tl.store(own + place, sums, mask=inside)
        tl.store(target + place, sums, mask=inside)
