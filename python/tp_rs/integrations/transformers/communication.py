"""One rank's end of the communicator, as its modules use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tp_rs.integrations.transformers.layout import width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tp_rs._native import Baton, Communicator
    from tp_rs.integrations.transformers.splits import Interval, Split

__all__ = ["Link", "side_by_side"]


class Link:
    """Who the rank is, and its calls that meet the other ranks.

    Every rank makes the same calls in the same order, from its own thread. The baton is laid down natively
    while a call waits, and taken again before it returns.
    """

    def __init__(self, rank: int, communicator: Communicator, baton: Baton) -> None:
        self.rank = rank
        self.ranks = len(communicator.devices)
        self.baton = baton
        self.epoch = 0
        """Calls of the model that failed so far."""
        view = communicator.rank(rank, baton=baton)
        self._all_reduce = view.all_reduce
        self._all_gather = view.all_gather
        self._gather = view.gather
        self._broadcast = view.broadcast
        self.barrier = view.barrier

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, in the tensor's own memory where that is contiguous."""
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        self._all_reduce(tensor)
        return tensor

    def all_gather(self, part: torch.Tensor, split: Split) -> torch.Tensor:
        """All ranks' parts side by side, for every rank."""
        whole = part.new_empty(*part.shape[:-1], split[-1][2])
        self._all_gather(part.contiguous(), split, whole)
        return whole

    def gather(self, part: torch.Tensor, split: Split, root: int) -> torch.Tensor | None:
        """All ranks' parts side by side, for one rank."""
        whole = part.new_empty(*part.shape[:-1], split[-1][2]) if self.rank == root else None
        self._gather(part.contiguous(), split, whole, root=root)
        return whole

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """The root's tensor. What the others pass only tells the shape."""
        own = tensor.contiguous() if self.rank == root else torch.empty_like(tensor).contiguous()
        self._broadcast(own, root)
        return own


def side_by_side(ranks: Sequence[Sequence[Interval]]) -> Split:
    """The split of a tensor that is put together from what the ranks hold of these intervals."""
    split, start = [], 0
    for rank, intervals in enumerate(ranks):
        end = start + width(intervals)
        if end > start:
            split.append((rank, start, end))
        start = end
    return split
