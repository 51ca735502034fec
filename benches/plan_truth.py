"""What a plan says that ranks on GPUs take, beside what they take.

    python benches/plan_truth.py [--json FILE] [--only NAME] [--quick] [--full]

Models have few layers, the proportions of real ones and weights of zeros: what lies in memory does not
depend on the values. `--full` adds two with all their layers. Each shape has a process of its own, and with
all layers another one, as what the driver keeps for kernels grows from model to model.

Each case loads one over its ranks, fills the context with a prompt in chunks and some decoded tokens, once
with recorded steps and once without, and compares the plan's bytes of all ranks with the most that torch's
tensors took and what the process took on the device besides (context, kernels, the communicator). The blocks
that `load` has torch take ahead are no such tensors; what the driver had given the process with all of them
is shown as well (`held`). Then it does so twice more with torch's allocator held to the plan's bytes, with
recorded steps and without, and must not run out of memory. Whether there was room to record the steps is
said, too.
Needs one GPU with 70 GB free, torch, transformers and accelerate.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import itertools
import json
import multiprocessing
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tp_rs
from tp_rs.integrations.transformers import load

DEVICE = "cuda:0"
NEW_TOKENS = 8
FIRST_RANK_BYTES, FURTHER_RANK_BYTES = 96 << 20, 64 << 20
"""Bytes of the framework's item that torch's allocator takes, for a device's first rank and further ones."""
STUCK = 120
"""Seconds after which a case has hung."""
MIB = 1 << 20
WEIGHTS = ("attention", "mlp", "experts", "embedding", "head", "replicated")
HALF = 2
"""Bytes of an element that is not float32."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen2": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "qwen3": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "gemma3_text": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 1024,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "phi3": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 0,
    },
    "mixtral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
    },
    "qwen3_moe": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 2,
    },
}

FULL: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 32, "vocab_size": 128256},
    "qwen2": {"num_hidden_layers": 28, "vocab_size": 152064},
}
"""What a model of 7 to 8 billion weights has more of."""


@dataclass
class Case:
    """What is planned and run."""

    name: str
    context: int
    batch: int = 1
    chunk: int = 2048
    ranks: int = 1
    padded: bool = False
    dtype: str = "bfloat16"
    full: bool = False


@dataclass
class Found:
    """Bytes of all ranks."""

    case: Case
    device: str = ""
    planned: int = 0
    items: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    """Most that tensors took without recorded steps."""
    kept: int = 0
    """Most that torch's allocator had taken from the driver with recorded steps, free blocks counted."""
    loaded: int = 0
    """What tensors took after loading."""
    beside: int = 0
    """On the device, not through the allocator."""
    limited: str = ""
    """Whether it ran within the plan's bytes."""
    steps: str = ""
    """Which steps could be recorded within them."""
    eager: str = ""
    """Whether it ran within them without recorded steps."""

    @property
    def taken(self) -> int:
        """What the process needed at most."""
        return self.tensors + self.beside

    @property
    def held(self) -> int:
        """What the driver had given it at most with recorded steps, with blocks that torch keeps."""
        return self.kept + self.beside

    @property
    def ratio(self) -> float:
        """The plan over what was needed."""
        return self.planned / self.taken


def cases(*, quick: bool, full: bool) -> list[Case]:
    """All of them: every shape at several contexts and batch sizes."""
    found = []
    for name in SHAPES:
        found += [
            Case(name, 8192),
            Case(name, 2048, batch=4, padded=True),
            Case(name, 4096, chunk=512, ranks=2),
        ]
        if not quick:
            found += [Case(name, 32768), Case(name, 8192, padded=True, ranks=3), Case(name, 1000)]
    found += [Case("llama", 2048, dtype="float32"), Case("phi3", 2048, dtype="float32", ranks=2)]
    for name in FULL if full else ():
        found += [Case(name, 8192, full=True), Case(name, 2048, batch=4, padded=True, full=True)]
    return found


def empty_model(case: Case) -> Any:
    """A model of zeros on the CPU, whose pages do not exist until they are written."""
    values = {
        "vocab_size": 64000,
        "num_hidden_layers": 4,
        "max_position_embeddings": 65536,
        **SHAPES[case.name],
        **(FULL[case.name] if case.full else {}),
    }
    config = CONFIG_MAPPING[case.name](**values)
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[case.name])
    with torch.device("meta"):
        model = kind._from_config(config, dtype=getattr(torch, case.dtype))  # noqa: SLF001  no public name
    model = model.to_empty(device="cpu")
    model.tie_weights()
    return model


def beside() -> int:
    """Bytes in use on the device that are not the allocator's."""
    free, total = torch.cuda.mem_get_info(DEVICE)
    return total - free - torch.cuda.memory_reserved(DEVICE)


def generate(front: Any, case: Case) -> None:
    """Fill the context."""
    ids = torch.zeros(case.batch, case.context - NEW_TOKENS, dtype=torch.long, device=DEVICE)
    mask = torch.ones_like(ids)
    if case.padded:
        mask[0, :3] = 0
    front.generate(
        input_ids=ids,
        attention_mask=mask,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    torch.cuda.synchronize()


def clear() -> None:
    """Give back what torch keeps for later."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(DEVICE)


def measure(case: Case) -> Found:
    """Run one case, and once more within the plan's bytes."""
    clear()
    found = Found(case, torch.cuda.get_device_name(DEVICE))
    model = empty_model(case)
    budgets = [70.0 / case.ranks] * case.ranks
    dtype = getattr(torch, case.dtype)
    plan = tp_rs.plan(
        model.config,
        budgets,
        devices=[DEVICE] * case.ranks,
        context=case.context,
        batch=case.batch,
        chunk=case.chunk,
        cache="fp32" if dtype.itemsize > HALF else "fp16",
        weights=dtype,
    )
    found.planned = sum(rank.total for rank in plan.ranks)
    for rank in plan.ranks:
        for item, count in rank.items.items():
            found.items[item] = found.items.get(item, 0) + count
    clear()
    front = load(model, plan=plan, check=False)
    found.loaded = torch.cuda.memory_allocated(DEVICE)
    generate(front, case)
    generate(front, case)
    found.beside = beside()
    found.kept = torch.cuda.max_memory_reserved(DEVICE)
    front.unload()
    del front
    found.tensors, later = eager(case, model, plan)
    found.beside = max(found.beside, later)
    clear()
    # The context grows from case to case, which no plan is for.
    torchs = FIRST_RANK_BYTES + (case.ranks - 1) * FURTHER_RANK_BYTES
    besides = found.items.get("framework", 0) + found.items.get("communicator", 0) - torchs
    allowed = found.planned - min(found.beside, besides)
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info(DEVICE)[1], DEVICE)
    try:
        found.limited, found.steps = limited(case, model, plan)
        found.eager, _ = limited(case, model, plan, capture=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    return found


def eager(case: Case, model: Any, plan: Any) -> tuple[int, int]:
    """The most bytes that tensors take in a generation without recorded steps, and those beside them."""
    clear()
    front = load(model, plan=plan, check=False, capture=False)
    # The blocks that are taken ahead count as tensors while they are taken.
    generate(front, case)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    generate(front, case)
    found = torch.cuda.max_memory_allocated(DEVICE), beside()
    front.unload()
    return found


def limited(case: Case, model: Any, plan: Any, *, capture: bool | None = None) -> tuple[str, str]:
    """Whether a case runs with the memory that there is, and which of its steps are recorded."""
    clear()
    front, steps = None, "none"
    try:
        front = load(model, plan=plan, check=False, capture=capture)
        generate(front, case)
        captured = front.tp_rs_runner.capture.ready(1, 1)
        if captured is not None:
            without = {True: "decoding", False: "prompts"}
            steps = "all" + "".join(f" but {without[each]}" for each in sorted(captured.failures))
    except (torch.OutOfMemoryError, tp_rs.DoesNotFit) as error:
        return f"FAILED: {str(error)[:200]}", steps
    finally:
        # Else its workspace of matrix products would still be there in the next case.
        if front is not None:
            front.unload()
    return "ran", steps


def row(found: Found) -> str:
    """A line of the table, in MiB."""
    case, items = found.case, found.items
    weights = sum(items.get(item, 0) for item in WEIGHTS)
    activations = items.get("activations", 0) + items.get("logits", 0)
    measured = found.tensors - found.loaded - items.get("kv_cache", 0)
    settings = f"{case.context} x {case.batch} by {case.chunk}, {case.dtype}, {case.ranks} ranks"
    settings += ", padded" * case.padded + ", all layers" * case.full
    cells = [
        f"{case.name:12}{settings:60}",
        f"plan {found.planned / MIB:6.0f}",
        f"taken {found.taken / MIB:6.0f}",
        f"ratio {found.ratio:5.3f}",
        f"held {found.held / MIB:6.0f}",
        f"weights {weights / MIB:6.1f} {found.loaded / MIB:6.1f}",
        f"cache {items.get('kv_cache', 0) / MIB:6.1f}",
        f"activations {activations / MIB:6.1f} {measured / MIB:6.1f}",
        f"beside {found.beside / MIB:5.1f}",
        f"within the plan: {found.limited}, {found.steps} recorded; without steps: {found.eager}",
    ]
    return "  ".join(cells)


def measure_all(chosen: list[Case], results: Any) -> None:
    """Run cases in this process."""
    logs: Any = transformers.logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    for case in chosen:
        # A rank that waits for ever would keep the machine.
        faulthandler.dump_traceback_later(STUCK, exit=True)
        results.put(measure(case))
        faulthandler.cancel_dump_traceback_later()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    parser.add_argument("--only", choices=SHAPES, help="one shape")
    parser.add_argument("--quick", action="store_true", help="fewer contexts")
    parser.add_argument("--full", action="store_true", help="models of 8 billion weights too")
    return parser.parse_args()


def main() -> None:
    """Run the cases and print the table."""
    options = parse()
    spawned = multiprocessing.get_context("spawn")
    found: list[Found] = []
    failed = False
    every = cases(quick=options.quick, full=options.full)
    every = [case for case in every if options.only in {None, case.name}]
    for name, full in itertools.product(SHAPES, (False, True)):
        chosen = [case for case in every if (case.name, case.full) == (name, full)]
        if not chosen:
            continue
        results = spawned.SimpleQueue()
        process = spawned.Process(target=measure_all, args=(chosen, results))
        process.start()
        while process.is_alive() or not results.empty():
            if results.empty():
                process.join(0.1)
                continue
            found.append(results.get())
            print(row(found[-1]), flush=True)  # noqa: T201
            if options.json:
                text = json.dumps([{**asdict(each), "ratio": each.ratio} for each in found], indent=2)
                options.json.write_text(text, encoding="utf-8")
        failed |= process.exitcode != 0
    if failed or not found:
        sys.exit("not every case could be measured")
    ratios = [each.ratio for each in found]
    print(  # noqa: T201
        f"{found[0].device}; MiB; plan over what was taken: {min(ratios):.3f} to {max(ratios):.3f}"
    )
    if min(ratios) < 1 or any({each.limited, each.eager} != {"ran"} for each in found):
        sys.exit("a plan was too small")


if __name__ == "__main__":
    main()
