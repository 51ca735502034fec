# /// script
# requires-python = ">=3.10"
# dependencies = ["nvidia-cuda-nvcc-cu12==12.9.86"]
# ///
"""Assemble tp_rs.ptx for every kind of card, as drivers do, and fail where registers spill to memory.

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

HERE = Path(__file__).resolve().parent
# Turing to Blackwell.
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SPILLS = re.compile(r"([1-9]\d*) bytes spill stores")
REGISTERS = re.compile(r"Used (\d+) registers")


def ptxas() -> Path:
    """The assembler in the package."""
    spec = find_spec("nvidia.cuda_nvcc")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("nvidia-cuda-nvcc-cu12 is missing; run this file with: uv run --no-project cuda/assemble.py")
    return Path(next(iter(spec.submodule_search_locations))) / "bin" / "ptxas"


def assemble(target: str) -> tuple[str, int, str, list[str]]:
    """Exit status, what was said, and the spills of one target."""
    command = [ptxas(), f"-arch={target}", "-v", "-o", os.devnull, HERE / "tp_rs.ptx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own text
    return target, done.returncode, done.stderr, SPILLS.findall(done.stderr)


def main() -> None:
    """Assemble for all targets, two at a time."""
    parser = argparse.ArgumentParser(description="Assemble cuda/tp_rs.ptx for every kind of card.")
    parser.add_argument("--show", action="store_true", help="print what the assembler says of each kernel")
    arguments = parser.parse_args()
    failed = False
    with ThreadPoolExecutor(max_workers=2) as pool:
        for target, status, said, spills in pool.map(assemble, TARGETS):
            most = max(map(int, REGISTERS.findall(said)), default=0)
            print(f"{target}: at most {most} registers, {len(spills)} functions spill")  # noqa: T201
            failed |= bool(status) or bool(spills)
            if arguments.show or status or spills:
                print(said)  # noqa: T201
    sys.exit(failed)


if __name__ == "__main__":
    main()
