"""Trying a layout on a small model of the same type, before an unknown architecture is trusted with it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from tp_rs.errors import ModelError, TPError
from tp_rs.integrations.transformers.assemble import assemble, decide
from tp_rs.integrations.transformers.checkpoint import open_checkpoint
from tp_rs.integrations.transformers.splits import Splits
from tp_rs.integrations.transformers.twin import KV_HEADS, make_twin, shrunk_config, twin_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["TOLERANCE", "compare", "ensure", "steps"]

TOLERANCE = 1e-4
"""Largest difference of logits in float32, in standard deviations of the logits."""
_PROMPT = 13
_PADDING = 4
_STEPS = 3

_passed: set[tuple[str, int]] = set()
_lock = threading.Lock()


def ensure(kind: type[PreTrainedModel], config: PretrainedConfig, ranks: int) -> None:
    """Check a type once a process.

    Raises:
        ModelError: The ranks do not compute what the whole model does, or no small model of the type runs.
    """
    key = (f"{kind.__module__}.{kind.__name__}", ranks)
    with _lock:
        if key in _passed:
            return
    twin = _twin(kind, config)
    heads = getattr(twin.config.get_text_config(), "num_key_value_heads", None) or KV_HEADS
    kv = [heads - heads // 2, heads // 2] + [0] * (ranks - 2) if ranks > 1 else [heads]
    try:
        difference = compare(twin, kv)
    except TPError as error:
        message = f"{kind.__name__}: no known architecture, and a small one does not run over ranks: {error}"
        raise ModelError(message) from error
    if not difference <= TOLERANCE:
        message = (
            f"{kind.__name__}: no known architecture, and a small one over ranks gives other logits "
            f"(off by {difference:.1e} standard deviations, allowed {TOLERANCE:g}); run it unsharded"
        )
        raise ModelError(message)
    with _lock:
        _passed.add(key)


def _twin(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    failures = []
    kinds: list[Callable[[], PretrainedConfig]] = [
        lambda: shrunk_config(config),
        lambda: twin_config(type(config)),
    ]
    for make in kinds:
        try:
            model = make_twin(make(), kind)
            if all(torch.isfinite(logits).all() for logits in steps(model, *prompt(model))):
                return model
            failures.append("its logits are not finite")
        except Exception as error:  # noqa: BLE001  any failure of foreign code means: try the next
            failures.append(f"{type(error).__name__}: {error}")
    message = f"{kind.__name__}: no known architecture, and no small one can be tried: {'; '.join(failures)}"
    raise ModelError(message)


def prompt(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random sequences, the first padded on its left, and their mask."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary - 1, (2, _PROMPT))
    mask = torch.ones_like(ids)
    mask[0, :_PADDING] = 0
    return ids, mask


def steps(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The logits of a prompt and of a few tokens after it; padding left out."""
    with torch.no_grad():
        result = model(input_ids=ids, attention_mask=mask, use_cache=True)
        logits = [result.logits[mask.bool()]]
        for step in range(_STEPS):
            token = torch.full((ids.shape[0], 1), _PROMPT + step)
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            result = model(
                input_ids=token, attention_mask=mask, past_key_values=result.past_key_values, use_cache=True
            )
            logits.append(result.logits)
    return logits


def compare(model: PreTrainedModel, kv: Sequence[int]) -> float:
    """How far the logits over ranks are from the whole model's, in standard deviations of the logits.

    Args:
        model: A small model on the CPU.
        kv: KV heads of every rank; MLP and vocabulary are divided unevenly and over all.
    """
    ids, mask = prompt(model)
    whole = steps(model, ids, mask)
    config = model.config.get_text_config()
    splits = uneven(config, kv)
    checkpoint = open_checkpoint(model, torch.float32)
    skeleton, layout = decide(checkpoint, splits, len(kv))
    devices = [torch.device("cpu")] * len(kv)
    front = assemble(checkpoint, skeleton, layout, devices, one_router=False)
    try:
        own = steps(front, ids, mask)
    finally:
        front.unload()
    scale = whole[0].std().item()
    return max((one - other).abs().max().item() for one, other in zip(whole, own, strict=True)) / scale


def uneven(config: Any, kv: Sequence[int]) -> Splits:
    """Splits for a small model: these KV heads, everything else in unlike parts."""
    heads = getattr(config, "num_attention_heads", KV_HEADS)
    shares = [3, 2, 4, 1, 2, 3, 1, 2][: len(kv)]
    vocabulary = _spread(config.vocab_size, shares)
    return Splits.of(
        kv=kv,
        intermediate=[8 * share for share in shares],
        vocabulary=vocabulary,
        groups=max(heads // max(sum(kv), 1), 1),
    )


def _spread(total: int, shares: Sequence[int]) -> list[int]:
    parts = [total * share // sum(shares) for share in shares]
    parts[-1] += total - sum(parts)
    return parts
