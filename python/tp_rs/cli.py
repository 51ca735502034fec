"""The command `tp-rs`."""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated, Literal, TypeVar

import typer

import tp_rs
from tp_rs import render

__all__ = ["app", "main"]

FITS, DOES_NOT_FIT, BAD_INPUT = 0, 1, 2
"""Exit codes."""

app = typer.Typer(
    name="tp-rs",
    help="Tensor parallelism in one process, over devices that need not match.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EXAMPLES = """[bold]Examples[/bold]

What is free on this machine's devices, the largest context that fits:

    tp-rs plan ~/models/llama-3-8b --context max

Three GPUs that do not match, whether they are in this machine or not:

    tp-rs plan model.gguf --gpu-split 24,12,8 --speeds 936,504,448 --cache q8

Three ranks on the CPU, the KV heads divided by hand:

    tp-rs plan config.json --devices cpu,cpu,cpu --gpu-split 8,8,8 --kv 4,2,2

[bold]Exit code[/bold]

0 where the model fits, 1 where it does not, 2 where the input cannot be used.
"""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tp-rs {tp_rs.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell on stderr what is looked at and assumed.")
    ] = False,
) -> None:
    if verbose:
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")


_SPLIT = "Split by hand"


@app.command("plan", epilog=_EXAMPLES, no_args_is_help=True)
def _plan(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's folder, a GGUF file, a safetensors file or a config.json.")
    ],
    *,
    gpu_split: Annotated[
        str | None,
        typer.Option(
            metavar="GIB,...", help="GiB that each rank may use. Left out: what is free on each device."
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="DEV,...", help="The device of each rank: cuda:0, cpu, ... Several ranks may share one."
        ),
    ] = None,
    speeds: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Memory bandwidth of each rank in GB/s, or any numbers in proportion."
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(metavar="N|max", help="Tokens a sequence. Left out: the model's own limit, up to 8192."),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences at once.")] = 1,
    chunk: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a prompt that are computed at once.")
    ] = 2048,
    cache: Annotated[
        Literal["fp16", "8bit", "q8", "q6", "q4"], typer.Option(help="How keys and values are stored.")
    ] = "fp16",
    strategy: Annotated[
        Literal["balanced", "exllamav2"],
        typer.Option(help="The fastest split that fits, or ExLlamaV2's own arithmetic."),
    ] = "balanced",
    duplicate_kv: Annotated[
        bool,
        typer.Option("--duplicate-kv", help="Let ranks keep copies of a KV head and share its query heads."),
    ] = False,
    experts: Annotated[
        Literal["inside", "whole"], typer.Option(help="Cut every expert, or give each to one rank.")
    ] = "inside",
    kv: Annotated[
        str | None, typer.Option(metavar="N,...", help="KV heads of each rank.", rich_help_panel=_SPLIT)
    ] = None,
    id_: Annotated[
        str | None,
        typer.Option(
            "--id", metavar="N,...", help="Intermediate columns of each rank.", rich_help_panel=_SPLIT
        ),
    ] = None,
    vc: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Vocabulary rows of each rank.", rich_help_panel=_SPLIT),
    ] = None,
    rs: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Residual columns of each rank.", rich_help_panel=_SPLIT),
    ] = None,
    expert_counts: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Experts of each rank, with --experts whole.", rich_help_panel=_SPLIT
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say how a model is divided over unequal devices and whether it fits, from its headers alone."""
    counts = {"kv": kv, "id": id_, "vc": vc, "rs": rs, "experts": expert_counts}
    try:
        splits = {
            key: _list(f"--{'expert-counts' if key == 'experts' else key}", text, int)
            for key, text in counts.items()
            if text is not None
        }
        plan = tp_rs.plan(
            model,
            gpu_split=None if gpu_split is None else _list("--gpu-split", gpu_split, float),
            context=_context(context),
            batch=batch,
            chunk=chunk,
            cache=cache,
            devices=None if devices is None else [device.strip() for device in devices.split(",")],
            speeds=None if speeds is None else _list("--speeds", speeds, float),
            strategy=strategy,
            splits=splits or None,
            duplicate_kv=duplicate_kv,
            experts=experts,
        )
    except tp_rs.DoesNotFit as error:
        # Asked for the largest context where not even one token fits.
        typer.echo(f"tp-rs: {_sentence(error)}", err=True)
        raise typer.Exit(DOES_NOT_FIT) from error
    except (tp_rs.TPError, OSError) as error:
        typer.echo(f"tp-rs: {_sentence(error)}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    if as_json:
        typer.echo(json.dumps(plan.to_dict(), indent=2))
    else:
        _print(plan)
    raise typer.Exit(FITS if plan.fits else DOES_NOT_FIT)


def _print(plan: tp_rs.Plan) -> None:
    from rich.console import Console  # noqa: PLC0415 - --json must not wait for it

    console = Console(highlight=False)
    if console.is_terminal:
        render.show(plan, console)
    else:
        typer.echo(render.plain(plan))


def _context(text: str | None) -> int | Literal["max"] | None:
    if text is None:
        return None
    if text == "max":
        return "max"
    try:
        return int(text)
    except ValueError:
        message = f"--context: got {text!r}, wanted a number of tokens or max"
        raise tp_rs.InvalidInput(message) from None


_Number = TypeVar("_Number", bound=float)


def _list(option: str, text: str, kind: type[_Number]) -> list[_Number]:
    numbers = []
    for index, entry in enumerate(text.split(",")):
        try:
            numbers.append(kind(entry.strip()))
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            message = f"{option}[{index}]: got {entry!r}, wanted {what}, as in {option} 3,2,1"
            raise tp_rs.InvalidInput(message) from None
    return numbers


def _sentence(error: Exception) -> str:
    """One paragraph for a person at a terminal."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: no such file; MODEL is a file or folder on this machine"
    return " ".join(str(error).split())


def main() -> None:
    """Run the command."""
    app()
