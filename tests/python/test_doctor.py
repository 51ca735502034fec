from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import tp_rs
from tp_rs.cli import app, doctor

RUNNER = CliRunner()
COMPLETE = {
    "torch": "2.11.0+cu128",
    "transformers": "5.17.3",
    "safetensors": "0.8.0",
    "gguf": "0.19.0",
    "accelerate": "1.15.0",
}
CARDS = [
    SimpleNamespace(
        index=index,
        name=f"Card {index}",
        total_bytes=(24 - 8 * index) << 30,
        free_bytes=(20 - 8 * index) << 30,
        bandwidth_gb_s=None if index else 936.0,
    )
    for index in range(2)
]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what is installed and which GPUs there are."""

    def make(installed: dict[str, str], cards: list[SimpleNamespace] | tp_rs.CudaError | None = None) -> None:
        def devices() -> list[SimpleNamespace]:
            if isinstance(cards, tp_rs.CudaError):
                raise cards
            return cards or []

        monkeypatch.setattr(doctor, "_version", installed.get)
        monkeypatch.setattr(doctor, "_native", SimpleNamespace(cuda_devices=devices))

    return make


def test_this_machine_is_described() -> None:
    done = RUNNER.invoke(app, ["doctor", "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == (0 if report["ok"] else 1)
    assert report["versions"]["tp_rs"] == tp_rs.__version__
    assert report["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert report["host"]["total_bytes"] >= report["host"]["available_bytes"] > 0
    assert report["host"]["cores"] >= 1


def test_what_is_there_is_exit_code_0(machine: Any) -> None:
    machine(COMPLETE)
    done = RUNNER.invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    assert "no GPU, so nothing to ask about" in done.stdout
    assert "models can run here\n" in done.stdout
    assert "missing" not in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ({}, ["torch is not installed", "pip install torch", "pip install 'transformers>=5.17,<6'"]),
        (
            {**COMPLETE, "transformers": "4.57.1"},
            ["transformers 4.57.1 is too old", "'transformers>=5.17,<6'"],
        ),
        ({"torch": "2.11.0", "transformers": "5.17.0"}, []),
    ],
)
def test_what_is_missing_is_exit_code_1_with_the_command_that_gets_it(
    machine: Any, installed: dict[str, str], words: list[str]
) -> None:
    machine(installed)
    done = RUNNER.invoke(app, ["doctor"])
    assert done.exit_code == (1 if words else 0)
    for word in words:
        assert word in done.stdout
    if not words:
        # Only some files need these.
        assert "pip install gguf" in done.stdout
        assert "pip install accelerate" in done.stdout


def test_a_version_that_is_not_tested_is_said_and_no_problem(machine: Any) -> None:
    machine({**COMPLETE, "transformers": "5.18.0"})
    done = RUNNER.invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert "transformers 5.18.0: the architectures are tested with 5.17" in done.stdout


def test_a_broken_driver_is_a_problem(machine: Any) -> None:
    machine(COMPLETE, tp_rs.CudaError("cuInit: error 999 (unknown)", "cuInit", 999))
    done = RUNNER.invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "cuInit: error 999" in done.stdout
    assert "nvidia-smi" in done.stdout


def test_gpus_and_what_they_reach(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(COMPLETE, CARDS)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        can_device_access_peer=lambda one, other: (one, other) == (0, 1),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    done = RUNNER.invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    assert "Card 0, 20.0 GiB of 24.0 free, memory 936 GB/s" in done.stdout
    assert "Card 1, 12.0 GiB of 16.0 free, memory bandwidth not known" in done.stdout
    assert "cuda:0 to cuda:1: yes" in done.stdout
    assert "cuda:1 to cuda:0: no, through host memory" in done.stdout
    machine({**COMPLETE, "torch": "2.11.0+cpu"}, CARDS)
    cuda.is_available = lambda: False
    done = RUNNER.invoke(app, ["doctor"])
    assert "not known: torch with CUDA is needed to ask" in done.stdout
    assert "torch 2.11.0+cpu is built for the CPU alone" in done.stdout


def test_it_works_without_torch_and_does_not_import_it() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from tp_rs.cli import main; sys.argv = ['tp-rs', 'doctor']\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert "peer access" in done.stdout
    assert done.stderr == ""
    assert done.returncode in {0, 1}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan  9 22:00:00 UTC 2025\n",
            "570.86.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
        ("something else\n", None),
    ],
)
def test_the_drivers_version(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, text: str, version: str | None
) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(doctor, "_DRIVER", file)
    monkeypatch.setattr(doctor, "_version", COMPLETE.get)
    assert doctor.examine().driver is None
    file.write_text(text)
    assert doctor.examine().driver == version
