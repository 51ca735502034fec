"""`load`: a transformers model over unequal devices, in one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tp_rs.errors import InvalidInput
from tp_rs.integrations.transformers import selfcheck
from tp_rs.integrations.transformers.assemble import Progress, assemble, decide
from tp_rs.integrations.transformers.checkpoint import Checkpoint, open_checkpoint
from tp_rs.integrations.transformers.collectives import ThreadCollectives
from tp_rs.integrations.transformers.room import require_room
from tp_rs.integrations.transformers.verified import VERIFIED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tp_rs.integrations.transformers.communication import Collectives
    from tp_rs.integrations.transformers.splits import Split, SplitSource

__all__ = ["load"]

_SUMMED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def load(
    model: object,
    gpu_split: Iterable[float] | None = None,
    devices: Iterable[object] | None = None,
    *,
    context: int | None = None,
    plan: SplitSource | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    check: bool | None = None,
    progress: Progress | None = None,
    collectives: Callable[[int], Collectives] = ThreadCollectives,
) -> Any:
    """Load a causal language model over several ranks.

    Args:
        model: A checkpoint's folder, a GGUF file, or a transformers model on the CPU (it is not changed).
        gpu_split: GiB that each rank may use. None takes what is free on each device.
        devices: The device of every rank; several may share one.
        context: Tokens a sequence. None for the plan's.
        plan: A plan made before, instead of `gpu_split`.
        dtype: The dtype of weights and activations; None for the checkpoint's own.
        force: Load a plan that does not fit.
        check: Try the type on a small random model first. None tries the types that are not known to work.
        progress: Told of every rank's bytes as they are read.
        collectives: Makes the communicator between the ranks.

    Returns:
        A model of its own transformers class: `generate()` and all that comes with it, `stream(prompt)`,
        `unload()`, `plan` and `context`.

    Raises:
        InvalidInput: An argument cannot be used, or the plan was made for another model.
        DoesNotFit: The plan does not fit, or a device ran out of memory.
        ModelError: The model cannot be run over ranks; the message says why.
        FileNotFoundError: The path does not exist.
    """
    if dtype is not None and dtype not in _SUMMED:
        message = (
            f"dtype: got {dtype}, wanted one that sums can be made in: float32, bfloat16, float16, float64"
        )
        raise InvalidInput(message)
    checkpoint = open_checkpoint(model, dtype)
    limit = _limit(checkpoint, context)
    if plan is None:
        from tp_rs.plan import plan as make_plan  # noqa: PLC0415  its native half is not needed for a given plan

        shape = model if isinstance(model, (str,)) or hasattr(model, "__fspath__") else checkpoint.config
        plan = make_plan(shape, gpu_split, context=limit, devices=devices, weights=checkpoint.dtype)
    elif gpu_split is not None:
        message = "gpu_split: got it beside plan, wanted one of them"
        raise InvalidInput(message)
    if not force and hasattr(plan, "require_fit"):
        plan.require_fit()
    _check_plan(checkpoint, plan)
    places = _places(plan, devices)
    skeleton, layout = decide(checkpoint, plan, len(places))
    require_room(checkpoint, skeleton, layout, plan, force=force)
    unknown = checkpoint.config.get_text_config().model_type not in VERIFIED
    if check or (check is None and unknown):
        selfcheck.ensure(checkpoint.kind, checkpoint.config, len(places), collectives)
    front = assemble(checkpoint, skeleton, layout, places, collectives=collectives, progress=progress)
    runner = front.tp_rs_runner
    runner.plan = plan
    runner.context = context or getattr(plan, "context", None) or limit
    runner.tokenizer_source = checkpoint.tokenizer
    return front


def _limit(checkpoint: Checkpoint, context: int | None) -> int | None:
    most = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return None
    if context < 1 or (isinstance(most, int) and context > most):
        message = f"context: got {context}, wanted 1 to {most}, which {checkpoint.name} was made for"
        raise InvalidInput(message)
    return context


def _places(plan: SplitSource, devices: Iterable[object] | None) -> list[torch.device]:
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
    places = [torch.device(name) for name in named]
    others = sorted({str(place) for place in places if place.type != "cpu"})
    if others:
        message = f"devices: got {', '.join(others)}; this version runs models on CPU ranks"
        raise InvalidInput(message)
    return places


def _check_plan(checkpoint: Checkpoint, plan: SplitSource) -> None:
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
