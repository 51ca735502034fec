# /// script
# requires-python = ">=3.10"
# dependencies = ["nvidia-cuda-nvcc-cu12==12.9.86"]
# ///
"""Assemble tp_rs.ptx for every kind of card, as drivers do, and fail where registers spill to memory.

Cards since compute capability 9.0 get a changed text from src/comm/cuda/text.rs, whose kernels start early.
For those both are assembled: which one a card gets is also a matter of its driver.

uv run --no-project cuda/assemble.py [--show]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
# Turing to Blackwell.
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Those that kernels start early on.
EARLY = ("sm_90", "sm_100", "sm_120")
REMARK = "// tp_rs: wait for the kernel before"
WAIT = "griddepcontrol.wait;"
SPILLS = re.compile(r"([1-9]\d*) bytes spill stores")
REGISTERS = re.compile(r"Used (\d+) registers")


def ptxas() -> Path:
    """The assembler in the package."""
    spec = find_spec("nvidia.cuda_nvcc")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("nvidia-cuda-nvcc-cu12 is missing; run this file with: uv run --no-project cuda/assemble.py")
    return Path(next(iter(spec.submodule_search_locations))) / "bin" / "ptxas"


def early_text() -> str:
    """The text whose kernels wait for the one before by themselves."""
    text = (HERE / "tp_rs.ptx").read_text()
    kernels, old = text.count(REMARK), ".target sm_70\n"
    if kernels == 0 or text.count(old) != 1:
        sys.exit(f"cuda/tp_rs.ptx has {kernels} kernels that start early and {text.count(old)} lines {old!r}")
    return text.replace(old, ".target sm_90\n").replace(REMARK, WAIT)


def assemble(target: str, text: Path) -> tuple[str, int, str, list[str]]:
    """Target, exit status, what was said, and the spills of one target."""
    command = [ptxas(), f"-arch={target}", "-v", "-o", os.devnull, text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own text
    early = text.read_text().count(WAIT)
    name = f"{target}, {early} kernels start early" if early else target
    return name, done.returncode, done.stderr, SPILLS.findall(done.stderr)


def main() -> None:
    """Assemble for all targets, two at a time."""
    parser = argparse.ArgumentParser(description="Assemble cuda/tp_rs.ptx for every kind of card.")
    parser.add_argument("--show", action="store_true", help="print what the assembler says of each kernel")
    arguments = parser.parse_args()
    failed = False
    with TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=2) as pool:
        early = Path(folder) / "early.ptx"
        early.write_text(early_text())
        targets = [*TARGETS, *EARLY]
        texts = [HERE / "tp_rs.ptx"] * len(TARGETS) + [early] * len(EARLY)
        for target, status, said, spills in pool.map(assemble, targets, texts):
            most = max(map(int, REGISTERS.findall(said)), default=0)
            print(f"{target}: at most {most} registers, {len(spills)} functions spill")  # noqa: T201
            failed |= bool(status) or bool(spills)
            if arguments.show or status or spills:
                print(said)  # noqa: T201
    sys.exit(failed)


if __name__ == "__main__":
    main()
