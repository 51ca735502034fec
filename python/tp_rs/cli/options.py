"""Options that several commands have, and what their text means."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import typer

import tp_rs

__all__ = ["arguments"]

_SPLIT = "Split by hand"

Model = Annotated[
    str, typer.Argument(help="A checkpoint's folder, a GGUF file, a safetensors file or a config.json.")
]
GpuSplit = Annotated[
    str | None,
    typer.Option(
        metavar="GIB,...", help="GiB that each rank may use. Left out: what is free on each device."
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        metavar="DEV,...", help="The device of each rank: cuda:0, cpu, ... Several ranks may share one."
    ),
]
Speeds = Annotated[
    str | None,
    typer.Option(
        metavar="N,...", help="Memory bandwidth of each rank in GB/s, or any numbers in proportion."
    ),
]
Context = Annotated[
    str | None,
    typer.Option(metavar="N|max", help="Tokens a sequence. Left out: the model's own limit, up to 8192."),
]
Chunk = Annotated[int, typer.Option(metavar="N", help="Tokens of a prompt that are computed at once.")]
Strategy = Annotated[
    Literal["balanced", "exllamav2"],
    typer.Option(help="The fastest split that fits, or ExLlamaV2's own arithmetic."),
]
DuplicateKv = Annotated[
    bool, typer.Option("--duplicate-kv", help="Let ranks keep copies of a KV head and share its query heads.")
]
Experts = Annotated[
    Literal["inside", "whole"], typer.Option(help="Cut every expert, or give each to one rank.")
]
Kv = Annotated[
    str | None, typer.Option(metavar="N,...", help="KV heads of each rank.", rich_help_panel=_SPLIT)
]
Id = Annotated[
    str | None,
    typer.Option("--id", metavar="N,...", help="Intermediate columns of each rank.", rich_help_panel=_SPLIT),
]
Vc = Annotated[
    str | None, typer.Option(metavar="N,...", help="Vocabulary rows of each rank.", rich_help_panel=_SPLIT)
]
Rs = Annotated[
    str | None, typer.Option(metavar="N,...", help="Residual columns of each rank.", rich_help_panel=_SPLIT)
]
ExpertCounts = Annotated[
    str | None,
    typer.Option(metavar="N,...", help="Experts of each rank, with --experts whole.", rich_help_panel=_SPLIT),
]


def arguments(
    *,
    gpu_split: str | None,
    devices: str | None,
    speeds: str | None,
    context: str | None,
    shares: dict[str, str | None],
) -> dict[str, Any]:
    """What `tp_rs.plan` takes, from the options' text; `shares` by the names that `splits` has.

    Raises:
        InvalidInput: A text is not what its option wants; the message names it.
    """
    splits = {
        key: _list(f"--{'expert-counts' if key == 'experts' else key}", text, int)
        for key, text in shares.items()
        if text is not None
    }
    return {
        "gpu_split": None if gpu_split is None else _list("--gpu-split", gpu_split, float),
        "devices": None if devices is None else [device.strip() for device in devices.split(",")],
        "speeds": None if speeds is None else _list("--speeds", speeds, float),
        "context": _context(context),
        "splits": splits or None,
    }


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
