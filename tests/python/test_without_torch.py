"""Planning needs neither torch nor transformers, and nobody waits for their import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

WORK = """
import sys
import tp_rs
plan = tp_rs.plan(sys.argv[1], [1.0, 0.5], devices=["cpu"] * 2, context=16)
assert plan.fits and tp_rs.Plan.from_json(plan.to_json()) == plan
tp_rs.Communicator(["cpu"] * 2)
tp_rs.TPContext(plan)
"""


def run(code: str, config: Path) -> None:
    command = [sys.executable, "-c", code, str(config)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plans_and_communicators_import_neither(config_file: Path) -> None:
    run(WORK + "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n", config_file)


def test_they_work_where_neither_is_installed(config_file: Path) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(json.dumps({**config, "num_hidden_layers": 2}), encoding="utf-8")
    run("import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n" + WORK, config_file)


def test_load_says_what_it_needs(config_file: Path) -> None:
    for missing in ("torch", "transformers"):
        code = f"""
import sys
sys.modules[{missing!r}] = None
import tp_rs
try:
    tp_rs.load(sys.argv[1])
except ImportError as error:
    assert "pip install 'tp_rs[transformers]'" in str(error), error
    assert error.name.partition(".")[0] == {missing!r}, error.name
else:
    raise AssertionError
"""
        run(code, config_file)
