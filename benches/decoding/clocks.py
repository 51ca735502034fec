"""Timers, in milliseconds. They wait for every GPU that the process sees."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["a_token", "host_time", "synchronize", "timed"]

_ROUNDS = 5
_GENERATIONS = 3
_REPLAYS = 200


def synchronize() -> None:
    """Wait for all GPUs, not only the current one."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def timed(work: Callable[[], object], repeats: int = 4, wait: Callable[[], object] = synchronize) -> float:
    """Milliseconds of one call: the median of several rounds.

    Args:
        work: The call.
        repeats: Calls of a round.
        wait: Waits for what the calls have queued.
    """
    for _ in range(2):
        work()
    times = []
    for _ in range(_ROUNDS):
        wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        times.append(1e3 * (time.perf_counter() - begin) / repeats)
    return statistics.median(times)


def a_token(
    generate: Callable[[int], object],
    few: int = 8,
    many: int = 72,
    wait: Callable[[], object] = synchronize,
) -> float:
    """Milliseconds a token: the difference of a long generation and a short one, the median of some.

    Args:
        generate: Generates so many tokens.
        few: Tokens of the short one.
        many: Tokens of the long one.
        wait: Waits for what was queued.
    """
    generate(few)
    differences = []
    for _ in range(_GENERATIONS):
        lengths = {}
        for new in (few, many):
            wait()
            begin = time.perf_counter()
            generate(new)
            wait()
            lengths[new] = time.perf_counter() - begin
        differences.append(lengths[many] - lengths[few])
    return 1e3 * statistics.median(differences) / (many - few)


def host_time(steps: Any) -> tuple[float, float]:
    """Microseconds of the host between two tokens of the loop, and those of them that the driver takes.

    The first is launching a step and reading its token, once the device is done; the second the same launches
    without what is around them.
    """
    from tp_rs.integrations.transformers.fast import _Reader  # noqa: PLC0415  what is measured

    kind = ("greedy", False)
    times, launches = [], []
    with steps.entered():
        step = steps.then(steps.decode_shape(1, 300), kind)
        reader = _Reader(steps.chooser(1), steps.recorder.stream(steps.lead))
        steps.place(1, [100])
        for _ in range(_REPLAYS):
            synchronize()
            begin = time.perf_counter()
            step()
            reader.put()
            launched = time.perf_counter() - begin
            synchronize()
            begin = time.perf_counter()
            reader.get()
            times.append(1e6 * (launched + time.perf_counter() - begin))
            launches.append(1e6 * _launching(step.ranks))
    return statistics.median(times), statistics.median(launches)


def _launching(ranks: list[tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]]) -> float:
    synchronize()
    seconds = 0.0
    for stream, graph in ranks:
        with torch.cuda.stream(stream):
            begin = time.perf_counter()
            graph.replay()
            seconds += time.perf_counter() - begin
    return seconds
