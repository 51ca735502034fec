from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tp_rs
from tp_rs.cli import app

RUNNER = CliRunner()
COMMAND = str(Path(sys.executable).parent / "tp-rs")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )


def on_a_terminal(*arguments: str | Path, **environment: str) -> str:
    """What the command writes to a pseudo-terminal of 80 columns."""
    ours, theirs = pty.openpty()
    env = os.environ | {"COLUMNS": "80", "TERM": "xterm-256color"} | environment
    with subprocess.Popen([COMMAND, *map(str, arguments)], stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        parts = []
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux's way of saying that the other end is closed
                break
            if not part:
                break
            parts.append(part)
        process.wait(timeout=60)
    os.close(ours)
    return b"".join(parts).decode()


def test_the_version_is_the_packages() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"tp-rs {tp_rs.__version__}\n")


def test_what_fits_is_exit_code_0_and_plain_when_piped(config_file: Path) -> None:
    done = run("plan", config_file, "--gpu-split", "2,1", "--devices", "cpu,cpu", "--context", "512")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "█" not in done.stdout
    table = str(tp_rs.plan(config_file, [2, 1], devices=["cpu", "cpu"], context=512))
    assert done.stdout == table + "\n"


def test_what_does_not_fit_is_exit_code_1(config_file: Path) -> None:
    done = run("plan", config_file, "--gpu-split", "0.02,0.01", "--devices", "cpu,cpu")
    assert done.returncode == 1
    assert "does not fit: short by" in done.stdout
    assert done.stderr == ""


def test_the_largest_context_of_what_never_fits_is_exit_code_1_too(config_file: Path) -> None:
    done = run("plan", config_file, "--gpu-split", "0.02", "--devices", "cpu", "--context", "max")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "does not fit" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu-split", "1,nan"], ["gpu_split[1]"]),
        (["--gpu-split", "1,x"], ["--gpu-split[1]", "'x'"]),
        (["--gpu-split", ""], ["--gpu-split[0]"]),
        (["--gpu-split", "1,1", "--speeds", "1"], ["speeds", "wanted 2"]),
        (["--gpu-split", "1", "--devices", "npu"], ["devices[0]", "npu"]),
        (["--gpu-split", "1", "--context", "many"], ["--context", "many"]),
        (["--gpu-split", "1", "--context", "0"], ["context"]),
        (["--gpu-split", "1", "--kv", "1.5"], ["--kv[0]", "whole number"]),
        (["--gpu-split", "1", "--kv", "3"], ["kv", "4"]),
        (["--gpu-split", "1", "--batch", "0"], ["batch"]),
    ],
)
def test_bad_input_is_exit_code_2_and_one_paragraph(
    config_file: Path, arguments: list[str], words: list[str]
) -> None:
    done = RUNNER.invoke(app, ["plan", str(config_file), *arguments])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tp-rs: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_a_missing_model_and_an_unknown_option_are_exit_code_2_without_a_traceback(tmp_path: Path) -> None:
    for arguments in (
        ["plan", tmp_path / "none"],
        ["plan", tmp_path, "--colour"],
        ["plan", tmp_path],
        ["nonsense"],
    ):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert done.stderr


def test_json_is_the_plan(config_file: Path) -> None:
    done = run("plan", config_file, "--gpu-split", "2,1", "--devices", "cpu,cpu", "--cache", "q4", "--json")
    assert done.returncode == 0
    plan = tp_rs.Plan.from_dict(json.loads(done.stdout))
    assert plan == tp_rs.plan(config_file, [2, 1], devices=["cpu", "cpu"], cache="q4")


def test_every_option_reaches_the_plan(config_file: Path) -> None:
    given = (
        "--gpu-split 4,4 --devices cpu,cpu --speeds 2,1 --context 300 --batch 3 --chunk 64 --cache 8bit "
        "--kv 3,1 --id 2048,768 --vc 16000,16000 --rs 512,512 --weights float32 --json"
    )
    done = RUNNER.invoke(app, ["plan", str(config_file), *given.split()])
    assert done.exit_code == 0, done.stderr
    plan = tp_rs.Plan.from_json(done.stdout)
    assert (plan.context, plan.batch, plan.chunk, plan.cache) == (300, 3, 64, "8bit")
    assert [rank.speed for rank in plan.ranks] == [2.0, 1.0]
    assert plan.model.weight_bytes == 2 * tp_rs.ModelShape.from_path(config_file).total_bytes
    assert plan.kv_split == [(0, 0, 3), (1, 3, 4)]
    assert plan.id_split == [(0, 0, 2048), (1, 2048, 2816)]
    assert plan.vc_split == [(0, 0, 16000), (1, 16000, 32000)]
    assert plan.rs_split == [(0, 0, 512), (1, 512, 1024)]


def test_a_terminal_gets_colours_and_bars_unless_no_color_is_set(config_file: Path) -> None:
    arguments = ("plan", config_file, "--gpu-split", "2,1", "--devices", "cpu,cpu")
    coloured = on_a_terminal(*arguments)
    assert coloured.count("▕") == 2
    assert "\x1b[34m█" in coloured
    plain = on_a_terminal(*arguments, NO_COLOR="1")
    assert plain.count("▕") == 2
    assert "\x1b[34m" not in plain
    assert "A attention" in plain


def test_help_shows_examples_and_exit_codes() -> None:
    done = RUNNER.invoke(app, ["plan", "--help"])
    assert done.exit_code == 0
    assert "--gpu-split 24,12,8" in done.stdout
    assert "Exit code" in done.stdout


def test_importing_the_package_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, tp_rs; print({'torch', 'transformers', 'rich', 'typer'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"
