"""The planner's face."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from tp_rs import _native
from tp_rs.devices import resolve
from tp_rs.errors import InvalidInput
from tp_rs.models import attention_footprint, shape_of

__all__ = ["integer_split", "plan"]

_log = logging.getLogger("tp_rs")


def plan(
    model: object,
    gpu_split: Iterable[float] | None = None,
    *,
    context: int | Literal["max"] | None = None,
    batch: int = 1,
    chunk: int = 2048,
    cache: str = "fp16",
    devices: Iterable[object] | None = None,
    speeds: Iterable[float] | None = None,
    strategy: str = "balanced",
    splits: Mapping[str, Sequence[int] | None] | None = None,
    duplicate_kv: bool = False,
    experts: str = "inside",
    weights: object = None,
) -> _native.Plan:
    """Plan how a model is divided over ranks, from its headers alone.

    Args:
        model: A checkpoint's folder, a GGUF or safetensors file, a config dict, a transformers config or
            model, an ExLlamaV2-like model or config, or a `ModelShape`.
        gpu_split: GiB that each rank may use in all, the framework's own context included. None takes what is
            free now on each device.
        context: Tokens a sequence, `"max"` for as many as fit, or None for the model's own limit up to 8192.
        batch: Sequences at once.
        chunk: Tokens of a prompt that are computed at once, over all sequences.
        cache: How keys and values are stored: `"fp32"`, `"fp16"`, `"8bit"`, `"q8"`, `"q6"` or `"q4"`. Plans
            with the last four are for servers that have such a cache; `tp_rs.load` refuses them.
        devices: The device of every rank; several ranks may share one. Left out, rank i is `cuda:i`; without
            `gpu_split` and without a GPU, one CPU rank.
        speeds: A number a rank in proportion to its speed (GB/s of its memory), from 1e-9 to 1e15. Left out,
            the devices' bandwidths where all are known, else all equal.
        strategy: `"balanced"` for the fastest split that fits, `"exllamav2"` for ExLlamaV2's own arithmetic.
        splits: Shares to keep to, one number a rank, in heads (`"kv"`), columns (`"id"`, `"rs"`), rows
            (`"vc"`) or whole experts (`"experts"`); what is left out is found.
        duplicate_kv: Whether ranks may keep copies of a KV head and share its query heads.
        experts: `"inside"` cuts every expert, `"whole"` gives each to one rank.
        weights: What weights become when they are loaded: `"float32"`, `"bfloat16"`, `"float16"`, `"float64"`
            or a torch dtype. None plans for them as the checkpoint stores them. Decoded weights take bytes of
            their own, and can be cut inside the blocks that quantised ones keep together.

    Returns:
        The plan. One that does not fit is returned all the same, with `fits` False and its `shortfall`;
        `require_fit()` turns that into `DoesNotFit`.

    Raises:
        InvalidInput: An argument cannot be used; the message names it.
        DoesNotFit: `context="max"` where not even one token fits.
        ModelError: The checkpoint is broken or cannot be split.
        FileNotFoundError: The path does not exist.
        CudaError: The driver failed when asked what is free.
    """
    _check_types(cache=cache, strategy=strategy, experts=experts)
    _check_flag("duplicate_kv", duplicate_kv)
    shares = _shares(splits)
    ranks = resolve(gpu_split, devices, speeds)
    shape = shape_of(model)
    if weights is not None:
        shape = shape.held_as(str(weights).removeprefix("torch."))
    _log.debug("planning %r over %s", shape, ranks)
    return _native.plan(
        shape,
        ranks,
        context=context,
        batch=batch,
        chunk=chunk,
        cache=cache,
        strategy=strategy,
        splits=shares,
        duplicate_kv=duplicate_kv,
        experts=experts,
        attention_footprint=attention_footprint(model) if strategy.lower() == "exllamav2" else None,
    )


def _shares(splits: object) -> dict[str, Sequence[int] | None] | None:
    if splits is None:
        return None
    if not isinstance(splits, Mapping):
        message = f'splits: got {splits!r}, wanted a dict such as {{"kv": [2, 1, 0]}}'
        raise InvalidInput(message)
    return dict(splits)


def integer_split(total: int, ratios: Iterable[float], minimum: int = 0) -> list[int]:
    """Divide `total` units in proportion to `ratios`, as ExLlamaV2 does.

    Largest remainders first; then shares below `minimum` become 0 and their units go, one by one, to the
    smallest share that is left.

    Raises:
        InvalidInput: A ratio is negative, infinite or NaN, they add up to 0, or there is none.
    """
    return _native.integer_split(total, ratios, minimum)


def _check_flag(argument: str, value: object) -> None:
    if not isinstance(value, bool):
        message = f"{argument}: got {value!r}, wanted True or False"
        raise InvalidInput(message)


def _check_types(**words: object) -> None:
    for argument, value in words.items():
        if not isinstance(value, str):
            message = f"{argument}: got {value!r}, wanted a string"
            raise InvalidInput(message)
