"""Tensors of ranks whose kernels run on the CPU, each beside a copy for torch, and random divisions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import torch

from kernels_on_cpu import Pages

ARENA = 1 << 21


@dataclass
class Tensor:
    """Rows of a rank, where the kernels see them and in the copy."""

    address: int
    stride: int
    plain: bool
    actual: torch.Tensor
    expected: torch.Tensor

    @property
    def step(self) -> int:
        """Elements from row to row, as the host tells kernels."""
        return self.stride if self.expected.shape[0] > 1 else self.expected.shape[1]


class Arena:
    """Memory for tensors, and its copy. What tensors leave of it holds a pattern."""

    def __init__(self, plain: bool) -> None:
        self.plain = plain
        self.pages, self.copy = Pages(ARENA), Pages(ARENA)
        self.actual = torch.frombuffer(self.pages.memory, dtype=torch.uint8)
        self.expected = torch.frombuffer(self.copy.memory, dtype=torch.uint8)

    def take(self, size: int, beyond: int) -> int:
        """The offset of so many bytes."""
        before = self.pages.used
        at = self.pages.take(size, beyond)
        for memory in (self.actual, self.expected):
            memory[before : self.pages.used].fill_(0xA5)
        return at

    def check(self, rank: int) -> None:
        """Both must be the same; then all is free again."""
        used = self.pages.used
        wrong = (self.actual[:used] != self.expected[:used]).nonzero().flatten()
        assert not len(wrong), (
            f"{len(wrong)} bytes differ in rank {rank}'s memory (plain: {self.plain}), from {int(wrong[0])}"
        )
        self.pages.used = 0


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers, which can be copied without a change."""
    return tensor.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def groups_of(reaches: list[list[bool]]) -> list[list[int]]:
    """Ranks in launches, some together: as if on one device, they reach each other and the same others."""
    groups: list[list[int]] = []
    for rank in range(len(reaches)):
        for group in groups:
            first = group[0]
            alike = reaches[first] == reaches[rank] and all(row[first] == row[rank] for row in reaches)
            if alike and reaches[first][rank] and reaches[rank][first] and random.random() < 0.5:
                group.append(rank)
                break
        else:
            groups.append([rank])
    random.shuffle(groups)
    return groups


def intervals_of(columns: int, ranks: int, *, overlap: bool) -> list[tuple[int, int]]:
    """Columns of every rank, some of none; with `overlap` some begin before the last ends."""
    cuts = sorted([0, columns, *(random.randint(0, columns) for _ in range(ranks - 1))])
    if ranks > 1 and random.random() < 0.3:
        # Widths of 16 bytes for the widest accesses.
        cuts = [cut // 16 * 16 for cut in cuts[:-1]] + [columns]
    intervals = list(pairwise(cuts))
    if overlap:
        intervals = [
            (start - random.randint(0, min(start, 3)) if end > start else start, end)
            for start, end in intervals
        ]
    return intervals
