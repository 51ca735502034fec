"""One rank's end of the communicator, as its modules use it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from tp_rs.errors import TPError
from tp_rs.integrations.transformers.layout import width

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tp_rs._native import Baton, Communicator
    from tp_rs.integrations.transformers.splits import Interval, Split

__all__ = ["Link", "side_by_side"]


class Link:
    """Who the rank is, and its calls that meet the other ranks.

    Every rank makes the same calls in the same order, from its own thread. The baton is laid down natively
    while a call waits, and taken again before it returns.

    On CUDA devices a call is a kernel on the thread's current stream, and may be captured in a graph. Outside
    of a capture the threads also meet on the host, before and after it. So no kernel waits on a device for a
    rank that is not there yet: what that rank has to do until then may need the device to be idle (freeing
    memory, loading a kernel), which it would never be.

    Args:
        rank: The rank.
        communicator: What the ranks move tensors through.
        baton: Whose turn it is in Python.
        meeting: A communicator on host memory for the ranks' threads, where the other one is on devices.
    """

    def __init__(
        self, rank: int, communicator: Communicator, baton: Baton, meeting: Communicator | None = None
    ) -> None:
        self.rank = rank
        self.thread: int | None = None
        """Whose calls these are, once there is one."""
        self.ranks = len(communicator.devices)
        self.baton = baton
        self.epoch = 0
        """Calls of the model that failed so far."""
        self.barrier: Callable[[], None] = (meeting or communicator).rank(rank, baton=baton).barrier
        self._communicator = communicator
        self._meeting = meeting
        view = communicator.rank(rank, baton=baton)
        self._all_reduce = self._in_step(view.all_reduce)
        self._all_gather = self._in_step(view.all_gather)
        self._gather = self._in_step(view.gather)
        self._broadcast = self._in_step(view.broadcast)

    def abort(self, reason: str) -> None:
        """Stop all ranks, wherever they wait."""
        self._communicator.abort(reason)
        if self._meeting is not None:
            self._meeting.abort(reason)

    def _own(self, call: Callable[..., None]) -> Callable[..., None]:
        """A call that only the rank's own thread makes: another one would wait for ranks that do not come."""

        def run(*args: Any, **named: Any) -> None:
            if self.thread is not None and threading.get_ident() != self.thread:
                message = (
                    "a part of a model over ranks was called by itself, and its ranks only meet in calls of "
                    "the model; call the model, or its get_input_embeddings()"
                )
                raise TPError(message)
            call(*args, **named)

        return run

    def _in_step(self, call: Callable[..., None]) -> Callable[..., None]:
        if self._meeting is None or self.ranks == 1:
            return self._own(call)
        capturing, meet = torch.cuda.is_current_stream_capturing, self.barrier

        def run(*args: Any, **named: Any) -> None:
            if capturing():
                call(*args, **named)
                return
            meet()
            call(*args, **named)
            meet()

        return self._own(run)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, in the tensor's own memory where that is contiguous."""
        if self.ranks == 1:
            return tensor
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        self._all_reduce(tensor)
        return tensor

    def all_gather(self, part: torch.Tensor, split: Split) -> torch.Tensor:
        """All ranks' parts side by side, for every rank."""
        if self.ranks == 1:
            return part
        whole = part.new_empty(*part.shape[:-1], split[-1][2])
        self._all_gather(part.contiguous(), split, whole)
        return whole

    def gather(self, part: torch.Tensor, split: Split, root: int) -> torch.Tensor | None:
        """All ranks' parts side by side, for one rank."""
        if self.ranks == 1:
            return part
        whole = part.new_empty(*part.shape[:-1], split[-1][2]) if self.rank == root else None
        self._gather(part.contiguous(), split, whole, root=root)
        return whole

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """The root's tensor. What the others pass only tells the shape."""
        if self.ranks == 1:
            return tensor
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
