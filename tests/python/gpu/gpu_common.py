"""What the GPU tests share: ranks with streams of their own, and sums made in another way."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

import tp_rs
from tensors import split_of as split_of  # noqa: PLC0414  for the tests beside

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
MOVED = [*FLOATS, torch.int8, torch.uint8]
DEVICE = "cuda:0"


def make(ranks: int, **options: Any) -> tp_rs.Communicator:
    """A communicator whose ranks all are on the first GPU."""
    return tp_rs.Communicator([DEVICE] * ranks, **options)


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


def summed(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum in the order of ranks, in float32 or, for doubles, float64, rounded once."""
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def each_rank(
    comm: tp_rs.Communicator, call: Callable[[tp_rs.RankView, int], Any], *, shuffle: bool = True
) -> list[Any]:
    """Run `call` once for each rank, in a thread and on a stream of its own, and wait for all of it."""
    count = len(comm.devices)
    results: list[Any] = [None] * count
    errors: list[BaseException] = []
    streams = [torch.cuda.Stream(DEVICE) for _ in range(count)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())

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
    torch.cuda.synchronize()
    comm.check()
    return results
