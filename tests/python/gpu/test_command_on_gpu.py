"""`tp-rs run` over ranks of one GPU or all, and plans for more than a GPU has."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("tokenizers")

from models_common import DEVICE, made  # noqa: E402  torch and transformers may be missing
from typer.testing import CliRunner  # noqa: E402

import tp_rs  # noqa: E402
from test_cli_run import PROMPT, checkpoint  # noqa: E402
from tp_rs.cli import app  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def test_run_takes_recorded_steps_and_says_what_the_whole_model_says(tmp_path, place):
    checkpoint(tmp_path)
    ranks = ["--devices", ",".join(place.devices(2)), "--gpu-split", "2,1.5", "--kv", "2,1"]
    generation = ["--prompt", PROMPT, "--context", "64", "--max-new-tokens", "9", "--check", "--json"]
    done = CliRunner().invoke(app, ["run", str(tmp_path), *ranks, *generation])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["recorded_steps"]
    assert said["check"]["agrees"]
    assert said["check"]["compared_tokens"] == len(said["tokens"]) == 9
    for rank in said["ranks"]:
        assert rank["cache_bytes"] == rank["planned_cache_bytes"] > 0
    assert set(said["device_bytes"]) == set(place.devices(2))


def test_a_plan_for_more_than_is_free_is_refused(tmp_path):
    made("llama").save_pretrained(tmp_path)
    budget = 1 + torch.cuda.mem_get_info(DEVICE)[1] / (1 << 30)
    room = {"devices": [str(DEVICE)], "context": 64, "chunk": 64}
    a_thousand = tp_rs.plan(tmp_path, [budget], batch=1000, **room).ranks[0].items["kv_cache"]
    batch = int(1000 * budget * (1 << 30) / a_thousand)
    plan = tp_rs.plan(tmp_path, [4 * budget], batch=batch, **room)
    assert plan.fits
    with pytest.raises(tp_rs.DoesNotFit, match=rf"{DEVICE}: the plan counts \d+ MiB .* MiB are free"):
        tp_rs.load(tmp_path, plan=plan)
