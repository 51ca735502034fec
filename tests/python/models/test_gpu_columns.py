"""The command that fills the columns of GPUs, on CPU ranks; its processes; and how the columns are merged."""

import json
import random
import re
import sys
from pathlib import Path

import gpu_columns
import misbehaving
import pytest
import torch
import try_on_gpu
from on_devices import trials
from workers import Workers

from tp_rs.integrations.transformers import rules_mlp, selfcheck
from tp_rs.integrations.transformers.captured import Captured

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "architectures.md"
MADE = {"device": "Card 9", "torch": "2.11.0", "transformers": "5.17.0", "date": "2026-01-02", "seconds": 5}


def outcomes(name):
    return dict(trials(name, "cpu"))


@pytest.mark.filterwarnings("ignore")
def test_types_that_are_right():
    for name in ("llama", "gpt2"):
        for found in outcomes(name).values():
            assert set(found) == {"outcome", "difference"}
            assert found["outcome"] == "right"
            assert 0 <= found["difference"] <= selfcheck.TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_types_without_steps_and_with_other_heads():
    found = outcomes("mamba")
    assert found["eager"]["outcome"] == "right"
    assert found["captured"]["outcome"] == "not captured"
    assert "keeps more than keys and values" in found["captured"]["reason"]
    # Its heads cannot share three of keys and values.
    assert outcomes("codegen")["eager"]["outcome"] == "right"


@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_is_called_wrong(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rules_mlp, "_halves", lambda own, _total: own + own)
        for found in outcomes("phi3").values():
            assert found["outcome"] == "wrong"
            assert "logits are off by" in found["reason"]
    # Steps that forget what their last one was for.
    logits = Captured.logits
    monkeypatch.setattr(Captured, "logits", lambda self, batch: torch.roll(logits(self, batch), 1, -1))
    found = outcomes("phi3")
    assert found["eager"]["outcome"] == "right"
    assert found["captured"]["outcome"] == "wrong"

    def fails(*_args):
        message = "on purpose\nwith more below"
        raise ValueError(message)

    monkeypatch.setattr(Captured, "logits", fails)
    assert outcomes("phi3")["captured"] == {"outcome": "failed", "reason": "ValueError: on purpose"}


def ran(tasks, *, serve=misbehaving.serve, each=60.0, seconds=120.0, count=2):
    options = ("hello",) if serve is misbehaving.serve else ()
    said = {task: [] for task in tasks}
    for task, *rest in Workers(serve, options, count, each, seconds).run(tasks):
        said[task].append(tuple(rest))
    return said


def test_a_process_that_dies_costs_its_own_task():
    tasks = [*(f"works {place}" for place in range(6)), "leaves", "crashes", "leaves again"]
    random.shuffle(tasks)
    for task, said in ran(tasks).items():
        assert said[0] == ("before", "hello")
        ends = {
            "works": ("after", task),
            "leaves": (None, "its process ended with exit code 3"),
            "crashes": (None, "its process ended by SIGKILL"),
        }
        assert said[1:] == [ends[task.split()[0]]]


def test_a_process_that_hangs_costs_its_own_task():
    said = ran(["hangs", "works", "works too"], each=3.0)
    assert said["hangs"] == [("before", "hello"), (None, "not done in 3 s")]
    assert said["works"][-1] == ("after", "works")
    assert said["works too"][-1] == ("after", "works too")


def test_what_is_left_when_the_time_is_over():
    said = ran(["hangs", "works", "works too"], seconds=5.0, count=1)
    assert [each[-1] for each in said.values()] == [(None, "not reached")] * 3


def test_processes_that_never_get_ready_are_an_error():
    with pytest.raises(RuntimeError, match=r"not get ready.*exit code 4"):
        ran(["works"], serve=misbehaving.never_ready)


def test_the_command(tmp_path, monkeypatch, capsys):
    file = tmp_path / "found.json"
    options = ["--device", "cpu", "--workers", "1", "--each", "300", "--out", str(file)]
    monkeypatch.setattr(sys, "argv", ["try_on_gpu.py", *options, "llama", "gemma4_assistant"])
    assert try_on_gpu.main() == 0
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^ *\d+ s +", "", line) for line in lines] == [
        "1/2 llama: eager right",
        "2/2 llama: eager right, captured right",
    ]
    results = json.loads(file.read_text())
    assert results["made"]["device"] == "cpu"
    assert results["types"]["gemma4_assistant"]["captured"]["outcome"] == "not run"
    row = rows(gpu_columns.merged(PAGE.read_text(), results, 12))["llama"]
    assert float(row["CUDA eager"]) <= selfcheck.TOLERANCE
    assert float(row["CUDA captured"]) <= selfcheck.TOLERANCE
    monkeypatch.setattr(sys, "argv", ["try_on_gpu.py", *options, "lama"])
    with pytest.raises(SystemExit, match="2"):
        try_on_gpu.main()
    assert "no causal types of transformers: lama" in capsys.readouterr().err


def rows(page):
    lines = page[page.index("| type |") :].splitlines()
    titles = [each.strip() for each in lines[0].split("|")[1:-1]]
    table = [dict(zip(titles, map(str.strip, line.split("|")[1:-1]), strict=True)) for line in lines[2:]]
    return {row["type"]: row for row in table}


def test_columns_are_put_beside_those_that_are_there():
    page = PAGE.read_text()
    names = list(rows(page))
    kinds = [
        ({"outcome": "right", "difference": 2.4e-06}, "2e-06"),
        (
            {"outcome": "right", "difference": 1e-6, "without_prompts": "E: a|b"},
            "1e-06; prompts eager: E: a/b",
        ),
        ({"outcome": "right", "difference": 3e-15, "reason": "in float64; more"}, "3e-15, in float64"),
        ({"outcome": "not captured", "reason": "x" * 200}, f"no: {'x' * 90}…"),
        ({"outcome": "wrong", "reason": "off"}, "**wrong**: off"),
        ({"outcome": "failed", "reason": "KeyError:\n gone"}, "**fails**: KeyError: gone"),
        ({"outcome": "not run", "reason": "no"}, "not run: no"),
        ({"outcome": "not reached"}, "not reached"),
    ]
    chosen = {name: (random.choice(kinds), random.choice(kinds)) for name in names[1:]}
    types = {name: {"eager": one[0], "captured": other[0]} for name, (one, other) in chosen.items()}
    merged = gpu_columns.merged(page, {"made": MADE, "types": types}, 12)
    got = rows(merged)
    assert got[names[0]]["CUDA eager"] == got[names[0]]["CUDA captured"] == "not reached"
    for name, (one, other) in chosen.items():
        assert (got[name]["CUDA eager"], got[name]["CUDA captured"]) == (one[1], other[1])
    ours = {"CUDA eager", "CUDA captured"}
    kept = {name: {k: v for k, v in row.items() if k not in ours} for name, row in got.items()}
    assert kept == {name: {k: v for k, v in row.items() if k not in ours} for name, row in rows(page).items()}
    assert "Card 9" in merged
    assert "2026-01-02" in merged
    right = sum(one[0]["outcome"] == "right" for one, _ in chosen.values())
    counted = re.search(r"^\| CUDA eager \| (\d+) \|", merged, re.MULTILINE)
    assert counted is not None
    assert int(counted.group(1)) == right
    # Again, with other results.
    fewer = {"made": MADE, "types": dict(list(types.items())[:5])}
    assert gpu_columns.merged(merged, fewer, 12) == gpu_columns.merged(page, fewer, 12)


def test_results_that_do_not_belong_to_the_page():
    with pytest.raises(ValueError, match="not in the table: neverheard"):
        gpu_columns.merged(PAGE.read_text(), {"made": MADE, "types": {"neverheard": {}}}, 12)
    with pytest.raises(ValueError, match="no table"):
        gpu_columns.merged("# Something else\n", {"made": MADE, "types": {}}, 12)
