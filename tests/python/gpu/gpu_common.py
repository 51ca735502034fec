"""What the GPU tests share: where ranks are, streams of their own for them, and sums made in another way."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

import tp_rs
from tensors import split_of as split_of  # noqa: PLC0414  for the tests beside
from tensors import summed as summed  # noqa: PLC0414  as above

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
MOVED = [*FLOATS, torch.int8, torch.uint8]
# How data gets from rank to rank: directly, through host memory, or each in one direction of every pair.
PEERS = ["proved", "staged", "one way"]


class Place:
    """Which GPU every rank is on: all on the first, or taking turns at all that there are."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus

    def on(self, rank: int) -> str:
        """The device of a rank."""
        return f"cuda:{rank % self.gpus}"

    def devices(self, ranks: int) -> list[str]:
        """The device of every rank."""
        return [self.on(rank) for rank in range(ranks)]

    def make(self, ranks: int, **options: Any) -> tp_rs.Communicator:
        """A communicator of so many ranks."""
        return tp_rs.Communicator(self.devices(ranks), **options)

    def put(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each rank's part on its device."""
        return [part.to(self.on(rank)) for rank, part in enumerate(parts)]

    def deal(
        self, parts: Sequence[torch.Tensor], split: Sequence[tuple[int, int, int]]
    ) -> list[torch.Tensor]:
        """Parts that belong to the intervals of a split, each on the device of the interval's rank."""
        return [part.to(self.on(rank)) for part, (rank, _, _) in zip(parts, split, strict=True)]

    def streams(self, ranks: int) -> list[torch.cuda.Stream]:
        """A new stream a rank."""
        return [torch.cuda.Stream(self.on(rank)) for rank in range(ranks)]


def synchronize() -> None:
    """Wait for all GPUs, not only the current one."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Fresh random values in host memory, exact in their dtype."""
    generator = torch.Generator().manual_seed(seed)
    if dtype in {torch.int8, torch.uint8}:
        return torch.randint(-100 if dtype == torch.int8 else 0, 100, tuple(shape), generator=generator).to(
            dtype
        )
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def seed() -> int:
    """A seed that a failing test prints in its arguments."""
    return random.randrange(2**31)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor on the host."""
    return tensor.detach().cpu().contiguous().view(torch.uint8)


def each_rank(
    comm: tp_rs.Communicator, call: Callable[[tp_rs.RankView, int], Any], *, shuffle: bool = True
) -> list[Any]:
    """Run `call` once for each rank, in a thread and on a stream of its own, and wait for all of it."""
    count = len(comm.devices)
    results: list[Any] = [None] * count
    errors: list[BaseException] = []
    streams = [torch.cuda.Stream(device) for device in comm.devices]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(stream.device))

    def run(rank: int) -> None:
        try:
            with torch.cuda.stream(streams[rank]):
                results[rank] = call(comm.rank(rank), rank)
        except BaseException as error:  # noqa: BLE001  raised below, by the test's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    if shuffle:
        random.shuffle(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    synchronize()
    comm.check()
    return results
