"""Tries the communicator's thresholds out on the GPUs that are here, and says which are best.

    python -m benches.gpus.tune [--ranks N] [--peers proved staged] [--knob NAME=VALUE,...] [--out FOLDER]

Every value of a knob is measured in turn with every other, in graphs, over all sizes. Printed are the times,
the value whose times are the shortest over all sizes together, and for thresholds the size from which the
other algorithm is faster. `--knob` tries values of any keyword of `tp_rs.Communicator` that takes a number.
What `--out` gets, tuned.json, says for which GPUs and links it holds.
"""

from __future__ import annotations

import argparse
import datetime as dt
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from . import catalogue as names
from .report import Table, number, save, size_of

KIB = 1024
MIB = 1024 * KIB
BUDGET_US = 15_000.0


class Knob(NamedTuple):
    """One keyword of `tp_rs.Communicator`, the values to try, and what they matter for."""

    name: str
    values: tuple[int | None, ...]
    operation: str = names.ALL_REDUCE
    peers: tuple[str, ...] = ("proved", "staged")
    rows: tuple[int, ...] = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 512, 2048)
    # Up to so many bytes one algorithm, above another one: 0 and the largest value tell where they cross.
    threshold: bool = False


NEVER = 1 << 40
LARGE = (8, 32, 64, 128, 256, 512, 1024, 2048, 4096)

# What the communicator takes no keyword for is left out with the reason. Copy engines carry only between two
# ranks: there the value that never lets them is not slower up to the size from which they are worth it.
KNOBS = (
    Knob("pushed_below", (None, 0, 16 * KIB, 64 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB), threshold=True),
    *(
        Knob("engines_above", (None, 0, MIB, 4 * MIB, NEVER), operation, ("staged",), LARGE, threshold=True)
        for operation in (names.ALL_REDUCE, names.BROADCAST, names.ALL_GATHER)
    ),
)


def crossing(pushed: dict[int, float], divided: dict[int, float]) -> int:
    """Bytes up to which the first is not slower, from the smallest size on without a gap."""
    below = 0
    for rows in sorted(pushed):
        if pushed[rows] > divided[rows]:
            break
        below = rows * names.COLUMNS * 2
    return below


def best(times: dict[int | None, dict[int, float]]) -> int | None:
    """The value with the least product of times: every size counts alike, whatever it takes."""
    return min(times, key=lambda value: sum(math.log(us) for us in times[value].values()))


def table(knob: Knob, peers: str, times: dict[int | None, dict[int, float]]) -> Table:
    """Times by value and size."""
    rows = sorted({row for line in times.values() for row in line})
    made = Table(f"{knob.name}, {knob.operation}, peers={peers}, us in a graph", ["", *map(size_of, rows)])
    for value, line in times.items():
        made.lines.append(
            ["as chosen" if value is None else str(value), *(number(line[row]) for row in rows)]
        )
    return made


def topology(devices: list[str]) -> dict[str, Any]:
    """The GPUs and what connects them."""
    import torch  # noqa: PLC0415

    try:
        links = subprocess.run(
            ["nvidia-smi", "topo", "-m"],  # noqa: S607  the driver's own tool
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        links = "unknown"
    return {
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "devices": devices,
        "cards": [torch.cuda.get_device_name(device) for device in devices],
        "links": links,
    }


class Tuner:
    """Communicators with one value each, measured in turns."""

    def __init__(self, devices: list[str], rounds: int) -> None:
        import torch  # noqa: PLC0415

        self.devices = devices
        self.rounds = rounds
        self.streams = [torch.cuda.Stream(device) for device in devices]

    def measure(self, knob: Knob, peers: Any) -> dict[int | None, dict[int, float]]:
        """Medians by value and rows. A `TypeError` says that there is no such keyword."""
        import tp_rs  # noqa: PLC0415

        made = {}
        for value in knob.values:
            options: dict[str, Any] = {} if value is None else {knob.name: value}
            made[value] = tp_rs.Communicator(self.devices, 10.0, peers=peers, **options)
        times: dict[int | None, dict[int, float]] = {value: {} for value in knob.values}
        for rows in knob.rows:
            for value, us in self._size(knob, rows, made).items():
                times[value][rows] = us
        return times

    def _size(self, knob: Knob, rows: int, made: dict[int | None, Any]) -> dict[int | None, float]:
        from . import timing  # noqa: PLC0415
        from .one_process import Work  # noqa: PLC0415

        work = Work(knob.operation, rows, self.devices, rows)
        graphs: dict[int | None, Any] = {}
        for value, comm in made.items():
            work.check(f"{knob.name}={value}", work.ours(comm))
            graphs[value] = timing.captured(work.ours_by_rank(comm), self.streams)
        taken: dict[int | None, list[float]] = {value: [] for value in made}
        replays = dict.fromkeys(made, 2)
        for turn in range(self.rounds + 1):
            for value in made:
                work.restore()
                us = timing.replay_time(graphs[value], self.streams, replays[value])
                if turn == 0:
                    fitting = int(BUDGET_US / (us * timing.IN_A_GRAPH))
                    replays[value] = min(max(fitting, 2), 20)
                else:
                    taken[value].append(us)
        return {value: statistics.median(rounds) for value, rounds in taken.items()}


def tune(tuner: Tuner, knob: Knob, peers: str) -> dict[str, Any]:
    """Measure one knob, print it, and return what the file gets."""
    head = {"knob": knob.name, "operation": knob.operation, "peers": peers}
    try:
        times = tuner.measure(knob, peers)
    except Exception as error:  # noqa: BLE001  the others are still worth measuring
        reason = f"{type(error).__name__}: {error}"
        sys.stdout.write(f"\n{knob.name}, peers={peers}: not measured: {reason}\n")
        return {**head, "missing": reason}
    chosen = best(times)
    sys.stdout.write(f"\n{table(knob, peers, times).text()}\n  best over all sizes: {chosen}\n")
    entry: dict[str, Any] = {
        **head,
        "us": {str(value): line for value, line in times.items()},
        "best": chosen,
    }
    if knob.threshold:
        numbers = [value for value in knob.values if value is not None]
        entry["crossing_bytes"] = crossing(times[max(numbers)], times[min(numbers)])
        sys.stdout.write(
            f"  {max(numbers)} is not slower than {min(numbers)} up to {entry['crossing_bytes']}\n"
        )
    return entry


def knob_of(text: str) -> Knob:
    """A knob from the command line; the default is tried beside what is asked for."""
    name, equals, values = text.partition("=")
    try:
        numbers = [int(value) for value in values.split(",")]
    except ValueError:
        numbers = []
    if not name.isidentifier() or not equals or not numbers:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted NAME=NUMBER,NUMBER,...")
    return Knob(name, (None, *numbers))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, help="ranks; as many as there are GPUs if left out, at least 2")
    parser.add_argument("--peers", nargs="+", default=["proved", "staged"], choices=["proved", "staged"])
    parser.add_argument("--knob", nargs="+", type=knob_of, default=KNOBS, help="what to try instead of all")
    parser.add_argument("--rounds", type=int, default=5, help="turns of which medians are taken")
    parser.add_argument("--out", type=Path, help="a folder for tuned.json")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure every knob and print what is best."""
    arguments = parse()
    import os  # noqa: PLC0415

    # Several ranks of one GPU need hardware queues of their own (docs/communicator.md).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    import torch  # noqa: PLC0415

    count = torch.cuda.device_count()
    if count == 0:
        raise SystemExit("no CUDA device: nothing to tune")
    ranks = arguments.ranks or max(2, count)
    devices = [f"cuda:{rank % count}" for rank in range(ranks)]
    from . import timing  # noqa: PLC0415

    timing.warm(devices)
    facts = topology(devices)
    cards = ", ".join(sorted(set(facts["cards"])))
    sys.stdout.write(f"{cards}; ranks on {', '.join(devices)}; {facts['date']}\n{facts['links']}\n")
    tuner = Tuner(devices, arguments.rounds)
    knobs = []
    for knob in arguments.knob:
        knobs += [tune(tuner, knob, peers) for peers in knob.peers if peers in arguments.peers]
    if arguments.out is not None:
        save(arguments.out, "tuned.json", {**facts, "knobs": knobs})


if __name__ == "__main__":
    main()
