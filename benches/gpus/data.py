"""The tensors of one operation at one size, what its result has to be, and how to check that."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from . import catalogue as names
from .timing import relative_error

if TYPE_CHECKING:
    from collections.abc import Sequence

# Sums of a few numbers of 8 or 11 bits.
TOLERANCE = 2e-2


class WrongResultError(Exception):
    """A candidate did not do what it should."""


def width_of(ranks: int) -> int:
    """Columns of one rank: all have the same, so that NCCL can take part."""
    return names.COLUMNS // ranks


def split_of(ranks: int) -> list[tuple[int, int, int]]:
    """Whose columns are which."""
    width = width_of(ranks)
    return [(rank, rank * width, (rank + 1) * width) for rank in range(ranks)]


@functools.lru_cache(maxsize=2)
def sources(operation: str, rows: int, ranks: int, seed: int) -> list[torch.Tensor]:
    """What each rank brings, in host memory; every process makes the same from the same seed."""
    width = width_of(ranks)
    parts = operation in {names.ALL_GATHER, names.GATHER_HOST, names.GATHER_ONE, names.GATHER_GPU}
    shape = (rows, width) if parts else (rows, width * ranks)
    made = []
    for rank in range(ranks):
        generator = torch.Generator().manual_seed(seed + rank)
        # Small, because a sum in place grows with every call.
        made.append(torch.randn(shape, generator=generator) * 1e-2)
    return made


def total(made: Sequence[torch.Tensor], dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """The sum of what the ranks bring, each rounded to the dtype first."""
    result = torch.zeros_like(made[0])
    for part in made:
        result += part.to(dtype).float()
    return result


def require(what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise where a result is not what it has to be."""
    if got.shape != wanted.shape:
        raise WrongResultError(f"{what}: shape {list(got.shape)}, wanted {list(wanted.shape)}")
    error = relative_error(got, wanted)
    if not error <= TOLERANCE:
        raise WrongResultError(f"{what}: relative error {error:.3g}")
