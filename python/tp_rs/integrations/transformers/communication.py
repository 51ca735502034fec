"""What the ranks of a model need of a communicator, and one rank's end of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import threading

    import torch

__all__ = ["Collectives", "Link"]


class Collectives(Protocol):
    """Operations at which all ranks of one process meet, each called from its rank's own thread.

    Every call waits until all ranks have come. A rank that fails calls `abort`, which ends the others' waits
    with an error that carries the reason; after that no call succeeds.
    """

    def all_reduce_(self, rank: int, tensor: torch.Tensor) -> None:
        """Sum in place, in rank order: bitwise the same on every rank."""

    def all_gather(self, rank: int, tensor: torch.Tensor, *, only: int | None = None) -> torch.Tensor | None:
        """The ranks' tensors joined along the last dimension, for every rank or for one (None elsewhere)."""

    def broadcast(self, rank: int, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The source's tensor, on this rank's device."""

    def barrier(self, rank: int) -> None:
        """Wait for all."""

    def abort(self, reason: str) -> None:
        """End all waits, now and from now on."""


class Link:
    """One rank's end: who it is, and the baton that it lays down while it waits.

    Only the rank that holds the baton runs Python. Threads that run freely contend for the interpreter at
    every tensor operation, which costs more than taking turns.
    """

    def __init__(self, rank: int, ranks: int, collectives: Collectives, baton: threading.Lock) -> None:
        self.rank = rank
        self.ranks = ranks
        self.collectives = collectives
        self.epoch = 0
        """Communicators so far. It grows with every failed call."""
        self._baton = baton

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place and return the tensor; a copy where memory is not contiguous."""
        tensor = tensor.contiguous()
        self._baton.release()
        try:
            self.collectives.all_reduce_(self.rank, tensor)
        finally:
            self._baton.acquire()
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Join along the last dimension, for every rank."""
        whole = self._gather(tensor, None)
        if whole is None:
            message = f"all_gather: rank {self.rank} got nothing"
            raise RuntimeError(message)
        return whole

    def gather(self, tensor: torch.Tensor, only: int) -> torch.Tensor | None:
        """Join along the last dimension, for one rank."""
        return self._gather(tensor, only)

    def _gather(self, tensor: torch.Tensor, only: int | None) -> torch.Tensor | None:
        self._baton.release()
        try:
            return self.collectives.all_gather(self.rank, tensor.contiguous(), only=only)
        finally:
            self._baton.acquire()

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The source's tensor."""
        self._baton.release()
        try:
            return self.collectives.broadcast(self.rank, tensor.contiguous(), source)
        finally:
            self._baton.acquire()

    def barrier(self) -> None:
        """Wait for all."""
        self._baton.release()
        try:
            self.collectives.barrier(self.rank)
        finally:
            self._baton.acquire()
