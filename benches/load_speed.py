"""How long loading onto a GPU takes, beside reading the same files and copying their bytes once.

    python benches/load_speed.py [--gigabytes N] [--folder FOLDER] [--rounds N] [--json FILE]

Writes a Llama checkpoint in bfloat16 (deleted afterwards) that stays in the page cache. Every round reads its
files into one pinned buffer of 64 MiB at a time and copies that to the device; then loads it over one rank
and over two, and with transformers alone. The floor is the first. Also told: by how much the process grew at
most while it loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from load_memory import write_checkpoint
from transformers import AutoModelForCausalLM

import tp_rs

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "cuda:0"
BUFFER = 64 << 20
GIB = 1 << 30


def floor(folder: Path) -> None:
    """Read the files and copy them once, one after the other."""
    buffer = torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True)
    pinned: Any = buffer.numpy()
    memory = memoryview(pinned)
    kept = []
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        target = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        with file.open("rb", buffering=0) as source:
            done = 0
            while count := source.readinto(memory):
                target[done : done + count].copy_(buffer[:count])
                done += count
        kept.append(target)
    torch.cuda.synchronize()


def load(folder: Path, ranks: int) -> None:
    """Load over ranks."""
    front = tp_rs.load(folder, [70.0 / ranks] * ranks, devices=[DEVICE] * ranks, context=1024)
    torch.cuda.synchronize()
    front.unload()


def whole(folder: Path) -> None:
    """Load with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": DEVICE})
    torch.cuda.synchronize()
    del model


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and GiB by which the process grew at most."""
    gc.collect()
    torch.cuda.empty_cache()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status("VmRSS")
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return seconds, (status("VmHWM") - before) / GIB


def status(field: str) -> int:
    """Bytes that the system counts for this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logs: Any = transformers.logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        write_checkpoint(folder, 4096, 32000, options.gigabytes)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        ways: dict[str, Callable[[], None]] = {
            "read and copied": lambda: floor(folder),
            "load, 1 rank": lambda: load(folder, 1),
            "load, 2 ranks": lambda: load(folder, 2),
            "transformers": lambda: whole(folder),
        }
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for name, way in ways.items():
            print(f"{name}: the first time {timed(way)[0]:.2f} s", flush=True)  # noqa: T201
        for _ in range(options.rounds):
            for name, way in ways.items():
                seen[name].append(timed(way))
    finally:
        shutil.rmtree(folder)
    print(f"{torch.cuda.get_device_name(DEVICE)}, {size / GIB:.2f} GiB, best of {options.rounds}")  # noqa: T201
    least = {name: min(seconds for seconds, _ in each) for name, each in seen.items()}
    for name, seconds in least.items():
        grown = min(each for _, each in seen[name])
        speed = least["read and copied"] / seconds
        speeds = f"{size / GIB / seconds:6.2f} GiB/s  {speed:5.2f}"
        print(f"{name:16}  {seconds:6.2f} s  {speeds}  grew {grown:.2f} GiB")  # noqa: T201
    if options.json:
        options.json.write_text(
            json.dumps({"bytes": size, "seconds": least, "all": seen}, indent=2), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
