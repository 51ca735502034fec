"""Collective operations on host memory between threads, in plain torch."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from tp_rs.errors import CollectiveTimeout, TPError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ThreadCollectives"]


class ThreadCollectives:
    """The rank that comes last does the work for all, so each operation is one meeting."""

    def __init__(self, ranks: int, timeout: float = 600.0) -> None:
        self._timeout = timeout
        self._lock = threading.Lock()
        self._arrived: dict[int, tuple[str, Any]] = {}
        self._results: list[Any] = [None] * ranks
        self._wake = [threading.Semaphore(0) for _ in range(ranks)]
        self._reason: str | None = None

    def all_reduce_(self, rank: int, tensor: torch.Tensor) -> None:
        """Sum in place in rank order, accumulating in float32 (float64 for float64)."""
        self._meet(rank, f"all_reduce {tuple(tensor.shape)} {tensor.dtype}", tensor, _sum)

    def all_gather(self, rank: int, tensor: torch.Tensor, *, only: int | None = None) -> torch.Tensor | None:
        """Join along the last dimension."""
        what = f"all_gather {tuple(tensor.shape[:-1])} {tensor.dtype} {only}"
        result: torch.Tensor | None = self._meet(rank, what, tensor, lambda parts: _join(parts, only))
        return result

    def broadcast(self, rank: int, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Every rank gets a copy of the source's tensor."""
        result: torch.Tensor = self._meet(
            rank, f"broadcast {source}", tensor, lambda parts: [parts[source].to(p.device) for p in parts]
        )
        return result

    def barrier(self, rank: int) -> None:
        """Wait for all."""
        self._meet(rank, "barrier", None, lambda parts: parts)

    def abort(self, reason: str) -> None:
        """End all waits with an error."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
        for wake in self._wake:
            wake.release()

    def _meet(self, rank: int, what: str, value: Any, work: Callable[[Sequence[Any]], Sequence[Any]]) -> Any:
        with self._lock:
            self._check()
            self._arrived[rank] = (what, value)
            last = len(self._arrived) == len(self._wake)
            if last:
                arrived, self._arrived = self._arrived, {}
        if last:
            self._complete(rank, arrived, work)
        elif not self._wake[rank].acquire(timeout=self._timeout):
            missing = [other for other in range(len(self._wake)) if other not in self._arrived]
            message = f"rank {rank} waited {self._timeout:g} s in {what} for ranks {missing}"
            self.abort(message)
            raise CollectiveTimeout(message)
        self._check()
        result, self._results[rank] = self._results[rank], None
        return result

    def _check(self) -> None:
        if self._reason is not None:
            message = f"the ranks stopped: {self._reason}"
            raise TPError(message)

    def _complete(
        self, rank: int, arrived: dict[int, tuple[str, Any]], work: Callable[[Sequence[Any]], Sequence[Any]]
    ) -> None:
        order = sorted(arrived)
        calls = {arrived[other][0] for other in order}
        if len(calls) > 1:
            message = "the ranks do not agree: " + "; ".join(
                f"rank {other} in {arrived[other][0]}" for other in order
            )
            self.abort(message)
            raise TPError(message)
        self._results = list(work([arrived[other][1] for other in order]))
        for other, wake in enumerate(self._wake):
            if other != rank:
                wake.release()


def _sum(parts: Sequence[torch.Tensor]) -> Sequence[None]:
    first = parts[0]
    exact = first.dtype in {torch.float32, torch.float64}
    total = first if exact else first.to(torch.float32)
    for part in parts[1:]:
        total.add_(part)
    for part in parts if not exact else parts[1:]:
        part.copy_(total)
    return [None] * len(parts)


def _join(parts: Sequence[torch.Tensor], only: int | None) -> Sequence[torch.Tensor | None]:
    whole = torch.cat(list(parts), dim=-1)
    if only is not None:
        return [whole if rank == only else None for rank in range(len(parts))]
    return [whole] + [whole.clone() for _ in parts[1:]]
