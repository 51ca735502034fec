"""The table of a shape: what was measured, tokens a second, and how many times one GPU's that is."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["derive", "show"]

_WIDTH = 150
"""Columns of a table that goes into a file."""

_ROWS = {
    "products": "matrix products of a token alone, ms",
    "decode_512": "a token at context 512, ms",
    "tokens_per_second": "the same, tokens/s",
    "times_one_rank": "the same, times one rank",
    "decode_4096": "a token at context 4096, ms",
    "generate_512": "a token at 512 by generate(), ms",
    "prefill_2048": "prompt of 2048, ms",
    "prefill_128": "prompt of 128, ms",
    "record_seconds": "recording all of it, s",
    "host_microseconds": "host's work a token, us",
    "driver_microseconds": "of it the driver's, launching the graphs, us",
}


def derive(found: dict[str, dict[str, Any]], pairs: dict[str, str]) -> None:
    """Add what follows from what was measured.

    Args:
        found: Figures by column.
        pairs: Columns over several GPUs, with that of one GPU each is compared with.
    """
    for own in found.values():
        if "decode_512" in own:
            own["tokens_per_second"] = 1e3 / own["decode_512"]
    for column, one in pairs.items():
        if all("decode_512" in found.get(name, {}) for name in (column, one)):
            found[column]["times_one_rank"] = found[one]["decode_512"] / found[column]["decode_512"]


def show(name: str, found: dict[str, dict[str, Any]]) -> None:
    """Print the table of a shape, and what is missing in it below."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    table = Table(title=f"{name}, float16, random weights, batch 1")
    table.add_column("")
    for column in found:
        table.add_column(column, justify="right")
    for key, title in _ROWS.items():
        if any(key in own for own in found.values()):
            table.add_row(title, *(f"{own[key]:.2f}" if key in own else "" for own in found.values()))
    console.print(table)
    for column, own in found.items():
        if "failed" in own:
            console.print(f"{column}: {own['failed']}", markup=False)
        for reason in own.get("not_recorded", ()):
            console.print(f"{column}: runs without being recorded: {reason}", markup=False)
