"""Random tensors, sums made another way, and a thread a rank, for the tests of collectives."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
MOVED = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]


def values(shape: tuple[int, ...], dtype: Any) -> Any:
    if dtype in MOVED:
        return torch.randint(0, 100, shape).to(dtype)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def raw(tensor: Any) -> Any:
    """Bits, so that comparing works for every type."""
    return tensor.contiguous().view(torch.uint8)


def summed(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum in the order of ranks, in float32 or, for doubles, float64, rounded once."""
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def assert_sum(got: Any, parts: list[Any]) -> None:
    """The sum in rank order, bit for bit, and near the exact one."""
    assert torch.equal(raw(got), raw(summed(parts)))
    exact = sum(part.double() for part in parts)
    torch.testing.assert_close(got.double(), exact.to(got.dtype).double(), rtol=0.13, atol=0.3)


def split_of(widths: list[int]) -> list[tuple[int, int, int]]:
    split, start = [], 0
    for rank, width in enumerate(widths):
        if width:
            split.append((rank, start, start + width))
        start += width
    return split


def widths_for(ranks: int) -> list[int]:
    widths = [random.randint(0, 5) for _ in range(ranks)]
    widths[random.randrange(ranks)] += 1
    return widths


def in_threads(comm: Any, ranks: int, work: Any) -> list[Any]:
    def delayed(rank: int) -> Any:
        time.sleep(random.random() * 0.01)
        return work(comm.rank(rank))

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(delayed, range(ranks)))
