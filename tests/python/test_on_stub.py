"""The package on CUDA devices that exist in host memory only: results, failing driver calls, bad arguments.

A driver is loaded once in a process, so each test has one of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stub driver, with both names that a driver is looked for by."""
    cargo = shutil.which("cargo")
    assert cargo, "cargo is needed to build the stub driver"
    target = ROOT / "target" / "stub-cuda"
    manifest = ROOT / "tests" / "stub-cuda" / "Cargo.toml"
    command = [cargo, "build", "--quiet", "--locked", "--offline", "--manifest-path", str(manifest)]
    subprocess.run([*command, "--target-dir", str(target)], check=True)
    folder = tmp_path_factory.mktemp("stub")
    for name in ("libcuda.so", "libcuda.so.1"):
        (folder / name).symlink_to(target / "debug" / "libcuda.so")
    return folder


@pytest.mark.parametrize("scenario", ["results", "failures", "wild", "any"])
def test_scenario(stub: Path, scenario: str) -> None:
    paths = [str(stub), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}
    command = [sys.executable, str(ROOT / "tests" / "python" / "on_stub.py"), scenario]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PanicException" not in done.stderr
    assert "panicked" not in done.stderr
