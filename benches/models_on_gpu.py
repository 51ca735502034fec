"""Times models on GPUs beside transformers and beside their matrix products alone, in one run.

Random weights, so nothing is fetched. Writes JSON and prints a table last.
`python benches/models_on_gpu.py [--json FILE] [--gpus N] [--small] [--skip-compiled] [--skip-processes]`

On one GPU: one rank, and two that share it, of two shapes. On several: the large shape over a rank a GPU with
even budgets and with budgets of two to one, beside one rank on one GPU, transformers there, and transformers'
own tensor parallelism with a process a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from decoding import processes
from decoding.shapes import DEVICE, LLAMA_8B, SMOLLM2_135M, by_heads, free, over, planned
from decoding.subjects import Found, by_transformers, ours, products_alone
from decoding.tables import derive, show
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

    from tp_rs.integrations.transformers.splits import SplitSource

EVEN = 64.0
"""GiB a rank, more than is needed: shares are equal then."""
TWO_TO_ONE = 12.0, 6.0
"""GiB of two ranks, of which Llama-3-8B in float16 needs nearly all."""
PROCESSES_SECONDS = 90.0
"""For transformers' processes to start, load and measure."""


class Figures:
    """All that was measured, written down after every column: what comes later may fail, or take too long.

    Args:
        gpus: How many are used.
        path: A file for them.
    """

    def __init__(self, gpus: int, path: Path | None) -> None:
        self._path = path
        self._progress = Console(stderr=True)
        self._all: dict[str, Any] = {
            "device": torch.cuda.get_device_name(DEVICE),
            "gpus": gpus,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self.failed = False

    def begin(self, name: str) -> dict[str, Found]:
        """The columns of a shape."""
        found: dict[str, Found] = {}
        self._all[name] = found
        return found

    def column(
        self, found: dict[str, Found], name: str, work: Callable[[Found], None], *, own: bool = True
    ) -> None:
        """Measure a column; what it fails of stands in its place.

        Args:
            found: The columns of its shape.
            name: What it is called.
            work: Puts figures into it.
            own: Whether it is ours, so that a failure is one of the run.
        """
        found[name] = {}
        begin = time.monotonic()
        try:
            work(found[name])
        except Exception as error:  # noqa: BLE001  of whatever kind, the other columns are measured
            found[name]["failed"] = f"{type(error).__name__}: {error}"
        self.failed |= own and bool(found[name].keys() & {"failed", "not_recorded"})
        free()
        self._progress.print(f"{name}: {time.monotonic() - begin:.0f} s", markup=False)
        self.write()

    def write(self) -> None:
        """Write all figures to the file."""
        if self._path is not None:
            self._path.write_text(json.dumps(self._all, indent=1) + "\n", encoding="utf-8")


def ranks(
    shape: dict[str, Any],
    splits: SplitSource,
    devices: list[torch.device],
    found: Found,
    *,
    compiled: bool,
    long: bool,
) -> None:
    """Measure a shape over ranks, and where they are on several GPUs their matrix products alone."""
    front = over(shape, splits, devices)
    try:
        front.tp_rs_runner.capture.compiled = compiled
        ours(front, found, long=long)
        if len(set(devices)) > 1 and not compiled:
            products_alone(front.tp_rs_runner.models, found)
    finally:
        front.unload()


def on_one(figures: Figures, *, small: bool, compile_too: bool) -> None:
    """One rank, and two that share the GPU."""
    shapes = [("SmolLM2-135M", SMOLLM2_135M, [[3], [2, 1]], False)]
    if not small:
        shapes.insert(0, ("Llama-3-8B", LLAMA_8B, [[8], [5, 3]], True))
    for name, shape, cuts, long in shapes:
        found = figures.begin(name)
        figures.column(found, "transformers", partial(by_transformers, shape, long=long), own=False)
        for kv in cuts:
            title = f"{len(kv)} rank{'s' if len(kv) > 1 else ''}"
            for compiled in (False, True) if compile_too and len(kv) == 1 else (False,):
                work = partial(
                    ranks,
                    shape,
                    by_heads(shape, kv),
                    [DEVICE] * len(kv),
                    compiled=compiled,
                    long=long and len(kv) == 1,
                )
                figures.column(found, f"{title}, compiled" if compiled else title, work)
        derive(found, {})
        figures.write()
        show(name, found)


def on_several(figures: Figures, gpus: int, *, compile_too: bool, processes_too: bool) -> None:
    """A rank a GPU, beside one rank on one GPU and beside transformers on one and on all."""
    found = figures.begin("Llama-3-8B")
    figures.column(found, "transformers", partial(by_transformers, LLAMA_8B, long=True), own=False)
    if processes_too:

        def apart(own: Found) -> None:
            own.update(processes.measure(LLAMA_8B, gpus, PROCESSES_SECONDS))

        figures.column(found, f"its {gpus} processes", apart, own=False)
    every = [torch.device("cuda", rank) for rank in range(gpus)]
    subjects: list[tuple[str, SplitSource, list[torch.device]]] = [
        ("1 GPU", by_heads(LLAMA_8B, [LLAMA_8B["num_key_value_heads"]]), every[:1]),
        (f"{gpus} GPUs", planned(LLAMA_8B, [EVEN] * gpus), every),
        ("2:1", planned(LLAMA_8B, TWO_TO_ONE), every[:2]),
    ]
    pairs = {}
    # What is compiled comes last: it takes longest.
    for compiled in (False, True) if compile_too else (False,):
        ending = ", compiled" if compiled else ""
        for title, splits, devices in subjects:
            work = partial(ranks, LLAMA_8B, splits, devices, compiled=compiled, long=True)
            figures.column(found, title + ending, work)
            if len(devices) > 1:
                pairs[title + ending] = f"1 GPU{ending}"
    derive(found, pairs)
    figures.write()
    show("Llama-3-8B", found)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--gpus", type=int, choices=(1, 2, 4, 8), help="2 where there are as many, else 1")
    parser.add_argument("--small", action="store_true", help="only the shape of SmolLM2-135M, on one GPU")
    parser.add_argument("--skip-compiled", action="store_true", help="without torch.compile")
    parser.add_argument(
        "--skip-processes", action="store_true", help="without transformers' own tensor parallelism"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("no NVIDIA GPU, or no driver for it\n")
        return 2
    there = torch.cuda.device_count()
    gpus = 1 if options.small else options.gpus or min(2, there)
    if gpus > there:
        parser.error(f"--gpus: got {gpus}, and torch sees {there}")
    logs: Any = transformers.logging
    logs.set_verbosity_error()
    figures = Figures(gpus, options.json)
    if gpus == 1:
        on_one(figures, small=options.small, compile_too=not options.skip_compiled)
    else:
        on_several(
            figures,
            gpus,
            compile_too=not options.skip_compiled,
            processes_too=not options.skip_processes,
        )
    return int(figures.failed)


if __name__ == "__main__":
    sys.exit(main())
