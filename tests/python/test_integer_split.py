from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tp_rs

RECORDED = Path(__file__).parent.parent / "data" / "reference_integer_split.jsonl"


def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]


def usable(case: dict[str, Any]) -> bool:
    ratios = case["ratios"]
    return (
        case["total"] >= 0
        and case["minimum"] >= 0
        and all(isinstance(ratio, (int, float)) and math.isfinite(ratio) and ratio >= 0 for ratio in ratios)
    )


def test_every_recorded_result_of_the_reference_is_matched() -> None:
    cases = [case for case in recorded() if usable(case) and case["exception"] is None]
    assert len(cases) > 500
    for case in cases:
        got = tp_rs.integer_split(case["total"], case["ratios"], case["minimum"])
        assert got == case["result"], case


def test_what_the_reference_crashes_on_or_gets_wrong_is_invalid_input() -> None:
    cases = [case for case in recorded() if not usable(case) or case["exception"] is not None]
    assert cases
    for case in cases:
        with pytest.raises(tp_rs.InvalidInput):
            tp_rs.integer_split(case["total"], case["ratios"], case["minimum"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0])
def test_a_ratio_that_cannot_be_used_is_named(bad: float) -> None:
    with pytest.raises(tp_rs.InvalidInput, match=r"ratios\[1\]"):
        tp_rs.integer_split(8, [1.0, bad, 1.0])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((-1, [1.0]), "total"),
        ((2**64, [1.0]), "total"),
        ((1.5, [1.0]), "total"),
        ((True, [1.0]), "total"),
        ((8, [1.0], -1), "minimum"),
        ((8, "12"), "ratios"),
        ((8, 3), "ratios"),
        ((8, [1.0, "x"]), r"ratios\[1\]"),
        ((8, [0.0, 0.0]), "add up to 0"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(arguments: tuple[Any, ...], name: str) -> None:
    with pytest.raises(tp_rs.InvalidInput, match=name):
        tp_rs.integer_split(*arguments)


@given(
    total=st.integers(0, 10**9),
    ratios=st.lists(st.floats(0, 1e9, allow_subnormal=False), min_size=1, max_size=9).filter(
        lambda ratios: sum(ratios) > 1e-3
    ),
    minimum=st.integers(0, 64),
)
def test_nothing_is_lost_and_small_shares_are_given_up(total: int, ratios: list[float], minimum: int) -> None:
    shares = tp_rs.integer_split(total, ratios, minimum)
    assert len(shares) == len(ratios)
    assert sum(shares) == total
    if any(share >= minimum for share in tp_rs.integer_split(total, ratios)):
        assert all(share == 0 or share >= minimum for share in shares)


@given(
    total=st.integers(0, 10**6),
    ratios=st.lists(st.integers(0, 10**6), min_size=1, max_size=9).filter(any),
)
def test_each_share_is_within_one_of_its_exact_part(total: int, ratios: list[int]) -> None:
    for share, ratio in zip(tp_rs.integer_split(total, ratios), ratios, strict=True):
        assert abs(share - Fraction(total * ratio, sum(ratios))) < 1 + Fraction(1, 10**6)
