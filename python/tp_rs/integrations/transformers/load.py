"""From a checkpoint and a plan to a model that runs over ranks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, TextIteratorStreamer

from tp_rs.errors import InvalidInput, TPError
from tp_rs.integrations.transformers.checkpoint import Checkpoint, open_checkpoint
from tp_rs.integrations.transformers.collectives import ThreadCollectives
from tp_rs.integrations.transformers.communication import Collectives
from tp_rs.integrations.transformers.conversion import Conversion
from tp_rs.integrations.transformers.execution import Ranks
from tp_rs.integrations.transformers.front import make_front
from tp_rs.integrations.transformers.layout import Layout
from tp_rs.integrations.transformers.loader import load_rank, make_skeleton
from tp_rs.integrations.transformers.rules import make_layout
from tp_rs.integrations.transformers.sources import Counter
from tp_rs.integrations.transformers.splits import SplitSource
from tp_rs.integrations.transformers.stub import Returns
from tp_rs.integrations.transformers.wire import wire

__all__ = ["load_split"]

_log = logging.getLogger("tp_rs.transformers")


def load_split(
    model: object,
    splits: SplitSource,
    devices: Sequence[torch.device],
    *,
    dtype: torch.dtype | None = None,
    one_router: bool | None = None,
    collectives: Callable[[int], Collectives] = ThreadCollectives,
    progress: Callable[[int, int, int], None] | None = None,
) -> tuple[Any, Checkpoint, Layout, list[Counter]]:
    checkpoint = open_checkpoint(model, dtype)
    skeleton = make_skeleton(checkpoint.kind, checkpoint.config, checkpoint.dtype)
    layout = make_layout(skeleton, splits, len(devices))
    conversion = Conversion(skeleton, checkpoint.read(skeleton))
    counters = [Counter() for _ in devices]
    models: list[PreTrainedModel] = []
    for rank, device in enumerate(devices):
        models.append(load_rank(checkpoint, conversion, layout, rank, device, counters[rank]))
    ranks = Ranks(len(devices), collectives)
    returns: Returns = {}
    unlike = len({device.type for device in devices}) > 1 if one_router is None else one_router
    for rank, each in enumerate(models):
        wire(each, layout, ranks.link(rank), returns, one_router=unlike)
    front = make_front(models, ranks, list(devices), layout.lead())
    if checkpoint.generation is not None:
        front.generation_config = copy.deepcopy(checkpoint.generation)
    return front, checkpoint, layout, counters
