"""Times the communicator from Python beside torch.distributed's gloo and a plain sum, in one run.

The candidates take turns, many short ones, gloo in processes that sleep meanwhile. Shown is the best turn of
each: what it takes while nothing else wants the cores. Run it with `make bench`, or alone; `--json` is for
programs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tp_rs
from tp_rs import BROADCAST_ID, TPContext

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS = 4
SIZES = {"16 KiB": 16 << 10, "4 MiB": 4 << 20}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 1024,
    "torch_dtype": "float32",
}


@dataclass
class Row:
    """Microseconds of one way to do one thing, and of what it is compared with."""

    what: str
    size: str
    way: str
    microseconds: float
    beside: str = ""
    ratio: float | None = None


def per_call(call: Callable[[], object], seconds: float) -> float:
    """Microseconds of a call, over as many as take about `seconds`."""
    begin = time.perf_counter()
    call()
    count = max(1, int(seconds / max(time.perf_counter() - begin, 1e-7)))
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count * 1e6


def in_turns(calls: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """The best of each over that many turns, one after the other in every turn."""
    best = dict.fromkeys(calls, math.inf)
    for _ in range(turns):
        for name, call in calls.items():
            best[name] = min(best[name], call())
    return best


def gloo_rank(rank: int, store: str, seconds: float, orders: Any, answers: Any) -> None:
    """One process of gloo: all-reduces a size when told, and rank 0 answers how long a call took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    while (size := orders.get()) is not None:
        tensor = torch.zeros(size // 4)
        for _ in range(3):
            dist.all_reduce(tensor)
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        # Every rank has to make the same number of calls.
        count = torch.tensor([max(5, int(seconds / (time.perf_counter() - begin)))])
        dist.broadcast(count, 0)
        begin = time.perf_counter()
        for _ in range(int(count)):
            dist.all_reduce(tensor)
        if rank == 0:
            answers.put((time.perf_counter() - begin) / int(count) * 1e6)
    dist.destroy_process_group()


class Gloo:
    """The processes, which sleep until one asks for a time."""

    def __init__(self, seconds: float) -> None:
        """Start them."""
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._answers = context.Queue()
        self._orders = [context.Queue() for _ in range(RANKS)]
        self._processes = [
            context.Process(target=gloo_rank, args=(rank, store, seconds, orders, self._answers), daemon=True)
            for rank, orders in enumerate(self._orders)
        ]
        for process in self._processes:
            process.start()

    def time(self, size: int) -> float:
        """Microseconds of an all-reduce of that many bytes a rank."""
        for orders in self._orders:
            orders.put(size)
        return float(self._answers.get(timeout=120))

    def close(self) -> None:
        """End them."""
        for orders in self._orders:
            orders.put(None)
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def by_rank(comm: tp_rs.Communicator, tensors: list[torch.Tensor], seconds: float) -> float:
    """Microseconds of a call that every rank makes from a thread of its own."""
    ranks = len(tensors)
    count = max(5, int(seconds * 1e6 / per_call(lambda: comm.all_reduce(tensors), seconds / 10) / ranks))
    start = threading.Barrier(ranks)
    # Told by the ranks themselves: this thread may be woken long after they have begun.
    begun, ended = [0.0] * ranks, [0.0] * ranks

    def work(rank: int) -> None:
        view, tensor = comm.rank(rank), tensors[rank]
        start.wait()
        begun[rank] = time.perf_counter()
        for _ in range(count):
            view.all_reduce(tensor)
        ended[rank] = time.perf_counter()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (max(ended) - min(begun)) / count * 1e6


def all_reduces(seconds: float, turns: int) -> list[Row]:
    """All-reduces of four ranks beside gloo's and a plain sum."""
    comm = tp_rs.Communicator(["cpu"] * RANKS)
    gloo = Gloo(seconds)
    rows = []
    for name, size in SIZES.items():
        tensors = [torch.zeros(size // 4) for _ in range(RANKS)]
        block, total = torch.zeros(RANKS, size // 4), torch.zeros(size // 4)

        def plain(block: torch.Tensor = block, total: torch.Tensor = total) -> None:
            torch.sum(block, 0, out=total)
            block.copy_(total)

        def plain_alone() -> float:
            # OpenMP's threads wait for each other actively: where others use the cores, one does it sooner.
            torch.set_num_threads(1)
            alone = per_call(plain, seconds / 2)
            torch.set_num_threads(os.cpu_count() or 1)
            return alone

        def listed(tensors: list[torch.Tensor] = tensors) -> None:
            comm.all_reduce(tensors)

        took = in_turns(
            {
                "one list call": lambda: per_call(listed, seconds),
                "a thread a rank": lambda: by_rank(comm, tensors, seconds),  # noqa: B023
                "gloo": lambda: gloo.time(size),  # noqa: B023
                "plain sum": lambda: min(plain_alone(), per_call(plain, seconds / 2)),
            },
            turns,
        )
        rows.append(Row("all_reduce", name, "torch.distributed gloo, 4 processes", took["gloo"]))
        rows.append(Row("all_reduce", name, "torch: sum of a block, copied back", took["plain sum"]))
        rows += [
            Row("all_reduce", name, f"tp_rs, {way}", took[way], other, took[way] / took[other])
            for way in ("one list call", "a thread a rank")
            for other in ("gloo", "plain sum")
        ]
    gloo.close()
    return rows


def call_cost(seconds: float, turns: int) -> list[Row]:
    """What a call costs where there is next to nothing to sum."""
    comm = tp_rs.Communicator(["cpu"] * 2)
    pair = [torch.zeros(1), torch.zeros(1)]
    took = in_turns(
        {
            "call": lambda: per_call(lambda: comm.all_reduce(pair), seconds),
            "add_": lambda: per_call(lambda: pair[0].add_(pair[1]), seconds),
        },
        turns,
    )
    rows = [Row("2 ranks", "4 B", "torch: one add_ of two tensors", took["add_"])]
    return [
        *rows,
        Row("2 ranks", "4 B", "tp_rs, one list call", took["call"], "one add_", took["call"] / took["add_"]),
    ]


def context_calls(seconds: float, turns: int) -> list[Row]:
    """`TPContext`'s moves beside the same moves in torch."""
    rows = []
    torch.set_num_threads(1)
    splits = {"kv": [1] * RANKS, "id": [1024] * RANKS}
    with TPContext(MODEL, [1.0] * RANKS, splits=splits, pinned_bytes=8 << 20) as ctx:
        for name, size in SIZES.items():
            whole = torch.zeros(size // 4 // 4096, 4096)
            parts = [part.contiguous() for part in torch.chunk(whole, RANKS, dim=1)]
            calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
                "broadcast": (
                    lambda: ctx.broadcast(0, whole, BROADCAST_ID),  # noqa: B023
                    lambda: [whole.clone() for _ in range(RANKS)],  # noqa: B023
                ),
                "gather": (
                    lambda: ctx.gather(0, parts, BROADCAST_ID),  # noqa: B023
                    lambda: torch.cat(parts, 1),  # noqa: B023
                ),
                "allgather": (
                    lambda: ctx.allgather(0, parts, BROADCAST_ID, BROADCAST_ID),  # noqa: B023
                    lambda: [torch.cat(parts, 1) for _ in range(RANKS)],  # noqa: B023
                ),
            }
            for what, (ours, plain) in calls.items():
                took = in_turns(
                    {
                        "ours": lambda: per_call(ours, seconds),  # noqa: B023
                        "plain": lambda: per_call(plain, seconds),  # noqa: B023
                    },
                    turns,
                )
                rows.append(Row(f"ctx.{what}", name, "the same in torch, one after the other", took["plain"]))
                ratio = took["ours"] / took["plain"]
                rows.append(Row(f"ctx.{what}", name, "tp_rs", took["ours"], "torch", ratio))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="rows as JSON instead of a table")
    parser.add_argument("--seconds", type=float, default=0.01, help="of each measurement (default 0.01)")
    parser.add_argument("--turns", type=int, default=100, help="of which the best counts (default 100)")
    given = parser.parse_args()
    rows = [
        *all_reduces(given.seconds, given.turns),
        *call_cost(given.seconds, given.turns),
        *context_calls(given.seconds, given.turns),
    ]
    if given.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        return
    line = "{:<14}{:<8}{:<40}{:>11}  {}\n"
    sys.stdout.write(line.format("what", "size", "way", "us a call", "ratio"))
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2g} of {row.beside}"
        sys.stdout.write(line.format(row.what, row.size, row.way, f"{row.microseconds:.1f}", ratio))


if __name__ == "__main__":
    main()
