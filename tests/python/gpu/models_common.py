"""What the tests of models on GPUs share: small random models, whole and over ranks of one GPU."""

from __future__ import annotations

import contextlib
import copy
import gc
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

from tp_rs.integrations.transformers import Splits, load, selfcheck
from tp_rs.integrations.transformers.twin import make_twin, twin_config

DEVICE = torch.device("cuda:0")
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


def over_ranks(model: Any, kv: list[int], **options: Any) -> Any:
    """The model over ranks that all are on the GPU, without recorded steps: they have tests of their own."""
    options = {"capture": False, **options}
    return load(model, plan=uneven(model, kv), devices=[DEVICE] * len(kv), check=False, **options)


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
    """The largest difference of two logits in standard deviations of theirs."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().std())


@contextlib.contextmanager
def limited(allowed: int) -> Any:
    """Let torch's allocator take no more than so many bytes."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(DEVICE)[1]
    torch.cuda.set_per_process_memory_fraction(allowed / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def settled() -> tuple[int, int]:
    """Bytes of torch's tensors on the GPU, and bytes that the driver has free; nothing is kept for later."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(DEVICE), torch.cuda.mem_get_info(DEVICE)[0]
