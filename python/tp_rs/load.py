"""The front door of running models."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from os import PathLike

    import torch
    from transformers import PreTrainedModel

    from tp_rs._native import Plan
    from tp_rs.integrations.transformers import SplitSource

__all__ = ["load"]

_NEEDED = ("torch", "transformers")
_EXTRA = "pip install 'tp_rs[transformers]'"


def load(
    model: str | PathLike[str] | PreTrainedModel,
    gpu_split: Iterable[float] | None = None,
    devices: Iterable[object] | None = None,
    *,
    context: int | Literal["max"] | None = None,
    cache: str | None = None,
    plan: Plan | SplitSource | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    check: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    capture: bool | None = None,
    warmup: Iterable[int] = (),
    compile: bool = False,  # noqa: A002  torch's word for it
) -> Any:
    """Load a causal language model over several ranks of this process.

    Every rank reads only its own part of the weights, on CUDA devices straight to its device. Several threads
    may load at once.

    Args:
        model: A checkpoint's folder, a GGUF file, or a transformers model on the CPU, which is copied and not
            changed.
        gpu_split: GiB that each rank may use. None takes what is free on each device.
        devices: The device of every rank: all on CUDA devices (`"cuda:0"`) or all `"cpu"`; several ranks may
            share one. Left out, rank i is `cuda:i`, and one CPU rank where no GPU is.
        context: Tokens a sequence, prompt and answer together; `"max"` for as many as fit, None for the
            plan's.
        cache: How keys and values are stored: as the model's dtype, which is `"fp16"` for float16 and
            bfloat16 and `"fp32"` for float32 and float64. None takes the right one. Quantised ones are for
            plans of servers that have such a cache, and refused here.
        plan: What `tp_rs.plan` made for this model, instead of `gpu_split`; or
            `tp_rs.integrations.transformers.Splits`, for splits without a plan.
        dtype: The dtype of weights and activations: float32, bfloat16, float16 or float64. None for the
            checkpoint's own, float32 for GGUF.
        force: Whether to load a plan that does not fit.
        check: Whether to compare a small random model of the type, over ranks and whole, first. None does so
            for types that are not known to work.
        progress: Called with a rank and the bytes that it has read so far, from the threads that read.
        capture: Whether greedy and sampled generations run in steps of fixed shapes, recorded as CUDA graphs.
            None does so where all ranks are on CUDA devices. On CPU ranks the same steps run unrecorded.
        warmup: Numbers of sequences, 1 to 8, whose steps are recorded now and not at the first generation.
        compile: Whether torch.compile fuses what lies between the matrix products of recorded steps. It takes
            up to a minute once and needs Triton.

    Returns:
        A model of its own transformers class, without weights of its own. Its `generate` and what comes with
        it is transformers'. Prompts longer than the plan's chunk are computed in chunks, where the layers
        allow it. On CUDA devices its work takes its place in the caller's current streams; it returns before
        that work is done, as torch's operations do. An error in a step is raised to the caller, and the model
        can be used again. Beside that it has `generate_fast(ids)`, a loop of its own with sampling on the
        device; `stream(prompt)`, which yields text; `plan`; `context`, the
        `TPContext` whose communicator the ranks use (None for splits without a plan); `context_limit`, the
        most tokens of a sequence; and `unload()`, which gives all memory back.

    Raises:
        InvalidInput: An argument cannot be used, or the plan was made for another model or a quantised cache.
        DoesNotFit: The plan does not fit, or a device ran out of memory while loading.
        ModelError: The model cannot be run over ranks; the message says why.
        FileNotFoundError: The path does not exist.
        ImportError: torch or transformers is missing or too old.
    """
    try:
        from tp_rs.integrations.transformers import load as load_model  # noqa: PLC0415  torch only when needed
    except ImportError as error:
        raise ImportError(_missing(error), name=error.name, path=error.path) from error
    return load_model(
        model,
        gpu_split,
        devices,
        context=context,
        cache=cache,
        plan=plan,
        dtype=dtype,
        force=force,
        check=check,
        progress=progress,
        capture=capture,
        warmup=warmup,
        compile=compile,
    )


def _missing(error: ImportError) -> str:
    found = []
    for name in _NEEDED:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    have = " and ".join(found)
    return f"tp_rs.load needs torch and transformers 5.17 or later, found {have}: {_EXTRA} ({error})"
