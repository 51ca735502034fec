"""From a checkpoint and splits to a model that runs over ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from tp_rs._native import Communicator
from tp_rs.errors import DoesNotFit
from tp_rs.integrations.transformers.conversion import Conversion
from tp_rs.integrations.transformers.execution import Ranks, timeout_of
from tp_rs.integrations.transformers.front import make_front
from tp_rs.integrations.transformers.layout import Guesses
from tp_rs.integrations.transformers.loader import load_rank, make_skeleton, out_of_memory
from tp_rs.integrations.transformers.rules import make_layout
from tp_rs.integrations.transformers.sources import Counter
from tp_rs.integrations.transformers.wire import wire

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tp_rs.integrations.transformers.checkpoint import Checkpoint
    from tp_rs.integrations.transformers.layout import Layout
    from tp_rs.integrations.transformers.splits import SplitSource
    from tp_rs.integrations.transformers.stub import Returns

__all__ = ["Progress", "assemble", "decide"]

Progress = Callable[[int, int], None]
"""Told of a rank and the bytes that it has read so far, from the threads that read."""


def decide(
    checkpoint: Checkpoint, splits: SplitSource, ranks: int, guesses: Guesses = Guesses.ALL
) -> tuple[PreTrainedModel, Layout]:
    """The model's skeleton and what the rules make of it."""
    skeleton = make_skeleton(checkpoint.kind, checkpoint.config, checkpoint.dtype)
    return skeleton, make_layout(skeleton, splits, ranks, guesses)


def assemble(
    checkpoint: Checkpoint,
    skeleton: PreTrainedModel,
    layout: Layout,
    devices: Sequence[torch.device],
    *,
    communicator: Communicator | None = None,
    one_router: bool | None = None,
    progress: Progress | None = None,
) -> Any:
    """Load every rank and put the front before them.

    Args:
        checkpoint: What to load.
        skeleton: Its uncut model on the meta device.
        layout: What the rules decided.
        devices: One a rank.
        communicator: What the ranks meet through, one of `devices`. None makes one.
        one_router: Whether choices of experts come from rank 0. Left out, where devices are not alike.
        progress: Told of the bytes read.

    Raises:
        ModelError: Weights are missing or do not fit the configuration.
        DoesNotFit: A device ran out of memory; what other ranks had loaded is freed.
    """
    conversion = Conversion(skeleton, checkpoint.read(skeleton))
    models: list[PreTrainedModel] = []
    rank = 0
    try:
        for rank, device in enumerate(devices):
            counter = Counter(rank, progress)
            models.append(load_rank(checkpoint, conversion, layout, rank, device=device, counter=counter))
    except BaseException as error:
        # The traceback would keep them for as long as the caller looks at it.
        models.clear()
        if not out_of_memory(error):
            raise
        message = f"rank {rank}: {devices[rank]} ran out of memory while loading; give it a smaller share"
        raise DoesNotFit(message) from error.with_traceback(None)
    with ExitStack() as cleanup:
        ranks = Ranks(communicator or Communicator(devices, timeout_of(devices)))
        cleanup.callback(ranks.close)
        returns: Returns = {}
        unlike = len({_make_of(device) for device in devices}) > 1 if one_router is None else one_router
        for rank, model in enumerate(models):
            wire(model, layout, ranks.link(rank), returns, one_router=unlike)
        front = make_front(models, ranks, list(devices), layout.lead())
        if checkpoint.generation is not None:
            front.generation_config = copy.deepcopy(checkpoint.generation)
        cleanup.pop_all()
    return front


def _make_of(device: torch.device) -> str:
    """What a device is, so that alike ones round alike."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
