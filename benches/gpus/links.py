"""What the links between two GPUs, and to host memory, carry where nobody waits for anybody.

    python -m benches.gpus.links [--mib 8 32] [--rounds N] [--out FOLDER]

No collective can be faster. Both devices move at once, and as many bytes go each way. Kernels are tried with
several numbers of programs and sizes of blocks, and the fastest counts. Beside them are copy engines, and
copies to pinned host memory and from it at once. Every way's result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .report import Table, number, save

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

MIB = 1 << 20
PROGRAMS = (64, 132, 264, 528)
BLOCKS = (1024, 2048, 4096, 8192)
REPLAYS = 10


class Way(NamedTuple):
    """One way to move data: what each device does, and what has to be there then."""

    name: str
    calls: list[Callable[[], object]]
    check: Callable[[], bool]
    # Called one after the other: torch's copies beyond a device mark streams that a capture does not know.
    eager: bool = False


class Pair:
    """Two devices and the tensors that they exchange.

    Args:
        devices: Two of them.
        size: Bytes that go each way.
    """

    def __init__(self, devices: list[str], size: int) -> None:
        import torch  # noqa: PLC0415

        self.torch = torch
        self.devices = devices
        self.size = size
        count = size // 4
        # What each has, what comes from the other one, and the same in host memory.
        self.have = [torch.empty(count, dtype=torch.int32, device=device) for device in devices]
        self.come = [torch.empty_like(tensor) for tensor in self.have]
        self.sent = [torch.empty(count, dtype=torch.int32, pin_memory=True) for _ in devices]
        self.read = [torch.empty(count, dtype=torch.int32, pin_memory=True) for _ in devices]
        # Lets the devices reach each other.
        for rank in range(2):
            self.come[rank].copy_(self.have[1 - rank])
        self.restore()

    def restore(self) -> None:
        """New random values; nothing has come yet."""
        for tensor in (*self.have, *self.read):
            tensor.random_(0, 1 << 20)
        for tensor in (*self.come, *self.sent):
            tensor.zero_()
        for device in self.devices:
            self.torch.cuda.synchronize(device)

    def came(self) -> bool:
        """Whether each has what the other one had."""
        return all(self.torch.equal(self.come[rank].cpu(), self.have[1 - rank].cpu()) for rank in range(2))

    def by_kernel(self, name: str, programs: int, block: int) -> Way:
        """Kernels that read what the other device has, write what it gets, or do half of each in a sum."""
        from .links_kernels import move, move_sum  # noqa: PLC0415  needs Triton

        count = self.size // 4
        half = count // 2
        before = [tensor.cpu() for tensor in self.have]

        def work(rank: int) -> Callable[[], object]:
            other = 1 - rank
            if name == "read":
                parts = (self.have[other], self.come[rank], count)
            elif name == "written":
                parts = (self.have[rank], self.come[other], count)
            else:
                # Each adds up one half, and puts it where the other one looks for sums.
                own = slice(rank * half, (rank + 1) * half)
                mine, theirs, target = (
                    each[own] for each in (self.have[rank], self.have[other], self.come[other])
                )
                return lambda: move_sum[(programs,)](mine, theirs, target, half, block=block)
            return lambda: move[(programs,)](*parts, block=block)

        def summed() -> bool:
            total = before[0] + before[1]
            return all(
                self.torch.equal(where[rank].cpu()[own], total[own])
                for rank in range(2)
                for where, own in (
                    (self.have, slice(rank * half, (rank + 1) * half)),
                    (self.come, slice((1 - rank) * half, (2 - rank) * half)),
                )
            )

        titles = {
            "read": "read from the other device",
            "written": "written to it",
            "sum": "a sum in place: half read, half written",
        }
        calls = [self._on(rank, work(rank)) for rank in range(2)]
        return Way(titles[name], calls, summed if name == "sum" else self.came)

    def by_engines(self) -> Way:
        """The driver's copies from device to device."""
        calls = [self._on(rank, self._copy(self.come[1 - rank], self.have[rank])) for rank in range(2)]
        return Way("copy engines", calls, self.came, eager=True)

    def by_host(self) -> Way:
        """Copies to pinned memory and from it, on two streams that fork from the rank's."""
        sides = [self.torch.cuda.Stream(device) for device in self.devices]

        def work(rank: int) -> Callable[[], object]:
            back = self._copy(self.come[rank], self.read[rank])
            there = self._copy(self.sent[rank], self.have[rank])

            def call() -> None:
                here = self.torch.cuda.current_stream(self.devices[rank])
                sides[rank].wait_stream(here)
                there()
                with self.torch.cuda.stream(sides[rank]):
                    back()
                here.wait_stream(sides[rank])

            return call

        def moved() -> bool:
            return all(
                self.torch.equal(self.sent[rank], self.have[rank].cpu())
                and self.torch.equal(self.come[rank].cpu(), self.read[rank])
                for rank in range(2)
            )

        calls = [self._on(rank, work(rank)) for rank in range(2)]
        return Way("copies to pinned memory and back", calls, moved, eager=True)

    @staticmethod
    def _copy(target: torch.Tensor, source: torch.Tensor) -> Callable[[], object]:
        return lambda: target.copy_(source, non_blocking=True)

    def _on(self, rank: int, call: Callable[[], object]) -> Callable[[], object]:
        # Kernels are launched on the current device, whatever memory they use.
        def on_device() -> None:
            with self.torch.cuda.device(self.devices[rank]):
                call()

        return on_device


class Links:
    """Measures ways between two devices, in a graph a device.

    Args:
        devices: Two of them.
        rounds: Turns of which the median is taken.
    """

    def __init__(self, devices: list[str], rounds: int) -> None:
        import torch  # noqa: PLC0415

        self.torch = torch
        self.devices = devices
        self.rounds = rounds
        self.streams = [torch.cuda.Stream(device) for device in devices]

    def time(self, pair: Pair, way: Way) -> float:
        """Microseconds.

        Raises:
            RuntimeError: The data did not arrive.
        """
        from . import timing  # noqa: PLC0415

        def both() -> None:
            for call, stream in zip(way.calls, self.streams, strict=True):
                with self.torch.cuda.stream(stream):
                    call()

        both()
        timing.synchronize(self.devices)
        if not way.check():
            raise RuntimeError(f"{way.name}, {pair.size} bytes: not what was sent")
        if way.eager:
            calls = timing.IN_A_GRAPH * REPLAYS
            return statistics.median(timing.eager_time(both, self.devices, calls) for _ in range(self.rounds))
        graphs = timing.captured(way.calls, self.streams)
        taken = [timing.replay_time(graphs, self.streams, REPLAYS) for _ in range(self.rounds)]
        return statistics.median(taken)

    def measure(self, size: int) -> dict[str, dict[str, Any]]:
        """The least time of every way, and how the kernels were shaped that took it."""
        pair = Pair(self.devices, size)
        found: dict[str, dict[str, Any]] = {}
        for name in ("read", "written", "sum"):
            for programs, block in itertools.product(PROGRAMS, BLOCKS):
                pair.restore()
                way = pair.by_kernel(name, programs, block)
                us = self.time(pair, way)
                if us < found.get(way.name, {"us": float("inf")})["us"]:
                    found[way.name] = {"us": us, "programs": programs, "block_bytes": block * 4}
        for way in (pair.by_engines(), pair.by_host()):
            pair.restore()
            found[way.name] = {"us": self.time(pair, way)}
        return found


def table(found: dict[int, dict[str, dict[str, Any]]]) -> Table:
    """Ways by size."""
    made = Table("us, as many bytes each way, both ways at once", ["", *(f"{mib} MiB" for mib in found)])
    for name in next(iter(found.values()), {}):
        made.lines.append([name, *(number(of_size[name]["us"]) for of_size in found.values())])
    return made


def positive(text: str) -> int:
    """A number from the command line."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number from 1 on")
    return value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.links",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mib", nargs="+", type=positive, default=[8, 32], help="sizes, MiB each way")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of which medians are taken")
    parser.add_argument("--out", type=Path, help="a folder for links.json")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    arguments = parse()
    import torch  # noqa: PLC0415

    from . import timing  # noqa: PLC0415
    from .tune import topology  # noqa: PLC0415

    devices = ["cuda:0", "cuda:1"]
    if torch.cuda.device_count() < len(devices):
        raise SystemExit(f"{torch.cuda.device_count()} CUDA devices: links are between two")
    if not all(torch.cuda.can_device_access_peer(rank, 1 - rank) for rank in range(2)):
        raise SystemExit("cuda:0 and cuda:1 have no peer access: no kernel of one reaches the other's memory")
    timing.warm(devices)
    facts = topology(devices)
    sys.stdout.write(
        f"{', '.join(facts['cards'])}; {facts['date']}; torch {torch.__version__}\n{facts['links']}\n"
    )
    links = Links(devices, arguments.rounds)
    found = {mib: links.measure(mib * MIB) for mib in arguments.mib}
    sys.stdout.write(f"{table(found).text()}\n")
    if arguments.out is not None:
        save(arguments.out, "links.json", {**facts, "mib": found})


if __name__ == "__main__":
    main()
