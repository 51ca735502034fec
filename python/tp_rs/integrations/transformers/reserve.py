"""A rank's memory for what comes and goes, taken at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tp_rs.errors import DoesNotFit
from tp_rs.integrations.transformers.streams import keeping

if TYPE_CHECKING:
    from tp_rs.integrations.transformers.communication import Link
    from tp_rs.integrations.transformers.execution import Ranks

__all__ = ["passing", "reserve", "take"]

_MIB = 1 << 20
_SMALL = 16


def passing(plan: Any) -> list[int]:
    """Bytes that a plan counts for what comes and goes on each rank; empty for splits without budgets."""
    return [
        each.items.get("activations", 0) + each.items.get("logits", 0) for each in getattr(plan, "ranks", ())
    ]


def take(device: torch.device, size: int) -> None:
    """Let torch have one block of so many bytes for what the calling thread makes next on this device.

    Raises:
        torch.OutOfMemoryError: There is none.
    """
    if size:
        torch.empty(size, dtype=torch.uint8, device=device)


def reserve(ranks: Ranks, plan: Any, dtype: torch.dtype) -> None:
    """Let torch take what the plan counts for cache and activations from every device, in one block each.

    Blocks of their own would leave gaps that nothing fits into once memory is short. torch keeps them until
    its cache is emptied. Does nothing on host memory and for splits without a plan.

    Raises:
        DoesNotFit: A device has less left than the plan counts.
    """
    room = passing(plan)
    caches = [each.items.get("kv_cache", 0) for each in getattr(plan, "ranks", ())]
    if not room or not ranks.streams:
        return

    def job(link: Link) -> None:
        device = ranks.devices[link.rank]
        _warm(device, dtype)
        take(device, room[link.rank])
        with keeping(device):
            take(device, caches[link.rank])

    try:
        ranks.run(job)
    except torch.OutOfMemoryError as error:
        sizes = ", ".join(
            f"rank {rank} ({device}): {(passed + cached) / _MIB:.0f} MiB"
            for rank, (device, passed, cached) in enumerate(zip(ranks.devices, room, caches, strict=True))
        )
        message = (
            f"a device has less memory left than the plan counts for cache and activations ({sizes}); free "
            "what else is on it, or load with smaller budgets or a shorter context"
        )
        raise DoesNotFit(message) from error.with_traceback(None)


def _warm(device: torch.device, dtype: torch.dtype) -> None:
    # The workspaces of matrix products stay. Made later, they would lie in the middle of the block.
    small = torch.zeros(_SMALL, _SMALL, dtype=dtype, device=device)
    nn.functional.linear(small, small)
    nn.functional.linear(small, small, small[0])
