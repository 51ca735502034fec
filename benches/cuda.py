"""Collectives between ranks on one GPU, beside torch's copies, `torch.cuda.comm` and NCCL where they apply.

    python benches/cuda.py [--ranks 2] [--json FILE] [--plot FILE] [--launch FILE]

Everything is timed in one run; ratios are what counts. `--launch` takes the line that
`cargo bench --features cuda-pin --bench cuda_launch` prints, and puts the host time of a call from Python
beside bare launches. Sizes are rows of 8192 float16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tp_rs

if TYPE_CHECKING:
    from collections.abc import Callable

SEVERAL = 2
COLUMNS = 8192
ROWS = (1, 8, 64, 128, 512, 2048)


def host_time(call: Callable[[], object], calls: int = 100, rounds: int = 30) -> float:
    """Microseconds that a call takes the host, the least of all rounds."""
    least = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        least = min(least, (time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return least


def total_time(call: Callable[[], object], calls: int = 200, rounds: int = 7) -> float:
    """Microseconds a call, host and device, the median of all rounds."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times[1:])


def graph_time(call: Callable[[], object], calls: int = 50, rounds: int = 9) -> float:
    """Microseconds a call inside a captured graph, the median of all replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls * 1e3)
    return statistics.median(times[2:])


def two_gpus() -> dict[str, Callable[[list[torch.Tensor]], object]]:
    """What can be compared where there are two GPUs or more."""
    if torch.cuda.device_count() < SEVERAL:
        return {}
    return {"NCCL": torch.cuda.nccl.all_reduce}


def sums(devices: list[str]) -> list[dict[str, Any]]:
    """All-reduce inside a graph: ours as chosen, pushed and divided."""
    results = []
    make = tp_rs.Communicator
    ours = {
        "tp_rs": make(devices),
        "pushed": make(devices, pushed_below=1 << 20),
        "divided": make(devices, pushed_below=0),
    }
    one_device = len(set(devices)) == 1
    for rows in ROWS:
        tensors = [torch.randn(rows, COLUMNS, device=device).half() * 1e-3 for device in devices]
        row: dict[str, Any] = {
            "operation": "all_reduce",
            "rows": rows,
            "unit": "us in a graph" if one_device else "us",
        }
        for name, comm in ours.items():
            timer = graph_time if one_device else total_time
            row[name] = timer(lambda comm=comm, tensors=tensors: comm.all_reduce(tensors))
        for name, call in two_gpus().items():
            if not one_device:
                row[name] = total_time(lambda call=call, tensors=tensors: call(tensors))
        results.append(row)
    return results


def moves(devices: list[str]) -> list[dict[str, Any]]:  # noqa: C901  three operations and their rivals
    """Broadcast, gather to pinned host memory and all-gather, beside the copies that torch would make."""
    comm = tp_rs.Communicator(devices)
    ranks = len(devices)
    width = COLUMNS // ranks
    split = [(rank, rank * width, (rank + 1) * width) for rank in range(ranks)]
    results = []
    for rows in ROWS:
        source = torch.randn(rows, width * ranks, device=devices[0]).half()
        fulls = [torch.empty_like(source, device=device) for device in devices]
        parts = [
            source[:, a:b].contiguous().to(device) for (_, a, b), device in zip(split, devices, strict=True)
        ]
        host = torch.empty(source.shape, dtype=source.dtype).pin_memory()

        def copies_to_host(parts: list[torch.Tensor] = parts, host: torch.Tensor = host) -> None:
            for (_, a, b), part in zip(split, parts, strict=True):
                host[:, a:b].copy_(part, non_blocking=True)
            for device in set(devices):
                torch.cuda.synchronize(device)

        def copies_to_all(parts: list[torch.Tensor] = parts, fulls: list[torch.Tensor] = fulls) -> None:
            for full in fulls:
                for (_, a, b), part in zip(split, parts, strict=True):
                    full[:, a:b].copy_(part, non_blocking=True)

        def broadcast_copies(source: torch.Tensor = source, fulls: list[torch.Tensor] = fulls) -> None:
            for full in fulls:
                full.copy_(source, non_blocking=True)

        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "broadcast": (lambda s=source, f=fulls: comm.broadcast(s, f), broadcast_copies),
            "gather": (lambda p=parts, h=host: comm.gather(p, split, h), copies_to_host),
            "all_gather": (lambda p=parts, f=fulls: comm.all_gather(p, split, f), copies_to_all),
        }
        for name, (ours, theirs) in pairs.items():
            row = {
                "operation": name,
                "rows": rows,
                "unit": "us",
                "tp_rs": total_time(ours),
                "torch copies": total_time(theirs),
            }
            results.append(row)
        if torch.cuda.device_count() > 1 and len(set(devices)) > 1:
            indices = [int(device.rpartition(":")[2]) for device in devices]
            results[-3]["torch.cuda.comm"] = total_time(
                lambda s=source, i=indices: torch.cuda.comm.broadcast(s, i)
            )
    return results


def calls(devices: list[str], launch: Path | None) -> list[dict[str, Any]]:
    """Host time of one call from Python."""
    comm = tp_rs.Communicator(devices)
    tensors = [torch.zeros(1, COLUMNS, dtype=torch.float16, device=device) for device in devices]
    row: dict[str, Any] = {
        "operation": "host time of all_reduce",
        "rows": 1,
        "unit": "us",
        "tp_rs": host_time(lambda: comm.all_reduce(tensors)),
        "one torch operation": host_time(lambda: tensors[0].add_(1)),
    }
    own = tp_rs.Communicator(devices, streams=comm.streams)
    row["tp_rs, a stream a rank"] = host_time(lambda: own.all_reduce(tensors))
    if launch is not None:
        row |= json.loads(launch.read_text(encoding="utf-8").strip().splitlines()[-1])
    return [row]


def show(results: list[dict[str, Any]]) -> None:
    """One line a result, each number also as a ratio to ours."""
    for row in results:
        ours = row["tp_rs"]
        numbers = {name: value for name, value in row.items() if isinstance(value, float) and name != "tp_rs"}
        others = "  ".join(f"{name} {value:.1f} ({ours / value:.2f}x)" for name, value in numbers.items())
        print(f"{row['operation']:<24} {row['rows']:>5} rows  tp_rs {ours:8.2f} {row['unit']:<14} {others}")  # noqa: T201


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """All-reduce over size."""
    import matplotlib.pyplot as plt  # noqa: PLC0415  only for those who want the picture

    figure, axes = plt.subplots()
    chosen = [row for row in results if row["operation"] == "all_reduce"]
    for name in ("tp_rs", "pushed", "divided", "NCCL"):
        points = [(row["rows"] * COLUMNS * 2, row[name]) for row in chosen if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="bytes a rank", ylabel="microseconds", title="all_reduce")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Time everything and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks; on one GPU they share it")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--plot", type=Path, help="write a picture of all_reduce here (needs matplotlib)")
    parser.add_argument("--launch", type=Path, help="what the bench cuda_launch printed")
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    devices = [f"cuda:{rank if gpus >= arguments.ranks else 0}" for rank in range(arguments.ranks)]
    results = [*calls(devices, arguments.launch), *sums(devices), *moves(devices)]
    print(f"{torch.cuda.get_device_name(0)}, ranks on {', '.join(devices)}; in brackets: ours over theirs")  # noqa: T201
    show(results)
    if arguments.json is not None:
        card = torch.cuda.get_device_name(0)
        arguments.json.write_text(
            json.dumps({"card": card, "devices": devices, "results": results}, indent=1)
        )
    if arguments.plot is not None:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
