"""Trying a layout on a small model of the same type, before an unknown architecture is trusted with it."""

from __future__ import annotations

import copy
import logging
import threading
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from tp_rs.errors import ModelError
from tp_rs.integrations.transformers.assemble import assemble, decide
from tp_rs.integrations.transformers.checkpoint import open_checkpoint
from tp_rs.integrations.transformers.layout import Guesses
from tp_rs.integrations.transformers.splits import Splits
from tp_rs.integrations.transformers.twin import KV_HEADS, SHAPES, make_twin, shrunk_config, twin_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PretrainedConfig, PreTrainedModel

    from tp_rs.integrations.transformers.checkpoint import Checkpoint
    from tp_rs.integrations.transformers.layout import Cut, Layout
    from tp_rs.integrations.transformers.sizes import Shape

__all__ = [
    "TOLERANCE",
    "Settled",
    "as_saved",
    "compare",
    "ensure",
    "find_twin",
    "prompt",
    "settle",
    "steps",
    "uneven",
]

TOLERANCE = 1e-4
"""Largest difference of logits in float32, in standard deviations of the logits."""
_PROMPT = 13
_PADDING = 4
_STEPS = 3
_STATES = ("past_key_values", "cache_params", "state")
"""What models call the memory that they return."""

# From the one that cuts most; what is left whole costs memory, a wrong guess the answer.
_GUESSES = (Guesses.ALL, Guesses.ATTENTIONS, Guesses.MLPS, Guesses.NOTHING)

_passed: dict[tuple[str, int, int], Guesses] = {}
_lock = threading.Lock()
_log = logging.getLogger("tp_rs.transformers")


def ensure(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    ranks: int,
    *,
    idle: int = 0,
) -> Guesses:
    """Check a type once a process, and say what of it may be cut by guess.

    Args:
        kind: The model's class.
        config: Its configuration; the small model makes the same choices where it can.
        ranks: How many there are.
        idle: Ranks that hold no heads.

    Raises:
        ModelError: The ranks do not compute what the whole model does, or no small model of the type runs.
    """
    key = (f"{kind.__module__}.{kind.__name__}", ranks, idle)
    with _lock:
        if key in _passed:
            return _passed[key]
    try:
        twin = _twin(kind, config)
    except ModelError as error:
        message = f"{kind.__name__}: no known architecture, and no small one can be tried: {error}"
        raise ModelError(message) from error
    heads = getattr(twin.config.get_text_config(), "num_key_value_heads", None) or KV_HEADS
    # More ranks than the small model has heads leave some without.
    busy = max(ranks - idle, 1)
    kv = [heads // busy + (rank < heads % busy) for rank in range(busy)] + [0] * (ranks - busy)
    settled = settle(twin, [kv])
    if settled.reason:
        _log.warning("%s: %s", kind.__name__, settled.reason)
    with _lock:
        _passed[key] = settled.guesses
    return settled.guesses


@dataclass(frozen=True)
class Settled:
    """What a trial found."""

    guesses: Guesses
    """What may be cut without a plan that names it."""
    difference: float
    """How far the logits are off then, in standard deviations of the logits."""
    reason: str
    """What stays whole that a rule would cut, and why. Empty where nothing does."""


def settle(twin: PreTrainedModel, shares: Sequence[Sequence[int]]) -> Settled:
    """What may be cut by guess so that a small model over ranks gives the logits that it gives whole.

    Args:
        twin: The small model.
        shares: KV heads of every rank, for each way to divide them.

    Raises:
        ModelError: Even without guesses the logits are others.
    """
    failures: list[str] = []
    seen: list[dict[str, Cut]] = []
    for guesses in _GUESSES:
        try:
            cuts = _decided(twin, shares[0], guesses)[1].cuts
            if cuts in seen:
                continue
            seen.append(cuts)
            difference = max(_off(twin, kv, guesses) for kv in shares)
        except Exception as error:  # noqa: BLE001  a wrong layout fails anywhere in foreign code
            failures.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        if difference <= TOLERANCE:
            return Settled(guesses, difference, _reason(guesses, failures))
        failures.append(f"the logits are off by {difference:.1e} standard deviations")
    message = (
        f"{type(twin).__name__}: a small one over ranks does not give the logits that it gives whole: "
        f"{failures[-1]} (allowed {TOLERANCE:g}); run it unsharded"
    )
    raise ModelError(message)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a model in another dtype."""
    copied: Any = copy.deepcopy(model)
    # Grouped products of experts take no float64.
    copied.set_experts_implementation("eager")
    made: PreTrainedModel = copied.to(dtype)
    return made


def as_saved(model: PreTrainedModel, dtype: torch.dtype) -> Checkpoint:
    """A checkpoint that has a tied parameter once, as a file does."""
    checkpoint = open_checkpoint(model, dtype)
    tied = getattr(model, "all_tied_weights_keys", {})
    return replace(
        checkpoint,
        read=lambda skeleton: {
            name: source for name, source in checkpoint.read(skeleton).items() if name not in tied
        },
    )


def _decided(model: PreTrainedModel, kv: Sequence[int], guesses: Guesses) -> tuple[PreTrainedModel, Layout]:
    splits = uneven(model.config.get_text_config(), kv)
    return decide(open_checkpoint(model, model.dtype), splits, len(kv), guesses)


def _off(twin: PreTrainedModel, kv: Sequence[int], guesses: Guesses) -> float:
    difference = compare(twin, kv, guesses)
    if difference <= TOLERANCE:
        return difference
    # Random weights can make a model that enlarges rounding errors; a wrong layout is wrong in float64 too.
    return min(difference, compare(twin, kv, guesses, torch.float64))


def _reason(guesses: Guesses, failures: list[str]) -> str:
    if not failures:
        return ""
    kinds = ((Guesses.ATTENTIONS, "attentions"), (Guesses.MLPS, "MLPs"))
    left = " and ".join(word for guess, word in kinds if not guesses & guess)
    return f"{left} that no plan names stay whole, since cut by the rules: {failures[0]}"


def _twin(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    try:
        return find_twin(lambda shape: shrunk_config(config, shape), kind)
    except ModelError:
        # A choice that depends on a size which stayed large.
        return find_twin(lambda shape: twin_config(type(config), shape=shape), kind)


def find_twin(
    make: Callable[[Shape], PretrainedConfig], kind: type[PreTrainedModel] | None = None, seed: int = 0
) -> PreTrainedModel:
    """A small model that runs whole: of the first shape of heads that its type can have.

    One that takes a single token only from `generate` is run without a cache.

    Args:
        make: Makes a small configuration with heads of a shape.
        kind: The model's class; left out, the one that transformers has for the configuration.
        seed: For its weights.

    Raises:
        ModelError: No small model of the type runs, with what each of them failed of.
    """
    failures: list[str] = []
    for cached, shape in product((True, False), SHAPES):
        try:
            model = make_twin(make(shape), kind, seed)
            _use_cache(model, cached)
            if all(torch.isfinite(logits).all() for logits in steps(model, *prompt(model))):
                return model
            failures.append("its logits are not finite")
        except Exception as error:  # noqa: BLE001  any failure of foreign code means: try the next
            lines = str(error).strip().splitlines() or [""]
            failures.append(f"{type(error).__name__}: {lines[0]}")
    message = f"no small model of it runs unsharded: {'; '.join(dict.fromkeys(failures))}"
    raise ModelError(message)


def _use_cache(model: PreTrainedModel, cached: bool) -> None:
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "use_cache", None) is not None:
            config.use_cache = cached


def prompt(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random sequences, the first padded on its left, and their mask."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary - 1, (2, _PROMPT))
    mask = torch.ones_like(ids)
    mask[0, :_PADDING] = 0
    return ids, mask


def steps(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The logits of a prompt and of a few tokens after it; padding left out.

    A model without a cache is given all tokens again at every step.
    """
    cached = getattr(model.config, "use_cache", True)
    with torch.no_grad():
        result = model(input_ids=ids, attention_mask=mask, use_cache=cached)
        logits = [result.logits[mask.bool()]]
        for step in range(_STEPS):
            token = ids.new_full((ids.shape[0], 1), _PROMPT + step)
            ids = torch.cat([ids, token], dim=1)
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            kept = {name: result[name] for name in _STATES if cached and result.get(name) is not None}
            result = model(input_ids=token if kept else ids, attention_mask=mask, use_cache=cached, **kept)
            logits.append(result.logits[:, -1:])
    return logits


def compare(
    model: PreTrainedModel,
    kv: Sequence[int],
    guesses: Guesses = Guesses.ALL,
    dtype: torch.dtype = torch.float32,
) -> float:
    """How far the logits over ranks are from the whole model's, in standard deviations of the logits.

    Args:
        model: A small model on the CPU.
        kv: KV heads of every rank; MLP and vocabulary are divided unevenly and over all.
        guesses: What may be cut that no plan names.
        dtype: Of weights and activations.
    """
    if model.dtype != dtype:
        model = in_dtype(model, dtype)
    ids, mask = prompt(model)
    whole = steps(model, ids, mask)
    skeleton, layout = _decided(model, kv, guesses)
    checkpoint = as_saved(model, dtype)
    front = assemble(checkpoint, skeleton, layout, [torch.device("cpu")] * len(kv), one_router=False)
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
