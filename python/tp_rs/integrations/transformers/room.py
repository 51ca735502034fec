"""What ranks take once they are loaded, against the plan that was given for them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tp_rs.errors import DoesNotFit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from tp_rs.integrations.transformers.checkpoint import Checkpoint
    from tp_rs.integrations.transformers.layout import Layout

__all__ = ["part_bytes", "require_room", "weight_bytes"]

_log = logging.getLogger("tp_rs.transformers")

_WEIGHTS = ("attention", "mlp", "experts", "embedding", "head", "replicated")
_MIB = 1 << 20
_NOTABLE = 1.01
"""Padding and buffers that only one side counts stay below this."""


def part_bytes(skeleton: PreTrainedModel, layout: Layout, rank: int) -> Iterator[int]:
    """Bytes of each of a rank's parameters as they are held, shared ones once."""
    for name, parameter in skeleton.named_parameters():
        cut = layout.cuts.get(name)
        size = parameter.numel() * parameter.element_size()
        yield size if cut is None else size // parameter.shape[cut.dim] * cut.size(rank)


def weight_bytes(skeleton: PreTrainedModel, layout: Layout, rank: int) -> int:
    """Bytes of a rank's parameters as they are held, shared ones once."""
    return sum(part_bytes(skeleton, layout, rank))


def require_room(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, layout: Layout, plan: Any, *, force: bool
) -> None:
    """Compare a plan's weights with those that are loaded, which may be decoded or kept whole.

    Splits without budgets say nothing of memory and pass.

    Raises:
        DoesNotFit: A rank would go beyond its budget, unless `force`.
    """
    ranks = list(getattr(plan, "ranks", ()))
    if not ranks:
        return
    held = [weight_bytes(skeleton, layout, rank) for rank in range(layout.ranks)]
    planned = [sum(each.items.get(item, 0) for item in _WEIGHTS) for each in ranks]
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    remedy = f'plan with weights="{dtype}", or raise the budgets'
    for rank, (each, now, then) in enumerate(zip(ranks, held, planned, strict=False)):
        missing = each.total - then + now - each.budget
        if missing > 0 and now > then and not force:
            message = (
                f"rank {rank} ({each.device}): its weights take {now / _MIB:.1f} MiB as {dtype}, and the "
                f"plan counts {then / _MIB:.1f} MiB for them: {missing / _MIB:.1f} MiB are missing; {remedy}"
            )
            raise DoesNotFit(message)
    if sum(held) > _NOTABLE * sum(planned):
        _log.warning(
            "%s: the plan counts %.1f MiB for weights, and they take %.1f MiB as %s; %s",
            checkpoint.name,
            sum(planned) / _MIB,
            sum(held) / _MIB,
            dtype,
            remedy,
        )
