"""Random collectives between ranks on one GPU or on several, each checked bit for bit against torch.

    python tests/python/gpu/soak.py [--devices cuda:0 cuda:1] [--operations 1000000] [--seconds N] [--seed N]

Sizes, dtypes, ranks and their devices, streams, the order of launches, eager or captured, with and without
peer access: all random. A mismatch prints the seed that replays the run up to it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import time
from typing import Any

# Streams that share one of the driver's hardware queues (8 if not said otherwise) wait for each other: a rank
# whose second call stands before another rank's first one would keep it from ever starting.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import torch

import tp_rs

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
BATCH = 64
# As many as one communicator may have ranks on a device.
RANKS = 8
PEERS = ["proved", "staged", "one way"]


def synchronize() -> None:
    """Wait for all devices, not only the current one."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def check(expected: torch.Tensor, got: torch.Tensor, what: str) -> None:
    """Exit where two tensors differ in a bit."""
    expected = expected.to(got.device)
    if not torch.equal(expected.view(torch.uint8), got.view(torch.uint8)):
        sys.exit(f"mismatch: {what}")


def total(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum in rank order, rounded once."""
    parts = [part.to(parts[0].device) for part in parts]
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    result = parts[0].to(wide)
    for part in parts[1:]:
        result = result + part.to(wide)
    return result.to(parts[0].dtype)


class Life:
    """One communicator and its streams."""

    def __init__(self, streams: dict[str, list[torch.cuda.Stream]], kinds: list[str]) -> None:
        self.ranks = random.randint(1, RANKS)
        # Directly is what most machines do.
        self.peers = random.choice([*kinds, kinds[0]])
        below = random.choice([None, 0, 4096, 1 << 20])
        self.devices = [random.choice(list(streams)) for _ in range(self.ranks)]
        options: dict[str, Any] = {"peers": self.peers, "pushed_below": below}
        self.comm = tp_rs.Communicator(self.devices, timeout=60, **options)
        # Each rank has the next one of its device.
        free = {device: iter(ones) for device, ones in streams.items()}
        self.streams = [next(free[device]) for device in self.devices]

    def shape(self) -> tuple[int, int]:
        """Mostly small, now and then large."""
        most = random.choice([64, 1024, 8192, 8192, 100_000, 600_000])
        columns = random.randint(1, most)
        return random.randint(1, max(1, min(8, most // columns))), columns

    def tensor(self, shape: tuple[int, int], dtype: torch.dtype, rank: int) -> torch.Tensor:
        """Random values, rows with a gap between them now and then."""
        gap = random.choice([0, 0, 0, random.randint(1, 9)])
        return torch.randn(shape[0], shape[1] + gap, device=self.devices[rank]).to(dtype)[:, : shape[1]]

    def batch(self, operations: int) -> None:
        """Several operations: list calls, ranks that take turns, or a captured graph a rank."""
        work = [self.operation() for _ in range(operations)]
        synchronize()
        way = random.choice(["list", "ranks", "graphs"])
        if way == "list":
            with contextlib.ExitStack() as current:
                # The last one of each device counts.
                for rank in random.sample(range(self.ranks), self.ranks):
                    current.enter_context(torch.cuda.stream(self.streams[rank]))
                for one in work:
                    one["list"]()
        elif way == "ranks":
            for one in work:
                for rank in random.sample(range(self.ranks), self.ranks):
                    with torch.cuda.stream(self.streams[rank]):
                        one["rank"](rank)
        else:
            self.graphs(work)
        synchronize()
        try:
            self.comm.check()
        except tp_rs.TPError as error:
            sys.exit(f"{way}, ranks on {self.devices}, {self.peers}: {error}")
        for one in work:
            one["check"](way)

    def graphs(self, work: list[dict[str, Any]]) -> None:
        """Capture a graph a rank in any order, and replay them in any other."""
        graphs = []
        for rank in random.sample(range(self.ranks), self.ranks):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.streams[rank]):
                for one in work:
                    one["rank"](rank)
            graphs.append((rank, graph))
        random.shuffle(graphs)
        for rank, graph in graphs:
            with torch.cuda.stream(self.streams[rank]):
                graph.replay()
        # Not before the graphs are done.
        synchronize()

    def operation(self) -> dict[str, Any]:
        """One random operation: how to do it in a list call and by rank, and how to check it."""
        kinds = [self.all_reduce, self.all_reduce, self.all_gather, self.broadcast, self.reduce_scatter]
        return random.choice(kinds)()

    def all_reduce(self) -> dict[str, Any]:
        """A sum in place."""
        dtype, shape = random.choice(DTYPES), self.shape()
        tensors = [self.tensor(shape, dtype, rank) for rank in range(self.ranks)]
        expected = total([tensor.clone() for tensor in tensors]).contiguous()

        def verify(way: str) -> None:
            for rank, tensor in enumerate(tensors):
                what = f"all_reduce {way} {self.peers} {dtype} {shape} on {self.devices}, rank {rank}"
                check(expected, tensor.contiguous(), what)

        return {
            "list": lambda: self.comm.all_reduce(tensors),
            "rank": lambda rank: self.comm.rank(rank).all_reduce(tensors[rank]),
            "check": verify,
        }

    def split(self, columns: int) -> list[tuple[int, int, int]]:
        """Random widths, some of them 0."""
        cuts = sorted(random.randint(0, columns) for _ in range(self.ranks - 1))
        bounds = zip([0, *cuts], [*cuts, columns], strict=True)
        return [(rank, a, b) for rank, (a, b) in enumerate(bounds) if a < b]

    def reduce_scatter(self) -> dict[str, Any]:
        """A sum of which each rank gets its columns."""
        dtype, shape = random.choice(DTYPES), self.shape()
        split = self.split(shape[1])
        inputs = [self.tensor(shape, dtype, rank) for rank in range(self.ranks)]
        expected = total(inputs)
        outputs = {
            rank: torch.zeros(shape[0], b - a, device=self.devices[rank]).to(dtype) for rank, a, b in split
        }

        def verify(way: str) -> None:
            for rank, a, b in split:
                what = f"reduce_scatter {way} {self.peers} {dtype} {shape} {split} on {self.devices}: {rank}"
                check(expected[:, a:b].contiguous(), outputs[rank], what)

        return {
            "list": lambda: self.comm.reduce_scatter(inputs, list(outputs.values()), split),
            "rank": lambda rank: self.comm.rank(rank).reduce_scatter(inputs[rank], outputs.get(rank), split),
            "check": verify,
        }

    def all_gather(self) -> dict[str, Any]:
        """Uneven columns side by side."""
        dtype, (rows, columns) = random.choice(DTYPES), self.shape()
        split = self.split(columns)
        whole = torch.randn(rows, columns, device=self.devices[0]).to(dtype)
        parts = {rank: whole[:, a:b].contiguous().to(self.devices[rank]) for rank, a, b in split}
        targets = [torch.zeros_like(whole, device=device) for device in self.devices]

        def verify(way: str) -> None:
            for rank, target in enumerate(targets):
                what = f"all_gather {way} {self.peers} {dtype} {rows}x{split} on {self.devices}, rank {rank}"
                check(whole, target, what)

        return {
            "list": lambda: self.comm.all_gather(list(parts.values()), split, targets),
            "rank": lambda rank: self.comm.rank(rank).all_gather(parts.get(rank), split, targets[rank]),
            "check": verify,
        }

    def broadcast(self) -> dict[str, Any]:
        """One rank's tensor to all."""
        dtype, shape = random.choice(DTYPES), self.shape()
        root = random.randrange(self.ranks)
        tensors = [torch.zeros(shape, device=device).to(dtype) for device in self.devices]
        tensors[root] = torch.randn(shape, device=self.devices[root]).to(dtype)
        expected = tensors[root].clone()

        def verify(way: str) -> None:
            for rank, tensor in enumerate(tensors):
                what = (
                    f"broadcast {way} {self.peers} {dtype} {shape} from {root} on {self.devices}, rank {rank}"
                )
                check(expected, tensor, what)

        return {
            "list": lambda: self.comm.broadcast(tensors[root], tensors),
            "rank": lambda rank: self.comm.rank(rank).broadcast(tensors[rank], root=root),
            "check": verify,
        }


def main() -> None:
    """Run until the number or the time is reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", nargs="+", default=["cuda:0"], help="GPUs that ranks are on")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    print(f"seed {arguments.seed}, on {', '.join(arguments.devices)}", flush=True)  # noqa: T201
    streams = {device: [torch.cuda.Stream(device) for _ in range(RANKS)] for device in arguments.devices}
    done, start = 0, time.monotonic()
    while done < arguments.operations and time.monotonic() - start < arguments.seconds:
        life = Life(streams, arguments.peers)
        for _ in range(random.randint(1, 20)):
            life.batch(BATCH)
            # Each rank's part counts: it is a kernel of its own that has to meet the others.
            done += BATCH * life.ranks
    seconds = time.monotonic() - start
    print(f"{done} collective calls of ranks in {seconds:.0f} s, no mismatch")  # noqa: T201


if __name__ == "__main__":
    main()
