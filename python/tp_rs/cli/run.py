"""`tp-rs run`."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import tp_rs
from tp_rs import _native
from tp_rs.cli import options
from tp_rs.cli.app import DOES_NOT_FIT, INTERRUPTED, OK, reported
from tp_rs.cli.plan import show

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tp_rs.cli.generation import Generated

__all__ = ["EXAMPLES", "command"]

EXAMPLES = """[bold]Examples[/bold]

Two ranks on the CPU, each with half of the memory that is free:

    tp-rs run model.gguf --devices cpu,cpu --prompt "The capital of France is"

Three ranks with 4, 2 and 1 GiB, and whether they say what the unsharded model says:

    tp-rs run ~/models/smollm2 --gpu-split 4,2,1 --prompt "Once upon a time" --check

Two ranks, the KV heads divided by hand, an instruction for a chat model:

    tp-rs run ~/models/smollm2 --devices cpu,cpu --kv 2,1 --chat --prompt "Why is the sky blue?"

[bold]Exit code[/bold]

0 after a run; 1 where the model does not fit or --check finds a difference; 2 where the input cannot be used;
130 after Ctrl-C.
"""


def command(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's folder in the format of transformers, or a GGUF file.")
    ],
    *,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the model goes on from.")],
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put the prompt into the tokenizer's chat template, as a user's turn."),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Tokens to generate. Left out: 128, or what the context has room for."
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Type of weights and activations. Left out: the checkpoint's own, float32 for GGUF."
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Run the unsharded model too, in float32, and compare all tokens and logits."
        ),
    ] = False,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0.0, help="Sample at this temperature; 0 takes the best token.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed for sampling.")] = None,
    gpu_split: options.GpuSplit = None,
    devices: options.Devices = None,
    speeds: options.Speeds = None,
    context: options.Context = None,
    chunk: options.Chunk = 2048,
    strategy: options.Strategy = "balanced",
    duplicate_kv: options.DuplicateKv = False,
    experts: options.Experts = "inside",
    kv: options.Kv = None,
    id_: options.Id = None,
    vc: options.Vc = None,
    rs: options.Rs = None,
    expert_counts: options.ExpertCounts = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print plan, text, speed, memory and check as one JSON object, at the end."
        ),
    ] = False,
) -> None:
    """Generate text with a model over unequal devices, and say how fast and in how much memory."""
    with reported():
        _combine(check=check, dtype=dtype, temperature=temperature, seed=seed)
        arguments = options.arguments(
            gpu_split=gpu_split,
            devices=devices,
            speeds=speeds,
            context=context,
            shares={"kv": kv, "id": id_, "vc": vc, "rs": rs, "experts": expert_counts},
        )
        needs(("torch", "transformers", *(("gguf",) if _is_gguf(model) else ())))
        if check and _is_gguf(model):
            needs(("accelerate",))
        held = "float32" if check else dtype
        plan, stored = _plan(
            model, held, arguments, chunk=chunk, strategy=strategy, duplicate_kv=duplicate_kv, experts=experts
        )
        if not as_json:
            show(plan)
        if not plan.fits:
            if as_json:
                typer.echo(json.dumps({"plan": plan.to_dict()}, indent=2))
            raise typer.Exit(DOES_NOT_FIT)

        from tp_rs.cli import generation, summary  # noqa: PLC0415 - they import torch and transformers

        request = generation.Request(
            model=model,
            plan=plan,
            dtype=held,
            prompt=prompt,
            chat=chat,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            check=check,
            stored_bytes=stored,
        )
        if not as_json:
            typer.echo()
        done = generation.run(request, write=None if as_json else _write)
        if as_json:
            typer.echo(json.dumps(summary.as_dict(plan, done), indent=2))
        else:
            typer.echo("\n\n" + summary.as_text(plan, done))
    raise typer.Exit(_code(done))


def needs(packages: Iterable[str]) -> None:
    """Refuse to go on without packages that are not installed.

    Raises:
        TPError: Some are missing; the message has the command that installs them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        message = f"not installed, and needed for this: {', '.join(missing)}; pip install {' '.join(missing)}"
        raise tp_rs.TPError(message)


def _combine(*, check: bool, dtype: str | None, temperature: float, seed: int | None) -> None:
    if check and dtype not in {None, "float32"}:
        message = f"--dtype: got {dtype} beside --check, which compares in float32; leave one of them out"
        raise tp_rs.InvalidInput(message)
    if check and temperature:
        message = (
            "--temperature: got it beside --check, which compares the best tokens; leave one of them out"
        )
        raise tp_rs.InvalidInput(message)
    if seed is not None and not temperature:
        message = "--seed: only sampling has a use for it; add --temperature, such as 0.8"
        raise tp_rs.InvalidInput(message)


def _plan(
    model: str, dtype: str | None, arguments: dict[str, Any], **settings: Any
) -> tuple[tp_rs.Plan, int]:
    """The plan of the model as it will be held, and the bytes of its weights as they will be read."""
    if arguments["devices"] is None and arguments["gpu_split"] is not None and not _gpus():
        arguments["devices"] = ["cpu"] * len(arguments["gpu_split"])
    stored = _native.ModelShape.from_path(model)
    gguf = stored.source == "gguf"
    if dtype is None:
        dtype = "float32" if gguf else _own_dtype(model)
    shape = stored
    # Weights that stay quantised are refused; the header's bytes are what they take.
    with suppress(tp_rs.InvalidInput):
        shape = stored.held_as(dtype)
    plan = tp_rs.plan(shape, cache="fp32" if dtype == "float32" else "fp16", **arguments, **settings)
    # Blocks of a GGUF file are decoded to float32 before they become anything else.
    return plan, stored.held_as("float32").total_bytes if gguf else stored.total_bytes


def _own_dtype(model: str) -> str:
    from tp_rs.integrations.transformers.checkpoint import open_checkpoint  # noqa: PLC0415 - imports torch

    return str(open_checkpoint(model).dtype).removeprefix("torch.")


def _is_gguf(model: str) -> bool:
    path = Path(model)
    return path.suffix == ".gguf" or (
        not (path / "config.json").exists() and len(list(path.glob("*.gguf"))) == 1
    )


def _gpus() -> bool:
    try:
        return bool(_native.cuda_devices())
    except tp_rs.CudaError:
        return False


def _write(text: str) -> None:
    typer.echo(text, nl=False)


def _code(done: Generated) -> int:
    if done.interrupted:
        return INTERRUPTED
    return DOES_NOT_FIT if done.comparison is not None and not done.comparison.agrees else OK
