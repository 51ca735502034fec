# Triton reads the kernel, not Python: its arguments have no types, and are many.
# ruff: noqa: ANN001, ANN202, PLR0917
"""A Triton kernel for the product of one row with a weight, which is as fast as the weight can be read.

Rows of the weight are divided among programs, and no sum is divided: what libraries do for such shapes, parts
of sums that a second kernel adds up, costs more than it gains. From Hopper on a program begins while the
kernel before is still at work, and loads its first weights meanwhile.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from triton.language.extra.cuda import (  # type: ignore[import-untyped]
    gdc_launch_dependents,
    gdc_wait,
)

from tp_rs.integrations.transformers.triton_device import multiprocessors, overlaps

__all__ = ["product"]

_BYTES = 16384
"""Of weights that a program loads at once: 128 a thread."""
_WIDEST_BYTES = 8192
_MOST_ROWS = 16
_PROGRAMS = 2
"""A multiprocessor; programs of fewer rows are slower where there are enough."""


@torch.library.custom_op(
    "tp_rs::product",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor hidden, Tensor weight, Tensor? bias) -> Tensor",
)
def product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.linear` of one row, summed in float32.

    Args:
        hidden: (..., in), of one row.
        weight: (out, in), contiguous along `in`. Nothing that runs right before may write it.
        bias: (out,), or None.

    Returns:
        (..., out).
    """
    rows, columns = weight.shape
    result = hidden.new_empty(*hidden.shape[:-1], rows)
    tile, block = _tile(weight, multiprocessors(weight.device))
    early = overlaps(weight.device)
    _product[(triton.cdiv(rows, tile),)](
        hidden.reshape(-1),
        weight,
        weight if bias is None else bias,
        result,
        rows,
        columns,
        weight.stride(0),
        tile=tile,
        block=block,
        biased=bias is not None,
        early=early,
        num_warps=4,
        launch_pdl=early,
    )
    return result


@product.register_fake
def _shape_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    return hidden.new_empty(*hidden.shape[:-1], weight.shape[0])


def _tile(weight: torch.Tensor, programs: int) -> tuple[int, int]:
    """Rows of a program, and the columns that it loads at once."""
    rows, columns = weight.shape
    size = weight.element_size()
    widest = min(_WIDEST_BYTES // size, triton.next_power_of_2(columns))
    # Rows of half the width, so that several use the inputs that are read; fewer and wider ones where there
    # would not be enough programs.
    tile = max(1, min(_MOST_ROWS, _BYTES // size // min(widest, _WIDEST_BYTES // size // 2)))
    while tile > 1 and rows < _PROGRAMS * programs * tile:
        tile //= 2
    return tile, min(widest, _BYTES // size // tile)


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    result,
    rows,
    columns,
    stride,
    tile: tl.constexpr,
    block: tl.constexpr,
    biased: tl.constexpr,
    early: tl.constexpr,
):
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, block)
    inside = row < rows
    # Offsets of a vocabulary's weights go beyond 32 bits.
    place = weight + row[:, None].to(tl.int64) * stride + column[None, :]
    weights = tl.load(
        place, mask=inside[:, None] & (column < columns)[None, :], other=0.0, eviction_policy="evict_first"
    )
    if early:
        gdc_wait()
        gdc_launch_dependents()
    inputs = tl.load(hidden + column, mask=column < columns, other=0.0)
    sums = weights.to(tl.float32) * inputs.to(tl.float32)[None, :]
    for first in range(block, columns, block):
        there = first + column < columns
        weights = tl.load(
            place + first, mask=inside[:, None] & there[None, :], other=0.0, eviction_policy="evict_first"
        )
        inputs = tl.load(hidden + first + column, mask=there, other=0.0)
        sums += weights.to(tl.float32) * inputs.to(tl.float32)[None, :]
    total = tl.sum(sums, 1)
    if biased:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + row, total.to(result.dtype.element_ty), mask=inside)
