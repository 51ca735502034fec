from __future__ import annotations

import io
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import tp_rs
from tp_rs import render

MIB = 1 << 20
GIB = 1 << 30


def blocks(text: str) -> list[list[dict[str, str]]]:
    """The tables of a plan's text, a dict a row."""
    tables: list[list[dict[str, str]]] = []
    rows = [line.split() for line in text.splitlines()]
    for row in rows:
        if row[:1] == ["rank"]:
            tables.append([])
            header = row
        elif tables and len(row) == len(header) and row[0].isdigit():
            tables[-1].append(dict(zip(header, row, strict=True)))
    return tables


def merged(text: str) -> list[dict[str, str]]:
    ranks: dict[str, dict[str, str]] = {}
    for table in blocks(text):
        for row in table:
            ranks.setdefault(row["rank"], {}).update(row)
    return list(ranks.values())


def number(cell: str) -> float:
    return 0.0 if cell == "-" else float(cell)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    budgets=st.lists(st.floats(0.01, 200), min_size=1, max_size=16),
    width=st.integers(40, 200),
    context=st.integers(1, 4096),
)
def test_the_numbers_of_the_table_are_the_plans_and_add_up(
    config: dict[str, Any], budgets: list[float], width: int, context: int
) -> None:
    plan = tp_rs.plan(config, budgets, devices=["cpu"] * len(budgets), context=context)
    text = render.plain(plan, width)
    assert max(len(line) for line in text.splitlines()) <= width
    rows = merged(text)
    assert len(rows) == len(budgets)
    unit, half = (GIB, 0.0051) if "sizes in GiB" in text else (MIB, 0.051)
    for row, rank in zip(rows, plan.ranks, strict=True):
        assert row["device"] == rank.device
        assert number(row["total"]) == pytest.approx(rank.total / unit, abs=half)
        assert number(row["budget"]) == pytest.approx(rank.budget / unit, abs=half)
        assert number(row["free"]) == pytest.approx(rank.free / unit, abs=half)
        items = [
            "attn",
            "mlp",
            "experts",
            "embed",
            "head",
            "repl",
            "cache",
            "activ",
            "logits",
            "comm",
            "frame",
        ]
        shown = [number(row[item]) for item in items if item in row]
        assert sum(shown) == pytest.approx(rank.total / unit, abs=half * len(shown))
    for column, total in (
        ("kv", "num_key_value_heads"),
        ("q", "num_attention_heads"),
        ("id", "intermediate_size"),
    ):
        assert sum(number(row[column]) for row in rows) == config[total]


def test_columns_are_aligned(config: dict[str, Any]) -> None:
    text = render.plain(tp_rs.plan(config, [12.0, 3.0, 1.5], devices=["cpu"] * 3))
    tables = re.findall(r"^ *rank .*(?:\n *\d .*)+", text, flags=re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        header, *rows = table.splitlines()
        ends = {match.end() for match in re.finditer(r"\S+", header)}
        for row in rows:
            numeric = {m.end() for m in re.finditer(r"\S+", row) if m.group() != "cpu"}
            assert numeric <= ends


def test_str_and_repr_are_the_table(config: dict[str, Any]) -> None:
    plan = tp_rs.plan(config, [2.0, 1.0], devices=["cpu", "cpu"])
    assert str(plan) == repr(plan) == render.plain(plan)


def test_the_verdict_is_in_plain_words(config: dict[str, Any]) -> None:
    fits = tp_rs.plan(config, [2.0, 1.0], devices=["cpu", "cpu"])
    assert f"the largest context that fits is {fits.max_context} tokens" in " ".join(str(fits).split())
    lacks = tp_rs.plan(config, [0.05, 0.02], devices=["cpu", "cpu"])
    shortfall = lacks.shortfall
    assert shortfall is not None
    mib = -(-shortfall.missing_bytes // MIB)
    text = " ".join(str(lacks).split())
    assert f"does not fit: short by {mib} MiB on rank {shortfall.rank} (cpu)" in text
    assert " ".join(shortfall.advice.split()) in text


@pytest.mark.parametrize("width", [60, 80, 132])
@pytest.mark.parametrize("budgets", [[2.0, 0.8, 0.4], [0.05, 0.02, 0.01]])
def test_a_terminal_gets_a_bar_a_rank_within_its_width(
    config: dict[str, Any], budgets: list[float], width: int
) -> None:
    plan = tp_rs.plan(config, budgets, devices=["cpu"] * 3)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, no_color=True, width=width, legacy_windows=False)
    render.show(plan, console)
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    bars = re.findall(r"▕(.*)▏", text)
    assert len(bars) == 3
    assert len({len(bar) for bar in bars}) == 1
    for bar, rank in zip(bars, plan.ranks, strict=True):
        filled = len(bar) - bar.count("·")
        assert filled == pytest.approx(len(bar) * min(1.0, rank.total / rank.budget), abs=1)
        for letter in set(bar) - {"·"}:
            assert re.search(rf"{letter} [a-zA-Z]", text.partition("▏")[2]), f"{letter} is not in the legend"
    assert ("too many" in text) == (not plan.fits)


def test_colours_are_used_only_where_they_are_wanted(config: dict[str, Any]) -> None:
    plan = tp_rs.plan(config, [2.0], devices=["cpu"])
    coloured, plain = io.StringIO(), io.StringIO()
    render.show(plan, Console(file=coloured, force_terminal=True, color_system="standard", width=80))
    render.show(plan, Console(file=plain, force_terminal=True, no_color=True, width=80))
    assert "\x1b[34m█" in coloured.getvalue()
    assert "\x1b[34m" not in plain.getvalue()
    assert "A attention" in plain.getvalue()
