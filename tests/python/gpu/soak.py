"""Random collectives between ranks on one GPU, each checked bit for bit against torch.

    python tests/python/gpu/soak.py [--operations 1000000] [--seconds N] [--seed N]

Sizes, dtypes, ranks, streams, the order of launches, eager or captured: all random. A mismatch prints the
seed that replays the run up to it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from typing import Any, Literal

# Streams that share one of the driver's hardware queues (8 if not said otherwise) wait for each other: a rank
# whose second call stands before another rank's first one would keep it from ever starting.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import torch

import tp_rs

DEVICE = "cuda:0"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
BATCH = 64
STREAMS = [torch.cuda.Stream(DEVICE) for _ in range(8)]


def check(expected: torch.Tensor, got: torch.Tensor, what: str) -> None:
    """Exit where two tensors differ in a bit."""
    if not torch.equal(expected.view(torch.uint8), got.view(torch.uint8)):
        sys.exit(f"mismatch: {what}")


def total(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum in rank order, rounded once."""
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    result = parts[0].to(wide)
    for part in parts[1:]:
        result = result + part.to(wide)
    return result.to(parts[0].dtype)


class Life:
    """One communicator and its streams."""

    def __init__(self) -> None:
        self.ranks = random.randint(1, 8)
        peers: list[Literal["proved", "staged"]] = ["proved", "proved", "proved", "staged"]
        self.peers = random.choice(peers)
        below = random.choice([None, 0, 4096, 1 << 20])
        self.comm = tp_rs.Communicator(
            [DEVICE] * self.ranks, peers=self.peers, pushed_below=below, timeout=60
        )
        self.streams = STREAMS[: self.ranks]

    def shape(self) -> tuple[int, int]:
        """Mostly small, now and then large."""
        most = random.choice([64, 1024, 8192, 8192, 100_000, 600_000])
        columns = random.randint(1, most)
        return random.randint(1, max(1, min(8, most // columns))), columns

    def tensor(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Random values, rows with a gap between them now and then."""
        gap = random.choice([0, 0, 0, random.randint(1, 9)])
        return torch.randn(shape[0], shape[1] + gap, device=DEVICE).to(dtype)[:, : shape[1]]

    def batch(self, operations: int) -> None:
        """Several operations: list calls, ranks that take turns, or a captured graph a rank."""
        work = [self.operation() for _ in range(operations)]
        torch.cuda.synchronize()
        way = random.choice(["list", "ranks", "graphs"])
        if way == "list":
            stream = random.choice(self.streams)
            with torch.cuda.stream(stream):
                for one in work:
                    one["list"]()
        else:
            graphs = []
            for one in work if way == "ranks" else []:
                for rank in random.sample(range(self.ranks), self.ranks):
                    with torch.cuda.stream(self.streams[rank]):
                        one["rank"](rank)
            for rank in random.sample(range(self.ranks), self.ranks) if way == "graphs" else []:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.streams[rank]):
                    for one in work:
                        one["rank"](rank)
                graphs.append((rank, graph))
            random.shuffle(graphs)
            for rank, graph in graphs:
                with torch.cuda.stream(self.streams[rank]):
                    graph.replay()
        torch.cuda.synchronize()
        try:
            self.comm.check()
        except tp_rs.TPError as error:
            sys.exit(f"{way}, {self.ranks} ranks, {self.peers}: {error}")
        for one in work:
            one["check"](way)

    def operation(self) -> dict[str, Any]:
        """One random operation: how to do it in a list call and by rank, and how to check it."""
        return random.choice([self.all_reduce, self.all_reduce, self.all_gather, self.broadcast])()

    def all_reduce(self) -> dict[str, Any]:
        """A sum in place."""
        dtype, shape = random.choice(DTYPES), self.shape()
        tensors = [self.tensor(shape, dtype) for _ in range(self.ranks)]
        expected = total([tensor.clone() for tensor in tensors]).contiguous()

        def verify(way: str) -> None:
            for rank, tensor in enumerate(tensors):
                what = f"all_reduce {way} {self.peers} {dtype} {shape} of {self.ranks}, rank {rank}"
                check(expected, tensor.contiguous(), what)

        return {
            "list": lambda: self.comm.all_reduce(tensors),
            "rank": lambda rank: self.comm.rank(rank).all_reduce(tensors[rank]),
            "check": verify,
        }

    def all_gather(self) -> dict[str, Any]:
        """Uneven columns side by side."""
        dtype, (rows, columns) = random.choice(DTYPES), self.shape()
        cuts = sorted(random.randint(0, columns) for _ in range(self.ranks - 1))
        bounds = list(zip([0, *cuts], [*cuts, columns], strict=True))
        split = [(rank, a, b) for rank, (a, b) in enumerate(bounds) if a < b]
        whole = torch.randn(rows, columns, device=DEVICE).to(dtype)
        parts = {rank: whole[:, a:b].contiguous() for rank, a, b in split}
        targets = [torch.zeros_like(whole) for _ in range(self.ranks)]

        def verify(way: str) -> None:
            for rank, target in enumerate(targets):
                check(whole, target, f"all_gather {way} {self.peers} {dtype} {rows}x{bounds}, rank {rank}")

        return {
            "list": lambda: self.comm.all_gather(list(parts.values()), split, targets),
            "rank": lambda rank: self.comm.rank(rank).all_gather(parts.get(rank), split, targets[rank]),
            "check": verify,
        }

    def broadcast(self) -> dict[str, Any]:
        """One rank's tensor to all."""
        dtype, shape = random.choice(DTYPES), self.shape()
        root = random.randrange(self.ranks)
        tensors = [torch.zeros(shape, device=DEVICE).to(dtype) for _ in range(self.ranks)]
        tensors[root] = torch.randn(shape, device=DEVICE).to(dtype)
        expected = tensors[root].clone()

        def verify(way: str) -> None:
            for rank, tensor in enumerate(tensors):
                check(
                    expected, tensor, f"broadcast {way} {self.peers} {dtype} {shape} from {root}, rank {rank}"
                )

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
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    print(f"seed {arguments.seed}", flush=True)  # noqa: T201
    done, start = 0, time.monotonic()
    while done < arguments.operations and time.monotonic() - start < arguments.seconds:
        life = Life()
        for _ in range(random.randint(1, 20)):
            life.batch(BATCH)
            # Each rank's part counts: it is a kernel of its own that has to meet the others.
            done += BATCH * life.ranks
    seconds = time.monotonic() - start
    print(f"{done} collective calls of ranks in {seconds:.0f} s, no mismatch")  # noqa: T201


if __name__ == "__main__":
    main()
