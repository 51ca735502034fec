"""`load`: a transformers model over unequal devices, in one process."""

from __future__ import annotations

from contextlib import ExitStack
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.utils.import_utils import is_accelerate_available

from tp_rs._native import Plan
from tp_rs.context import TPContext
from tp_rs.errors import InvalidInput
from tp_rs.integrations.transformers import selfcheck
from tp_rs.integrations.transformers.assemble import Progress, assemble, decide
from tp_rs.integrations.transformers.cache_type import cache_of, check_cache
from tp_rs.integrations.transformers.capture import checked_batches
from tp_rs.integrations.transformers.captured import Room
from tp_rs.integrations.transformers.checkpoint import Checkpoint, open_checkpoint
from tp_rs.integrations.transformers.execution import timeout_of
from tp_rs.integrations.transformers.layout import Guesses
from tp_rs.integrations.transformers.room import require_free, require_room
from tp_rs.integrations.transformers.rules import warn_of_whole
from tp_rs.integrations.transformers.streams import give_back
from tp_rs.integrations.transformers.verified import VERIFIED
from tp_rs.plan import plan as make_plan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tp_rs.integrations.transformers.capture import Capture
    from tp_rs.integrations.transformers.splits import Split, SplitSource

__all__ = ["load"]

_SUMMED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def load(
    model: object,
    gpu_split: Iterable[float] | None = None,
    devices: Iterable[object] | None = None,
    *,
    context: int | Literal["max"] | None = None,
    cache: str | None = None,
    plan: SplitSource | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    check: bool | None = None,
    progress: Progress | None = None,
    capture: bool | None = None,
    warmup: Iterable[int] = (),
    compile: bool = False,  # noqa: A002  torch's word for it
) -> Any:
    """Load a causal language model over several ranks; `tp_rs.load` says more.

    Args:
        model: A checkpoint's folder, a GGUF file, or a transformers model on the CPU.
        gpu_split: GiB that each rank may use.
        devices: The device of every rank.
        context: Tokens a sequence, or "max" for as many as fit.
        cache: How keys and values are stored.
        plan: A plan made before, or `Splits`.
        dtype: The dtype of weights and activations.
        force: Load a plan that does not fit.
        check: Try the type on a small random model first.
        progress: Told of every rank's bytes as they are read.
        capture: Whether generations run in captured steps.
        warmup: Numbers of sequences whose steps are captured now.
        compile: Whether captured steps are compiled.

    Raises:
        InvalidInput: An argument cannot be used, or the plan was made for another model.
        DoesNotFit: The plan does not fit, or a device ran out of memory.
        ModelError: The model cannot be run over ranks; the message says why.
        FileNotFoundError: The path does not exist.
        ImportError: A package is missing that ranks on GPUs need.
    """
    if dtype is not None and dtype not in _SUMMED:
        message = (
            f"dtype: got {dtype}, wanted one that sums can be made in: float32, bfloat16, float16, float64"
        )
        raise InvalidInput(message)
    _check_choices(plan, gpu_split, capture)
    check_cache(cache, plan)
    batches = checked_batches(warmup)
    devices = None if devices is None else list(devices)
    checkpoint = open_checkpoint(model, dtype)
    _check_context(checkpoint, context, plan)
    # What is planned for; a model on the CPU is not kept.
    shape = model if isinstance(model, (str, PathLike)) else checkpoint.config
    if plan is None:
        plan = make_plan(
            shape,
            gpu_split,
            context=context,
            devices=devices,
            weights=checkpoint.dtype,
            cache=cache_of(checkpoint.dtype, cache),
        )
    places = _places(plan, devices, force=force)
    guesses = Guesses.ALL
    unknown = checkpoint.config.get_text_config().model_type not in VERIFIED
    if check or (check is None and unknown):
        idle = len(places) - len({rank for rank, _, _ in plan.q_split})
        guesses = selfcheck.ensure(checkpoint.kind, checkpoint.config, len(places), idle=idle)
    owner = None
    if isinstance(plan, Plan):
        owner = TPContext(
            shape,
            plan=plan,
            devices=[str(place) for place in places],
            timeout=timeout_of(places),
            force=force,
        )
    else:
        _check_splits(checkpoint, plan)
    skeleton, layout = decide(checkpoint, plan, len(places), guesses)
    require_room(checkpoint, skeleton, layout, plan, force=force)
    warn_of_whole(layout)
    with ExitStack() as cleanup:
        cleanup.callback(give_back, places)
        if owner is not None:
            owner.finalize()
            cleanup.callback(owner.unload)
        front = assemble(
            checkpoint,
            skeleton,
            layout,
            places,
            communicator=None if owner is None else owner.communicator,
            progress=progress,
        )
        cleanup.pop_all()
    give_back(places)
    runner = front.tp_rs_runner
    runner.plan, runner.context = plan, owner
    planned: int | None = getattr(plan, "context", None)
    runner.limit = context if isinstance(context, int) else planned
    runner.chunk = getattr(plan, "chunk", None)
    # Of a plan that does not fit, what is used may fit all the same.
    runner.reserves = not force
    runner.tokenizer_source = checkpoint.tokenizer
    _prepare(runner.capture, plan, runner.limit, capture=capture, compile=compile)
    try:
        runner.capture.warm(batches, runner.limit)
    except BaseException:
        front.unload()
        raise
    return front


def _check_choices(plan: object, gpu_split: object, capture: object) -> None:
    if plan is not None and not isinstance(plan, Plan) and not hasattr(plan, "rs_split"):
        message = f"plan: got a {type(plan).__name__}, wanted a tp_rs.Plan or Splits"
        raise InvalidInput(message)
    if capture is not None and not isinstance(capture, bool):
        message = f"capture: got {capture!r}, wanted True, False or None"
        raise InvalidInput(message)
    if plan is not None and gpu_split is not None:
        message = "gpu_split: got it beside plan, wanted one of them"
        raise InvalidInput(message)


def _prepare(
    captured: Capture,
    plan: SplitSource,
    limit: int | None,
    *,
    capture: bool | None,
    compile: bool,  # noqa: A002  as in `load`
) -> None:
    if capture is not None:
        captured.wanted = capture
    captured.compiled = compile
    captured.plan = plan
    captured.room = Room(
        tokens=(limit or 0) * int(getattr(plan, "batch", None) or 1),
        chunk=int(getattr(plan, "chunk", None) or Room().chunk),
    )


def _check_context(checkpoint: Checkpoint, context: Any, plan: SplitSource | None) -> None:
    if context is None or (context == "max" and plan is None):
        return
    most = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    whole = isinstance(context, int) and not isinstance(context, bool) and context >= 1
    if not whole or (isinstance(most, int) and context > most):
        message = (
            f'context: got {context!r}, wanted 1 to {most}, which {checkpoint.name} was made for, or "max" '
            "without a plan"
        )
        raise InvalidInput(message)
    planned = getattr(plan, "context", None)
    if isinstance(planned, int) and context > planned:
        message = f"context: got {context}, and the plan has room for {planned}; plan with context={context}"
        raise InvalidInput(message)


def _places(plan: SplitSource, devices: Iterable[object] | None, *, force: bool) -> list[torch.device]:
    count = 1 + max(
        rank for split in (plan.q_split, plan.id_split, plan.vc_split, plan.rs_split) for rank, _, _ in split
    )
    ranks = getattr(plan, "ranks", None)
    named = [each.device for each in ranks] if ranks is not None else ["cpu"] * count
    if devices is not None:
        named = list(devices)
    if len(named) < count:
        message = f"devices: got {len(named)}, and the plan is for {count} ranks"
        raise InvalidInput(message)
    places = [_place(name) for name in named]
    kinds = {place.type for place in places}
    if kinds == {"cpu"}:
        return places
    if kinds != {"cuda"}:
        got = ", ".join(map(str, places))
        message = (
            f"devices: got {got}, wanted all ranks on the CPU or all on CUDA devices: ranks of different "
            "kinds do not meet"
        )
        raise InvalidInput(message)
    _check_gpus(places)
    if not force:
        require_free(plan, places)
    return places


def _place(name: object) -> torch.device:
    try:
        place = torch.device("cuda", name) if isinstance(name, int) else torch.device(str(name))
    except RuntimeError as error:
        message = f'devices: got {name!r}, wanted "cpu" or "cuda:0", "cuda:1" and so on'
        raise InvalidInput(message) from error
    return torch.device("cuda", place.index or 0) if place.type == "cuda" else place


def _check_gpus(places: list[torch.device]) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = sorted({str(place) for place in places if (place.index or 0) >= count})
    if missing:
        seen = f"torch sees {count} of them" if count else "torch sees no GPU"
        message = f'devices: got {", ".join(missing)}, and {seen}; wanted devices that are there, or "cpu"'
        raise InvalidInput(message)
    if not is_accelerate_available():
        message = "ranks on GPUs need accelerate, which transformers loads with: pip install accelerate"
        raise ImportError(message)


def _check_splits(checkpoint: Checkpoint, plan: SplitSource) -> None:
    config = checkpoint.config.get_text_config()
    wanted = {
        "vc_split": getattr(config, "vocab_size", None),
        "q_split": getattr(config, "num_attention_heads", None),
    }
    for name, total in wanted.items():
        split: Split = getattr(plan, name)
        got = max((end for _, _, end in split), default=0)
        if isinstance(total, int) and got != total:
            message = (
                f"plan: its {name} covers {got}, and {checkpoint.name} has {total}; it was made for another "
                "model"
            )
            raise InvalidInput(message)
