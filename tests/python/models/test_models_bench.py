"""What the benchmark of models does with its figures."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import models_on_gpu  # noqa: E402  torch and transformers may be missing
from decoding import shapes, tables  # noqa: E402


@pytest.fixture
def figures(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a card")
    return models_on_gpu.Figures(2, tmp_path / "figures.json")


def read(tmp_path):
    return json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))


def test_a_column_that_fails_leaves_the_others(tmp_path, figures):
    found = figures.begin("shape")
    figures.column(found, "first", lambda own: own.update(decode_512=8.0))
    assert read(tmp_path)["shape"] == {"first": {"decode_512": 8.0}}

    def fails(own):
        own["prefill_128"] = 2.0
        raise ValueError("on purpose")

    figures.column(found, "theirs", fails, own=False)
    assert not figures.failed
    figures.column(found, "second", fails)
    assert figures.failed
    figures.column(found, "third", lambda own: own.update(decode_512=5.0))
    assert read(tmp_path)["shape"] == {
        "first": {"decode_512": 8.0},
        "theirs": {"prefill_128": 2.0, "failed": "ValueError: on purpose"},
        "second": {"prefill_128": 2.0, "failed": "ValueError: on purpose"},
        "third": {"decode_512": 5.0},
    }


def test_steps_that_were_not_recorded_are_a_failure(figures):
    figures.column(figures.begin("shape"), "ours", lambda own: own.update(not_recorded=["on purpose"]))
    assert figures.failed


def test_ratios_are_those_of_the_same_kind():
    found = {"1": {"decode_512": 8.0}, "2": {"decode_512": 5.0}, "3": {}, "4": {"failed": "on purpose"}}
    tables.derive(found, {"2": "1", "3": "1", "1": "4"})
    assert found["2"] == {"decode_512": 5.0, "tokens_per_second": 200.0, "times_one_rank": 1.6}
    assert found["1"] == {"decode_512": 8.0, "tokens_per_second": 125.0}
    assert found["3"] == {}


def test_the_table_says_what_is_missing(capsys):
    tables.show("shape", {"ours": {"decode_512": 8.0}, "theirs": {"failed": "[no] memory"}})
    shown = capsys.readouterr().out
    assert "8.00" in shown
    assert "theirs: [no] memory" in shown
    assert "prompt of 2048" not in shown


@pytest.mark.parametrize("budgets", [(64.0, 64.0), models_on_gpu.TWO_TO_ONE])
def test_plans_of_two_gpus_fit_and_divide_as_they_should(budgets):
    plan = shapes.planned(shapes.LLAMA_8B, budgets)
    first, second = (rank.read_per_token for rank in plan.ranks)
    assert abs(first / second - budgets[0] / budgets[1]) < 0.1
    assert plan.context == shapes.CAPACITY
