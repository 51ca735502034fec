"""`tp-rs plan`."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

import tp_rs
from tp_rs import render
from tp_rs.cli import options
from tp_rs.cli.app import DOES_NOT_FIT, OK, reported

__all__ = ["EXAMPLES", "command", "show"]

EXAMPLES = """[bold]Examples[/bold]

What is free on this machine's devices, the largest context that fits:

    tp-rs plan ~/models/llama-3-8b --context max

Three GPUs that do not match, whether they are in this machine or not:

    tp-rs plan model.gguf --gpu-split 24,12,8 --speeds 936,504,448 --cache q8

Three ranks on the CPU, the KV heads divided by hand:

    tp-rs plan config.json --devices cpu,cpu,cpu --gpu-split 8,8,8 --kv 4,2,2

[bold]Exit code[/bold]

0 where the model fits, 1 where it does not, 2 where the input cannot be used.
"""


def command(
    model: options.Model,
    *,
    gpu_split: options.GpuSplit = None,
    devices: options.Devices = None,
    speeds: options.Speeds = None,
    context: options.Context = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences at once.")] = 1,
    chunk: options.Chunk = 2048,
    cache: Annotated[
        Literal["fp32", "fp16", "8bit", "q8", "q6", "q4"],
        typer.Option(
            help="How keys and values are stored. tp-rs run and tp_rs.load keep them as fp16 or fp32."
        ),
    ] = "fp16",
    weights: Annotated[
        Literal["float64", "float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="What weights become when they are loaded. Left out: they stay as they are stored."
        ),
    ] = None,
    strategy: options.Strategy = "balanced",
    duplicate_kv: options.DuplicateKv = False,
    experts: options.Experts = "inside",
    kv: options.Kv = None,
    id_: options.Id = None,
    vc: options.Vc = None,
    rs: options.Rs = None,
    expert_counts: options.ExpertCounts = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say how a model is divided over unequal devices and whether it fits, from its headers alone."""
    with reported():
        # DoesNotFit comes from here only where the largest context is asked for and not one token fits.
        plan = tp_rs.plan(
            model,
            batch=batch,
            chunk=chunk,
            cache=cache,
            weights=weights,
            strategy=strategy,
            duplicate_kv=duplicate_kv,
            experts=experts,
            **options.arguments(
                gpu_split=gpu_split,
                devices=devices,
                speeds=speeds,
                context=context,
                shares={"kv": kv, "id": id_, "vc": vc, "rs": rs, "experts": expert_counts},
            ),
        )
        if as_json:
            typer.echo(json.dumps(plan.to_dict(), indent=2))
        else:
            show(plan)
    raise typer.Exit(OK if plan.fits else DOES_NOT_FIT)


def show(plan: tp_rs.Plan) -> None:
    """Print a plan: with colours and bars on a terminal, as plain text elsewhere."""
    from rich.console import Console  # noqa: PLC0415 - --json must not wait for it

    console = Console(highlight=False)
    if console.is_terminal:
        render.show(plan, console)
    else:
        typer.echo(render.plain(plan))
