"""A plan as text: tables, and a bar a rank of what fills its memory."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from tp_rs._native import Plan, RankPlan

__all__ = ["plain", "show"]

_MIB = 1 << 20
_GIB = 1 << 30

PLAIN_WIDTH = 80
"""Columns of a plan that is not printed on a terminal."""

_HEADERS = {
    "attention": "attn",
    "mlp": "mlp",
    "experts": "experts",
    "embedding": "embed",
    "head": "head",
    "replicated": "repl",
    "kv_cache": "cache",
    "activations": "activ",
    "logits": "logits",
    "communicator": "comm",
    "framework": "frame",
}


class _Group(NamedTuple):
    """Items that a bar shows as one."""

    label: str
    letter: str
    style: str
    items: tuple[str, ...]


_GROUPS = (
    _Group("attention", "A", "blue", ("attention",)),
    _Group("MLP", "M", "cyan", ("mlp",)),
    _Group("experts", "E", "bright_cyan", ("experts",)),
    _Group("embedding and head", "V", "magenta", ("embedding", "head")),
    _Group("held whole", "W", "bright_black", ("replicated",)),
    _Group("KV cache", "K", "green", ("kv_cache",)),
    _Group("activations and buffers", "B", "yellow", ("activations", "logits", "communicator")),
    _Group("framework", "F", "white", ("framework",)),
)


class _Unit(NamedTuple):
    name: str
    size: int
    decimals: int

    def show(self, size: int) -> str:
        return f"{size / self.size:.{self.decimals}f}"


class _Column(NamedTuple):
    header: str
    cells: list[str]
    text: bool = False

    @property
    def width(self) -> int:
        return max(len(self.header), *(len(cell) for cell in self.cells)) if self.cells else len(self.header)


def plain(plan: Plan, width: int = PLAIN_WIDTH) -> str:
    """The plan as plain text of at most `width` columns where its numbers allow it."""
    unit = _unit(plan)
    lines = [*_wrapped(_title(plan), width), *_wrapped(_settings(plan), width)]
    for block in _blocks(plan, unit, width):
        lines.append("")
        lines.extend(_plain_rows(block))
    lines.append("")
    lines.extend(_wrapped(_sizes(plan, unit), width))
    for text in [*_step(plan), *_widths(plan), *_notes(plan)]:
        lines.extend(_wrapped(text, width))
    lines.append("")
    for text in _verdict(plan, unit):
        lines.extend(_wrapped(text, width))
    return "\n".join(lines)


def show(plan: Plan, console: Console) -> None:
    """Print the plan on a terminal, with a bar a rank of what fills its memory."""
    from rich.table import Table  # noqa: PLC0415 - `import tp_rs` must not wait for it
    from rich.text import Text  # noqa: PLC0415

    unit = _unit(plan)
    width = console.width

    def write(text: str, style: str = "") -> None:
        for line in _wrapped(text, width):
            console.print(Text(line, style), no_wrap=True, overflow="ignore", crop=False)

    write(_title(plan), "bold")
    write(_settings(plan), "dim")
    for block in _blocks(plan, unit, width):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in block:
            table.add_column(column.header, justify="left" if column.text else "right", no_wrap=True)
        for cells in zip(*(column.cells for column in block), strict=True):
            table.add_row(
                *(
                    Text(cell, "bold red" if column.header == "free" and cell.startswith("-") else "")
                    for column, cell in zip(block, cells, strict=True)
                )
            )
        console.print()
        console.print(table)
    console.print()
    write(_sizes(plan, unit), "dim")
    console.print()
    for line in _bars(plan, unit, width, letters=console.no_color or console.color_system is None):
        text = Text()
        for part, style in line:
            text.append(part, style)
        console.print(text, no_wrap=True, overflow="ignore", crop=False)
    for text_ in [*_step(plan), *_widths(plan), *_notes(plan)]:
        write(text_, "dim")
    console.print()
    first, *rest = _verdict(plan, unit)
    write(first, "bold green" if plan.fits else "bold red")
    for text_ in rest:
        write(text_)


def _unit(plan: Plan) -> _Unit:
    # By what is used, not by the budgets: a small model on large devices has numbers to show too.
    largest = max((rank.total for rank in plan.ranks), default=0)
    return _Unit("GiB", _GIB, 2) if largest >= 2 * _GIB else _Unit("MiB", _MIB, 1)


def _size(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / _MIB:.1f} MiB"


def _title(plan: Plan) -> str:
    model = plan.model
    path = Path(model.name)
    # Every model's configuration has the same name; its folder's says which model it is.
    name = "/".join(path.parts[-2:]) if path.name == "config.json" else path.name
    return (
        f"{name or model.name}: {model.architecture}, {model.layers} layers, "
        f"{model.query_heads} query and {model.kv_heads} KV heads of {model.head_dim}, "
        f"{_size(model.weight_bytes)} of weights"
    )


def _settings(plan: Plan) -> str:
    return (
        f"context {plan.context}, batch {plan.batch}, prefill chunk {plan.chunk}, cache {plan.cache}, "
        f"strategy {plan.strategy}"
    )


def _sizes(plan: Plan, unit: _Unit) -> str:
    pinned = f"; {_size(plan.pinned_bytes)} of pinned host memory besides" if plan.pinned_bytes else ""
    return f"sizes in {unit.name}{pinned}"


def _blocks(plan: Plan, unit: _Unit, width: int) -> Iterator[list[_Column]]:
    """Two tables, who holds what and what it takes, each broken where the width ends."""
    ranks = plan.ranks
    keys = [
        _Column("rank", [str(rank.rank) for rank in ranks]),
        _Column("device", [rank.device for rank in ranks], text=True),
    ]
    shares = [
        _Column(name, _counts(split, len(ranks)))
        for name, split in (
            ("kv", plan.kv_split),
            ("q", plan.q_split),
            ("id", plan.id_split),
            ("vc", plan.vc_split),
            ("rs", plan.rs_split),
            ("experts", plan.experts_split),
        )
        if split is not None
    ]
    if len({rank.speed for rank in ranks}) > 1:
        shares.append(_Column("speed", [f"{rank.speed:g}" for rank in ranks]))
    sums = [
        _Column("total", [unit.show(rank.total) for rank in ranks]),
        _Column("budget", [unit.show(rank.budget) for rank in ranks]),
        _Column("free", [unit.show(rank.free) for rank in ranks]),
    ]
    used = {item for rank in ranks for item in rank.items}
    items = [
        _Column(header, [unit.show(rank.items[item]) if item in rank.items else "-" for rank in ranks])
        for item, header in _HEADERS.items()
        if item in used
    ]
    yield from _fold(keys, shares + sums, width)
    yield from _fold(keys[:1], items, width)


def _counts(split: Sequence[tuple[int, int, int]], ranks: int) -> list[str]:
    cells = ["-"] * ranks
    for rank, start, end in split:
        cells[rank] = str(end - start)
    return cells


def _fold(keys: list[_Column], columns: list[_Column], width: int) -> Iterator[list[_Column]]:
    gap = 2
    taken = sum(key.width + gap for key in keys) - gap
    block, used = list(keys), taken
    for column in columns:
        if used + gap + column.width > width and len(block) > len(keys):
            yield block
            block, used = list(keys), taken
        block.append(column)
        used += gap + column.width
    if len(block) > len(keys):
        yield block


def _plain_rows(block: list[_Column]) -> Iterator[str]:
    for row in [[column.header for column in block], *zip(*(column.cells for column in block), strict=True)]:
        cells = (
            cell.ljust(column.width) if column.text else cell.rjust(column.width)
            for column, cell in zip(block, row, strict=True)
        )
        yield "  ".join(cells).rstrip()


def _bars(plan: Plan, unit: _Unit, width: int, *, letters: bool) -> Iterator[list[tuple[str, str]]]:
    """A bar a rank, its full length the rank's budget, and the legend."""
    ranks = plan.ranks
    names = [f"{rank.rank} {rank.device}" for rank in ranks]
    ends = [_end(rank, unit) for rank in ranks]
    name_width = max((len(name) for name in names), default=0)
    length = max(10, width - name_width - max((len(end) for end in ends), default=0) - 4)
    seen: set[str] = set()
    for rank, name, end in zip(ranks, names, ends, strict=True):
        bar = list(_bar(rank, length, letters=letters))
        seen.update(style for _, style in bar)
        line = [(name.ljust(name_width) + " ", ""), ("▕", "dim"), *bar]
        line.extend([("▏", "dim"), (f" {end}", "bold red" if rank.free < 0 else "")])
        yield line
    line, taken = [(" " * (name_width + 1), "")], name_width + 1
    for group in _GROUPS:
        # What is too small to be drawn needs no explanation.
        if group.style not in seen:
            continue
        entry = f" {group.label}  "
        if taken + 1 + len(entry) > width:
            yield line
            line, taken = [(" " * (name_width + 1), "")], name_width + 1
        line.append((group.letter if letters else "█", group.style))
        line.append((entry, ""))
        taken += 1 + len(entry)
    yield line


def _end(rank: RankPlan, unit: _Unit) -> str:
    if rank.free < 0:
        return f"{unit.show(-rank.free)} {unit.name} too many"
    return f"{unit.show(rank.total)} of {unit.show(rank.budget)} {unit.name}"


def _bar(rank: RankPlan, length: int, *, letters: bool) -> Iterator[tuple[str, str]]:
    # A rank that needs more than its budget fills its bar; how much more is said behind it.
    whole = max(rank.budget, rank.total, 1)
    position, reached = 0, 0
    for group in _GROUPS:
        reached += sum(rank.items.get(item, 0) for item in group.items)
        until = min(length, round(reached / whole * length))
        if until > position:
            yield ((group.letter if letters else "█") * (until - position), group.style)
            position = until
    yield ("·" * (length - position), "dim")


def _widths(plan: Plan) -> list[str]:
    return [
        f"MLPs of width {width}: " + ", ".join(f"rank {rank} {end - start}" for rank, start, end in split)
        for width, split in plan.width_splits.items()
    ]


def _notes(plan: Plan) -> list[str]:
    return [f"note: {note}" for note in plan.notes]


def _step(plan: Plan) -> list[str]:
    if not plan.speeds_known:
        return ["speeds are not known: all ranks count as equally fast"] if len(plan.ranks) > 1 else []
    step = plan.step_time
    parts = f"attention {step.attention / 1e6:.2f}, MLP {step.mlp / 1e6:.2f}, head {step.head / 1e6:.2f}"
    return [f"a token waits {step.total / 1e6:.2f} ms for memory ({parts}) where speeds are in GB/s"]


def _verdict(plan: Plan, unit: _Unit) -> list[str]:
    shortfall = plan.shortfall
    longest = f"the largest context that fits is {plan.max_context} tokens"
    if shortfall is None:
        tightest = min(plan.ranks, key=lambda rank: rank.free)
        left = f"{unit.show(tightest.free)} {unit.name}"
        return [f"fits: rank {tightest.rank} ({tightest.device}) has the least left, {left}; {longest}"]
    # Rounded up: whoever frees as many MiB as are named must be done.
    missing = -(-shortfall.missing_bytes // _MIB)
    everywhere = -(-shortfall.missing_total_bytes // _MIB)
    more = f", {everywhere} MiB over all ranks" if everywhere > missing else ""
    where = f"rank {shortfall.rank} ({shortfall.device})"
    # Where no context fits, the advice says so.
    reach = f"; {longest}" if plan.max_context else ""
    return [
        f"does not fit: short by {missing} MiB on {where}{more}{reach}",
        f"what to do: {shortfall.advice}",
    ]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 20), subsequent_indent="  ", break_on_hyphens=False) or [""]
