"""Collectives between GPUs, beside NCCL, torch's symmetric memory, torch.cuda.nccl and torch.cuda.comm.

    python -m benches.gpus [--ranks N] [--only OPERATION ...] [--out FOLDER] [--launch FILE]

From the repository's root, with tp_rs installed or on PYTHONPATH. On one GPU the ranks share it, and what
needs a GPU a rank is left out with the reason. `--out` gets results.json, tables.md, all_reduce.png and the
processes' logs. `--launch` takes the line that the bench `cuda_launch` prints, and puts the host time of a
call beside bare launches.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from . import catalogue as names
from . import report
from .workers import FailedError, Group

BUDGET_US = 25_000.0
FEWEST = {names.GRAPH: 2, names.EAGER: 5, names.HOST: 1}
MOST = {names.GRAPH: 20, names.EAGER: 200, names.HOST: 1}
OPERATIONS_EACH = {names.GRAPH: 20, names.EAGER: 1, names.HOST: 1}


def say(text: str = "") -> None:
    """To the terminal or the log."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def gpus() -> list[str]:
    """The names of the GPUs that this process and its children see, asked in a process of its own."""
    code = (
        "import json; from torch import cuda; "
        "print(json.dumps([cuda.get_device_name(i) for i in range(cuda.device_count())]))"
    )
    done = subprocess.run(  # noqa: S603  this interpreter
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode != 0:
        raise SystemExit(f"torch found no CUDA device: {done.stderr.strip().splitlines()[-1:]}")
    found: list[str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


def about(cards: list[str], devices: list[str], rounds: int) -> dict[str, Any]:
    """What the figures belong to."""
    import torch  # noqa: PLC0415  after the arguments are known to be good

    try:
        tp_rs = metadata.version("tp_rs")
    except metadata.PackageNotFoundError:
        tp_rs = "unknown"
    return {
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "command": shlex.join(["python", "-m", str(__package__), *sys.argv[1:]]),
        "cards": cards,
        "devices": devices,
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "torch": torch.__version__,
        # As built in; asking needs no device.
        "nccl": ".".join(map(str, torch.cuda.nccl.version()[:3])) if torch.version.cuda else "none",
        "tp_rs": tp_rs,
        "rounds": rounds,
    }


class Bench:
    """Takes turns between the processes, and keeps what they say."""

    def __init__(self, devices: list[str], folder: Path, rounds: int, seconds: float) -> None:
        self.devices = devices
        self.rounds = rounds
        self.until = time.monotonic() + seconds
        self.groups = {
            kind: Group(kind, devices, folder) for kind in (names.ONE, names.RANKS, names.RANKS_OFF)
        }
        self.results: list[report.Result] = []
        # Who failed once is not asked again: its processes would have to be started anew each time.
        self.failed: dict[names.Candidate, str] = {}

    def spawn(self, operations: list[str]) -> None:
        """Let all processes that will be needed start at the same time."""
        for kind, group in self.groups.items():
            if any(
                one.group == kind and one.operation in operations and not names.why_not(one, self.devices)
                for one in names.CANDIDATES
            ):
                group.spawn()

    def size(self, operation: str, rows: int) -> None:
        """Measure all candidates of an operation at one size, in turns."""
        results = [report.Result(one, rows) for one in names.CANDIDATES if one.operation == operation]
        self.results += results
        for result in results:
            candidate = result.candidate
            result.missing = names.why_not(candidate, self.devices) or self.failed.get(candidate)
        repeats: dict[names.Candidate, int] = {}
        for turn in range(self.rounds + 1):
            for result in results[turn % len(results) :] + results[: turn % len(results)]:
                if result.missing is not None:
                    continue
                if time.monotonic() > self.until:
                    result.missing = None if result.rounds else "out of time"
                    continue
                mode = result.candidate.mode
                count = repeats.get(result.candidate, FEWEST[mode])
                us = self._ask(result, count)
                if us is None:
                    continue
                if turn == 0:
                    # The first turn only tells how many fit into a stretch.
                    fitting = int(BUDGET_US / max(us * OPERATIONS_EACH[mode], 1e-3))
                    repeats[result.candidate] = min(max(fitting, FEWEST[mode]), MOST[mode])
                else:
                    result.rounds.append(us)

    def _ask(self, result: report.Result, repeats: int) -> float | None:
        candidate = result.candidate
        command = {
            "do": "measure",
            "operation": candidate.operation,
            "mode": candidate.mode,
            "access": candidate.access,
            "name": candidate.name,
            "rows": result.rows,
            "repeats": repeats,
            "seed": result.rows,
        }
        try:
            return self.groups[candidate.group].measure(command)
        except FailedError as error:
            reason = " ".join(str(error).split())[:160]
            say(f"   {candidate.name}, {candidate.operation} {candidate.mode}, {candidate.access}: {reason}")
            result.missing = f"failed at {result.rows} rows: {reason}"
            self.failed[candidate] = result.missing
            return None

    def end(self) -> None:
        """End all processes."""
        for group in self.groups.values():
            group.end()


def show(bench: Bench, facts: dict[str, Any], launch: dict[str, float], folder: Path) -> None:
    """Write the files and print the tables."""
    document = {**facts, "launch": launch, "results": [result.as_dict() for result in bench.results]}
    report.save(folder, "results.json", document)
    tables = report.tables(bench.results)
    tables += [
        table
        for table in (report.bandwidths(bench.results), report.launches(bench.results, launch))
        if table is not None
    ]
    heading = report.heading(facts)
    markdown = [*heading, *(table.markdown() for table in tables)]
    (folder / "tables.md").write_text("\n\n".join(markdown) + "\n", encoding="utf-8")
    try:
        why_not = report.plot(bench.results, folder / "all_reduce.png")
    except Exception as error:  # noqa: BLE001  a picture is no reason to lose the tables
        why_not = f"no picture: {type(error).__name__}: {error}"
    if why_not is not None:
        say(why_not)
    say()
    for line in heading:
        say(line)
    for table in tables:
        say()
        say(table.text())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, help="ranks; as many as there are GPUs if left out, at least 2")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names.OPERATIONS,
        metavar="OPERATION",
        help=f"operations to measure, all if left out: {', '.join(map(repr, names.OPERATIONS))}",
    )
    parser.add_argument("--rows", nargs="+", type=int, help="sizes to measure, of those that there are")
    parser.add_argument("--rounds", type=int, default=5, help="turns of which medians are taken")
    parser.add_argument("--seconds", type=float, default=400.0, help="measure for no longer than this")
    parser.add_argument("--out", type=Path, help="a folder for results, picture and logs")
    parser.add_argument("--launch", type=Path, help="what the bench cuda_launch printed")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure everything and show it."""
    arguments = parse()
    # What ends the program from outside must end the processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    launch: dict[str, float] = {}
    if arguments.launch is not None:
        line = arguments.launch.read_text(encoding="utf-8").strip().splitlines()[-1]
        launch = {name: float(us) for name, us in json.loads(line).items() if name.endswith("_us")}
    cards = gpus()
    if not cards:
        raise SystemExit("no CUDA device: nothing to measure")
    ranks = arguments.ranks or max(2, len(cards))
    devices = [f"cuda:{rank % len(cards)}" for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        facts = about(cards, devices, arguments.rounds)
        bench = Bench(devices, folder, arguments.rounds, arguments.seconds)
        try:
            operations = arguments.only or list(names.OPERATIONS)
            bench.spawn(operations)
            for operation in operations:
                started = time.monotonic()
                for rows in names.rows_of(operation):
                    if arguments.rows is None or rows in arguments.rows or operation == names.CALL:
                        bench.size(operation, rows)
                say(f"== {operation}: {time.monotonic() - started:.0f} s")
        finally:
            # Tables first: processes that hang take a while to end.
            try:
                show(bench, facts, launch, folder)
            finally:
                bench.end()
    ours = [candidate for candidate in bench.failed if candidate.name.startswith(names.OURS)]
    if ours:
        raise SystemExit(f"tp_rs failed in {len(ours)} of its ways; the tables say which")


if __name__ == "__main__":
    main()
