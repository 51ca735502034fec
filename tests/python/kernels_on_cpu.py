"""The CUDA kernels on the CPU: the library that tests/kernels makes of them, and the structures it takes.

The structures are those of cuda/protocol.cuh, whose sizes are compared, and of tests/kernels/device.cpp.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import shutil
import subprocess
from ctypes import c_char, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MOST_RANKS = 16
THREADS = 512
GIVES, GETS, PLAIN = 1, 2, 4
TIMED_OUT, DISAGREED, TOLD_BY_PEER, TOLD_BY_HOST = 1, 2, 3, 4
NOBODY = MOST_RANKS
# As the kernels' sources need it: they use memory as several types.
OPTIONS = ("-std=c++17", "-Og", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off")
# Accesses that are not aligned are told to device.cpp, which stands in for the sanitizer's library.
CHECKS = ("-fsanitize=alignment", "-U_FORTIFY_SOURCE")


class Status(ctypes.Structure):
    _fields_ = [("state", c_uint32), ("sequence", c_uint32), ("missing", c_uint32), ("signature", c_uint32)]


class Record(ctypes.Structure):
    _fields_ = [
        ("rank", c_uint32),
        ("ranks", c_uint32),
        ("slot_bytes", c_uint32),
        ("slots", c_uint32),
        ("area_bytes", c_uint64),
        ("out", c_uint64 * MOST_RANKS),
        ("inboxes", c_uint64 * MOST_RANKS),
        ("stage", c_uint64 * MOST_RANKS),
        ("seen", c_uint64 * MOST_RANKS),
        ("status", c_uint64),
        ("stop", c_uint64),
        ("reaches", c_uint16),
        ("reached", c_uint16),
        ("connected", c_uint16),
        ("staging_blocks", c_uint16),
        ("sequence", c_uint64),
        ("leaving", c_uint32),
        ("broken", c_uint32),
    ]


class Member(ctypes.Structure):
    _fields_ = [
        ("rank", c_uint64),
        ("input", c_uint64),
        ("input_stride", c_uint64),
        ("output", c_uint64),
        ("output_stride", c_uint64),
        ("role", c_uint32),
        ("index", c_uint32),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("timeout", c_uint64),
        ("rows", c_uint64),
        ("columns", c_uint64),
        ("signature", c_uint32),
        ("targets", c_uint32),
        ("ranks", c_uint32),
        ("widest", c_uint32),
        ("begin", c_uint32 * MOST_RANKS),
        ("end", c_uint32 * MOST_RANKS),
        ("skip", c_uint32 * MOST_RANKS),
        ("members", Member * MOST_RANKS),
    ]


class Rows(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in ("to", "to_stride", "source", "from_stride", "rows", "width")]


class Copies(ctypes.Structure):
    _fields_ = [
        ("leaving", c_uint64),
        ("done", c_uint64),
        ("value", c_uint32),
        ("unused", c_uint32),
        ("rows", Rows * MOST_RANKS),
    ]


class Step(ctypes.Structure):
    """What a kernel between two copies of a lane does."""

    _fields_ = [
        ("scratch", c_uint64),
        ("first", c_uint64),
        ("last", c_uint64),
        ("lane", c_uint32),
        ("copied", c_uint32),
        ("awaited", c_uint32),
        ("size", c_uint32),
    ]


class Stepped(ctypes.Structure):
    """Both parameters of such a kernel."""

    _fields_ = [("call", Call), ("step", Step)]


class Move(ctypes.Structure):
    """What a copy engine copies."""

    _fields_ = [("target", c_uint64), ("source", c_uint64), ("bytes", c_uint64)]


class Write(ctypes.Structure):
    """A word that the host writes while kernels run."""

    _fields_ = [("word", c_uint64), ("value", c_uint32), ("pauses", c_uint32)]


class Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", c_void_p),
        ("parameter", c_void_p),
        ("kind", c_uint32),
        ("blocks", c_uint32),
        ("members", c_uint32),
        ("threads", c_uint32),
        ("ranks", c_uint32 * MOST_RANKS),
        ("lane", c_uint32),
    ]


class Region(ctypes.Structure):
    _fields_ = [("memory", c_uint64), ("bytes", c_uint64), ("ranks", c_uint32), ("open", c_uint32)]


KINDS = (Call, Copies, Write, Stepped, Move)


class Pages:
    """Memory in pages of its own, and places in it."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.size)
        self.address = ctypes.addressof(c_char.from_buffer(self.memory))
        self.used = 0

    def take(self, size: int, beyond: int = 0) -> int:
        """The offset of so many bytes, `beyond` more than a multiple of 256."""
        at = self.used + beyond
        self.used = -(-(at + size) // 256) * 256
        assert self.used <= self.size
        return at


@dataclass
class Job:
    """One launch."""

    kernel: str
    parameter: Any
    ranks: list[int]
    blocks: int = 1
    threads: int = 32
    # Launches of a rank follow each other in each lane; those of lane 0 come after and before all.
    lane: int = 0


class Kernels:
    """The kernels as functions of a shared library."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        sizes = list((c_uint32 * 7).in_dll(self.library, "tp_rs_layout"))
        self.inbox_bytes = sizes[1]
        wanted = [ctypes.sizeof(kind) for kind in (Status, Record, Call, Copies, Step)]
        assert [sizes[0], *sizes[2:]] == [*wanted, THREADS]

    def run(self, jobs: list[Job], regions: list[Region]) -> None:
        """Run launches to their end, those of each rank in turn, in an order drawn from `random`."""
        launches = (Launch * len(jobs))()
        for launch, job in zip(launches, jobs, strict=True):
            if job.kernel:
                launch.kernel = ctypes.cast(getattr(self.library, job.kernel), c_void_p)
            launch.parameter = ctypes.addressof(job.parameter)
            launch.kind = KINDS.index(type(job.parameter))
            launch.blocks, launch.members, launch.threads = job.blocks, len(job.ranks), job.threads
            launch.ranks[: len(job.ranks)] = job.ranks
            launch.lane = job.lane
        problem = ctypes.create_string_buffer(200)
        failed = self.library.tp_rs_run(
            launches,
            len(jobs),
            (Region * len(regions))(*regions),
            len(regions),
            c_uint64(random.getrandbits(63)),
            problem,
            c_uint64(len(problem)),
        )
        assert not failed, problem.value.decode()


def compiler() -> str | None:
    """The C++ compiler of this machine."""
    return shutil.which(os.environ.get("CXX", "c++"))


def build(folder: Path) -> Path:
    """Make the library in a folder that several processes may share."""
    path = folder / "tp_rs_kernels.so"
    with (folder / "tp_rs_kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            made = path.with_suffix(".new")
            include = [f"-I{ROOT / 'tests' / 'kernels'}", f"-I{ROOT / 'cuda'}"]
            source = ROOT / "tests" / "kernels" / "device.cpp"
            command = [str(compiler()), *OPTIONS, *CHECKS, *include, str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            made.rename(path)
    return path
