"""What ranks take once they are loaded, against the plan that was given for them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from tp_rs.errors import DoesNotFit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from tp_rs.integrations.transformers.checkpoint import Checkpoint
    from tp_rs.integrations.transformers.layout import Layout

__all__ = ["part_bytes", "require_free", "require_room", "weight_bytes"]

_log = logging.getLogger("tp_rs.transformers")

_WEIGHTS = ("attention", "mlp", "experts", "embedding", "head", "replicated")
_CACHED = {"fp16": 2, "fp32": 4}
"""Bytes of an element of the caches that can be loaded."""
_MIB = 1 << 20
_NOTABLE = 1.01
"""Padding and buffers that only one side counts stay below this."""


def part_bytes(skeleton: PreTrainedModel, layout: Layout, rank: int) -> Iterator[tuple[str, int]]:
    """Names of a rank's parameters, shared ones once, and the bytes of each as they are held."""
    for name, parameter in skeleton.named_parameters():
        cut = layout.cuts.get(name)
        size = parameter.numel() * parameter.element_size()
        yield name, size if cut is None else size // parameter.shape[cut.dim] * cut.size(rank)


def weight_bytes(skeleton: PreTrainedModel, layout: Layout, rank: int) -> int:
    """Bytes of a rank's parameters as they are held, shared ones once."""
    return sum(size for _, size in part_bytes(skeleton, layout, rank))


def require_room(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, layout: Layout, plan: Any, *, force: bool
) -> None:
    """Compare what a plan counts with what is loaded: weights may be decoded or kept whole, caches be wider.

    Splits without budgets say nothing of memory and pass.

    Raises:
        DoesNotFit: A rank would go beyond its budget, unless `force`.
    """
    ranks = list(getattr(plan, "ranks", ()))
    if not ranks:
        return
    caches = [each.items.get("kv_cache", 0) for each in ranks]
    # Keys and values are kept in the dtype that the model computes in.
    size = checkpoint.dtype.itemsize
    cached = getattr(plan, "cache", "")
    wider = max(1.0, size / _CACHED.get(cached, size))
    held = [
        weight_bytes(skeleton, layout, rank) + int(wider * cache)
        for rank, cache in zip(range(layout.ranks), caches, strict=False)
    ]
    planned = [
        sum(each.items.get(item, 0) for item in _WEIGHTS) + cache
        for each, cache in zip(ranks, caches, strict=True)
    ]
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    # No plan counts a wider cache than that, which float64 would need.
    wide_cache = ' and cache="fp32"' if wider > 1 and cached != "fp32" else ""
    remedy = f'plan with weights="{dtype}"{wide_cache}, or raise the budgets'
    for rank, (each, now, then) in enumerate(zip(ranks, held, planned, strict=False)):
        missing = each.total - then + now - each.budget
        if missing > 0 and now > then and not force:
            message = (
                f"rank {rank} ({each.device}): its weights and cache take {now / _MIB:.1f} MiB as {dtype}, "
                f"and the plan counts {then / _MIB:.1f} MiB for them: {missing / _MIB:.1f} MiB are missing; "
                f"{remedy}"
            )
            raise DoesNotFit(message)
    if sum(held) > _NOTABLE * sum(planned):
        _log.warning(
            "%s: the plan counts %.1f MiB for weights and caches, and they take %.1f MiB as %s; %s",
            checkpoint.name,
            sum(planned) / _MIB,
            sum(held) / _MIB,
            dtype,
            remedy,
        )


def require_free(plan: Any, places: Sequence[torch.device]) -> None:
    """Compare what a plan counts with what is free on CUDA devices: budgets may be more than there is.

    CUDA's own part is left out, as some of it may be there already. A plan that breaks its own budgets is
    refused elsewhere.

    Raises:
        DoesNotFit: A device has less.
    """
    if not getattr(plan, "fits", False):
        return
    wanted: dict[torch.device, int] = {}
    for rank, place in zip(plan.ranks, places, strict=False):
        if place.type == "cuda":
            wanted[place] = wanted.get(place, 0) + rank.total - rank.items.get("framework", 0)
    for place, size in wanted.items():
        free = torch.cuda.mem_get_info(place)[0]
        # Torch has taken that and does not use it.
        free += torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        if size > free:
            message = (
                f"{place}: the plan counts {size / _MIB:.0f} MiB beside what CUDA takes itself, and "
                f"{free / _MIB:.0f} MiB are free; free what else is on it, leave gpu_split out to use "
                "what is free, or plan with smaller budgets"
            )
            raise DoesNotFit(message)
