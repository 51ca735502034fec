"""What the tests of models on GPUs share: small random models, whole on a GPU and over ranks of any."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from gpu_common import Place
from transformers import CONFIG_MAPPING

from tp_rs.integrations.transformers import Splits, load, selfcheck
from tp_rs.integrations.transformers.twin import make_twin, twin_config

DEVICE = torch.device("cuda:0")
"""Where whole models are, and what is given to models over ranks."""
ONE = Place(1)
"""All ranks on the first GPU."""
FIRST_RANK_BYTES = 96 << 20
"""Bytes of the framework's item that torch's allocator takes, for the first rank of a device.

An H100 process that ran out of memory in the middle of a prompt was at 1014 MiB, of which torch had 254. So
the context and the loaded kernels took 760 MiB, and of the item's 864 MiB 104 are torch's: workspaces of
matrix products, small tensors, and what the allocator rounds up.
"""
FURTHER_RANK_BYTES = 64 << 20
"""The same for every further rank there, whose item also counts what its stream adds to the context."""
TOLERANCE = selfcheck.TOLERANCE
TYPES = ["llama", "gemma3_text", "mixtral", "phi3", "qwen3_moe", "olmo2"]
"""Plain, sliding windows, experts, fused projections, experts with norms of heads, norms over a cut row."""


def made(architecture: str, **changes: Any) -> Any:
    """A small random model on the CPU, in float32."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return make_twin(twin_config(CONFIG_MAPPING[architecture], changes), seed=torch.seed() % 1000)


def whole(model: Any) -> Any:
    """A copy of it on the GPU."""
    return copy.deepcopy(model).to(DEVICE)


def uneven(model: Any, kv: list[int]) -> Splits:
    """Splits with these KV heads, and other shares of everything else."""
    splits: Splits = selfcheck.uneven(model.config.get_text_config(), kv)
    return splits


def over_ranks(model: Any, kv: list[int], place: Place = ONE, **options: Any) -> Any:
    """The model over ranks, without recorded steps: they have tests of their own."""
    options = {"capture": False, **options}
    return load(model, plan=uneven(model, kv), devices=place.devices(len(kv)), check=False, **options)


def prompt(model: Any, rows: int = 2, tokens: int = 13) -> dict[str, torch.Tensor]:
    """A batch with padding on the left of its first row."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (rows, tokens), device=DEVICE)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, :4] = 0
        ids[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of two logits in standard deviations of theirs, wherever ours are."""
    theirs = theirs.float()
    return float((ours.to(theirs.device).float() - theirs).abs().max() / theirs.std())


def assert_captured(front: Any, without: Iterable[bool] = ()) -> None:
    """Steps were recorded, and not run as they are for some reason: decoding (True) and prompts (False)."""
    steps = front.tp_rs_runner.capture.ready(1, 1)
    assert steps is not None
    assert set(steps.failures) <= set(without), steps.failures


def within(plan: Any) -> dict[str, int]:
    """Bytes of each GPU that a plan leaves to torch, without those of the driver and of the communicator."""
    allowed: dict[str, int] = {}
    for rank in plan.ranks:
        tensors = rank.total - rank.items["framework"] - rank.items.get("communicator", 0)
        own = FURTHER_RANK_BYTES if rank.device in allowed else FIRST_RANK_BYTES
        allowed[rank.device] = allowed.get(rank.device, 0) + tensors + own
    return allowed


@contextlib.contextmanager
def limited(allowed: Mapping[str, int]) -> Iterator[None]:
    """Let torch's allocator take no more than so many bytes of each of these GPUs, beside what it has."""
    torch.cuda.empty_cache()
    try:
        for device, count in allowed.items():
            # What the tests before have left there is none of a plan's.
            share = (torch.cuda.memory_reserved(device) + count) / torch.cuda.mem_get_info(device)[1]
            torch.cuda.set_per_process_memory_fraction(share, device)
        yield
    finally:
        for device in allowed:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def settled(place: Place = ONE) -> tuple[list[int], list[int]]:
    """Bytes of torch's tensors and bytes that the driver has free, on each GPU; nothing is kept for later."""
    gpus = range(place.gpus)
    gc.collect()
    for index in gpus:
        torch.cuda.synchronize(index)
    torch.cuda.empty_cache()
    tensors = [torch.cuda.memory_allocated(index) for index in gpus]
    return tensors, [torch.cuda.mem_get_info(index)[0] for index in gpus]


def above(now: Sequence[int], before: Sequence[int]) -> int:
    """The most bytes that any GPU has more than before."""
    return max(new - old for new, old in zip(now, before, strict=True))
