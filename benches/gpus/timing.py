"""Timers. Every figure is in microseconds an operation."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Operations in one graph.
IN_A_GRAPH = 20
# Calls between two looks at the clock, fewer than what fills the driver's queue.
BETWEEN_LOOKS = 100
LOOKS = 10
# Seconds of other work before each size: the clocks fall while tensors are made.
WARM_AGAIN = 0.05


def synchronize(devices: Sequence[str]) -> None:
    """Wait for all devices, not only the current one."""
    for device in sorted(set(devices)):
        torch.cuda.synchronize(device)


def warm(devices: Sequence[str], seconds: float = 0.5) -> None:
    """Let the clocks rise."""
    squares = [torch.randn(2048, 2048, device=device).half() for device in sorted(set(devices))]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for square in squares:
            for _ in range(10):
                torch.matmul(square, square)
        synchronize(devices)


def captured(
    calls: Sequence[Callable[[], object]],
    streams: Sequence[torch.cuda.Stream],
    operations: int = IN_A_GRAPH,
) -> list[torch.cuda.CUDAGraph]:
    """A graph for each call, on the stream of the same place, that makes the call so many times."""
    graphs = []
    for call, stream in zip(calls, streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile (NCCL's watchdog asks for events) is none of the capture's business.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(operations):
                call()
        graphs.append(graph)
    return graphs


def _replay(graphs: Sequence[torch.cuda.CUDAGraph], streams: Sequence[torch.cuda.Stream], times: int) -> None:
    """Replay all graphs so many times, in turn, from this thread."""
    for _ in range(times):
        for graph, stream in zip(graphs, streams, strict=True):
            torch.cuda.set_stream(stream)
            graph.replay()


def replay_time(
    graphs: Sequence[torch.cuda.CUDAGraph],
    streams: Sequence[torch.cuda.Stream],
    replays: int,
    operations: int = IN_A_GRAPH,
) -> float:
    """Time of an operation in graphs that are replayed back to back, by the events of the slowest rank."""
    devices = [str(stream.device) for stream in streams]
    before = torch.cuda.current_device()
    starts = [torch.cuda.Event(enable_timing=True) for _ in streams]
    ends = [torch.cuda.Event(enable_timing=True) for _ in streams]
    try:
        # Ranks in processes of their own meet here, and the code that runs is in the caches.
        _replay(graphs, streams, 1)
        synchronize(devices)
        for start, stream in zip(starts, streams, strict=True):
            start.record(stream)
        _replay(graphs, streams, replays)
        for end, stream in zip(ends, streams, strict=True):
            end.record(stream)
        synchronize(devices)
    finally:
        for device in set(devices):
            torch.cuda.set_stream(torch.cuda.default_stream(device))
        torch.cuda.set_device(before)
    longest = max(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True))
    return float(longest) * 1e3 / (replays * operations)


def eager_time(call: Callable[[], object], devices: Sequence[str], calls: int) -> float:
    """Time of a call, host and devices, of several made one after the other."""
    for _ in range(3):
        call()
    synchronize(devices)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(devices)
    return (time.perf_counter() - start) / calls * 1e6


def host_time(call: Callable[[], object], devices: Sequence[str]) -> float:
    """Time until a call returns, the least of several stretches: more is other work of the machine."""
    least = float("inf")
    for _ in range(LOOKS):
        synchronize(devices)
        start = time.perf_counter()
        for _ in range(BETWEEN_LOOKS):
            call()
        least = min(least, (time.perf_counter() - start) / BETWEEN_LOOKS * 1e6)
    synchronize(devices)
    return least


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over the norm of what was wanted; NaN where either is."""
    wanted = wanted.float()
    return float((got.float().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-30))
