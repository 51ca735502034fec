"""Tables, as text and as Markdown, and a picture."""

from __future__ import annotations

import importlib.util
import json
import statistics
from typing import TYPE_CHECKING, Any

from . import catalogue as names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

KIB = 1024
MIB = 1024 * KIB
ABOVE_WHICH_NO_DECIMALS = 100.0
ABOVE_WHICH_NO_HUNDREDTHS = 10.0


def save(folder: Path, name: str, document: Mapping[str, Any]) -> None:
    """Write a JSON file, and the folder if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(document, indent=1), encoding="utf-8")


class Result:
    """All rounds of one candidate at one size, or why there is none."""

    def __init__(self, candidate: names.Candidate, rows: int) -> None:
        self.candidate = candidate
        self.rows = rows
        self.rounds: list[float] = []
        self.missing: str | None = None

    @property
    def median(self) -> float | None:
        """Microseconds; None where nothing was measured."""
        return statistics.median(self.rounds) if self.rounds else None

    def as_dict(self) -> dict[str, Any]:
        """For the file."""
        entry = {**self.candidate._asdict(), "rows": self.rows, "bytes": self.rows * names.COLUMNS * 2}
        return {**entry, "us": self.median, "rounds_us": self.rounds, "missing": self.missing}


class Table:
    """A title, the head of every column, and lines of cells; notes say what is missing."""

    def __init__(self, title: str, head: list[str]) -> None:
        self.title = title
        self.head = head
        self.lines: list[list[str]] = []
        self.notes: list[str] = []

    def text(self) -> str:
        """Columns under each other."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.lines, strict=True)]
        rows = [self.title]
        for line in (self.head, *self.lines) if self.lines else ():
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            rows.append("  " + "  ".join(cells).rstrip())
        return "\n".join([*rows, *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        """For docs/."""
        lines = [[self.title, *self.head[1:]], ["---"] * len(self.head), *self.lines]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines) if self.lines else self.title
        return table + "".join(f"\n\n{note}" for note in self.notes)


def size_of(rows: int) -> str:
    """Rows and what they take."""
    size = rows * names.COLUMNS * 2
    return f"{rows} ({size // MIB} MiB)" if size >= MIB else f"{rows} ({size // KIB} KiB)"


def number(value: float) -> str:
    """With as many places as say something."""
    if value >= ABOVE_WHICH_NO_DECIMALS:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= ABOVE_WHICH_NO_HUNDREDTHS else f"{value:.2f}"


def _cell(value: float | None, ours: float | None, *, is_ours: bool) -> str:
    if value is None:
        return "-"
    if is_ours or ours is None:
        return number(value)
    return f"{number(value)} ({value / ours:.2f}x)"


def tables(results: Iterable[Result]) -> list[Table]:
    """One for each operation, mode and access; in brackets how many times as long as ours a rival takes."""
    groups: dict[tuple[str, str, str], dict[str, dict[int, Result]]] = {}
    for result in results:
        lines = groups.setdefault(result.candidate.table(), {})
        lines.setdefault(result.candidate.name, {})[result.rows] = result
    made = []
    for (operation, mode, access), lines in groups.items():
        rows = sorted({row for line in lines.values() for row in line})
        how = (
            f"{mode}, {access}"
            if mode != names.HOST
            else f"{mode}" + (f", {access}" if access == names.STAGED else "")
        )
        table = Table(f"{operation}, {how}, us", ["", *map(size_of, rows)])
        ours = {row: result.median for row, result in lines.get(names.OURS, {}).items()}
        for name, line in lines.items():
            values = {row: line[row].median if row in line else None for row in rows}
            missing = dict.fromkeys(line[row].missing for row in rows if row in line and line[row].missing)
            if any(value is not None for value in values.values()):
                cells = [_cell(values[row], ours.get(row), is_ours=name == names.OURS) for row in rows]
                table.lines.append([name, *cells])
            table.notes += [f"{name}: not measured: {reason}" for reason in missing]
        if table.lines or table.notes:
            made.append(table)
    return made


def bandwidths(results: Iterable[Result]) -> Table | None:
    """Gathers to the host in GB/s, beside what the links allow."""
    chosen = [
        result
        for result in results
        if result.candidate.operation in {names.GATHER_HOST, names.GATHER_ONE} and result.median is not None
    ]
    if not chosen:
        return None
    rows = sorted({result.rows for result in chosen})
    table = Table("to pinned host memory, GB/s", ["", *map(size_of, rows)])
    lines: dict[str, dict[int, float]] = {}
    for result in chosen:
        where = "from one GPU" if result.candidate.operation == names.GATHER_ONE else "from all ranks"
        line = lines.setdefault(f"{result.candidate.name}, {where}", {})
        line[result.rows] = result.rows * names.COLUMNS * 2 / (result.median or 1.0) / 1e3
    for name, line in lines.items():
        table.lines.append([name, *(number(line[row]) if row in line else "-" for row in rows)])
    return table


def launches(results: Sequence[Result], measured: Mapping[str, float]) -> Table | None:
    """The host time of a call from Python over that of bare launches through the same driver calls."""
    calls = {
        result.candidate.name: result.median
        for result in results
        if result.candidate.operation == names.CALL and result.candidate.access == names.PEERS
    }
    ours = calls.get(names.OURS)
    if ours is None or not measured:
        return None
    table = Table("host time, us", ["", "us", "all_reduce from Python over it"])
    for name, value in measured.items():
        table.lines.append(
            [name.removesuffix("_us").replace("_", " "), number(value), f"{ours / value:.2f}x"]
        )
    return table


def heading(about: Mapping[str, Any]) -> list[str]:
    """Where and how all of it was measured."""
    cards = ", ".join(about["cards"])
    versions = (
        f"driver {about['driver']}, torch {about['torch']}, NCCL {about['nccl']}, tp_rs {about['tp_rs']}"
    )
    how = (
        f"float16 rows of {names.COLUMNS}; medians of {about['rounds']} rounds that take turns; every "
        "operation works on the same tensors again and again (warm in L2 where they fit); in brackets: over "
        "tp_rs's time"
    )
    where = f"ranks on {', '.join(about['devices'])}"
    return [f"{cards}; {where}; {versions}; {about['date']}", about["command"], how]


def plot(results: Sequence[Result], path: Path) -> str | None:
    """Sums in a graph over size. Returns why there is no picture."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no picture: matplotlib is not installed"
    import matplotlib as mpl  # noqa: PLC0415  only for those who want the picture

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for place, access in zip(axes, (names.PEERS, names.STAGED), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for result in results:
            if result.candidate.table() == (names.ALL_REDUCE, names.GRAPH, access) and result.median:
                point = (result.rows * names.COLUMNS * 2, result.median)
                lines.setdefault(result.candidate.name, []).append(point)
        for name, points in lines.items():
            place.plot(*zip(*points, strict=True), marker="o", label=name)
        place.set(xscale="log", yscale="log", xlabel="bytes a rank", title=f"all_reduce in a graph, {access}")
        place.set_ylabel("microseconds")
        if lines:
            place.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return None
