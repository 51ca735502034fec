"""Times models on one GPU beside transformers and beside their matrix products alone, in one run.

Random weights, so nothing is fetched. Writes JSON and prints a table:
`python benches/models_on_gpu.py [--json FILE] [--small] [--skip-compiled]`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from tp_rs import Communicator
from tp_rs.integrations.transformers import Splits
from tp_rs.integrations.transformers.captured import Room
from tp_rs.integrations.transformers.execution import Ranks
from tp_rs.integrations.transformers.front import make_front
from tp_rs.integrations.transformers.loader import make_skeleton
from tp_rs.integrations.transformers.rules import make_layout
from tp_rs.integrations.transformers.shrink import shrink
from tp_rs.integrations.transformers.wire import wire

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = torch.device("cuda:0")
CAPACITY = 4608
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
NO_END = {"eos_token_id": [], "pad_token_id": 0}


def made(shape: dict[str, Any], kv: list[int]) -> Any:
    """A float16 model with random weights that are made on the GPU, over ranks with these KV heads."""
    config = LlamaConfig(**shape)
    total = sum(kv)

    def share(whole: int) -> list[int]:
        parts = [whole * own // total // 64 * 64 for own in kv]
        parts[0] += whole - sum(parts)
        return parts

    splits = Splits.of(
        kv=kv,
        intermediate=share(config.intermediate_size),
        vocabulary=share(config.vocab_size),
        groups=shape["num_attention_heads"] // shape["num_key_value_heads"],
    )
    layout = make_layout(make_skeleton(LlamaForCausalLM, config, torch.float16), splits, len(kv))
    ranks = Ranks(Communicator([DEVICE] * len(kv), 30.0))
    models = []
    for rank in range(len(kv)):

        def build(self: Any, config: Any, *, rank: int = rank) -> None:
            LlamaForCausalLM.__init__(self, config)  # type: ignore[no-untyped-call]
            shrink(self, layout, rank)

        kind: Any = type("LlamaForCausalLM", (LlamaForCausalLM,), {"__init__": build})
        with torch.device(DEVICE):
            model = kind._from_config(config, dtype=torch.float16).eval()  # noqa: SLF001  no public name
        model.generation_config.eos_token_id = None
        wire(model, layout, ranks.link(rank), {})
        models.append(model)
    front = make_front(models, ranks, [DEVICE] * len(kv), layout.lead())
    front.tp_rs_runner.capture.room = Room(tokens=CAPACITY)
    return front


def unsharded(shape: dict[str, Any]) -> Any:
    """The same shape as transformers has it."""
    with torch.device(DEVICE):
        kind: Any = LlamaForCausalLM
        model = kind._from_config(LlamaConfig(**shape), dtype=torch.float16).eval()  # noqa: SLF001  as above
    model.generation_config.eos_token_id = None
    return model


def timed(work: Callable[[], object], rounds: int = 5, repeats: int = 4) -> float:
    """Milliseconds of one call: the median of several rounds."""
    for _ in range(2):
        work()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin) / repeats)
    return statistics.median(times)


def a_token(generate: Callable[[int], object], few: int = 8, many: int = 72) -> float:
    """Milliseconds a token: the difference of a long generation and a short one."""
    generate(few)
    lengths = {}
    for new in (few, many):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        generate(new)
        torch.cuda.synchronize()
        lengths[new] = time.perf_counter() - begin
    return 1e3 * (lengths[many] - lengths[few]) / (many - few)


def prompt(tokens: int) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(3, 40000, (1, tokens), device=DEVICE)


def by_generate(model: Any, ids: torch.Tensor, new: int) -> None:
    """So many tokens by transformers' loop."""
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
    )


def in_the_loop(front: Any, ids: torch.Tensor, new: int) -> None:
    """So many tokens by the loop of our own."""
    front.generate_fast(ids, max_new_tokens=new, **NO_END)


@torch.inference_mode()
def by_transformers(shape: dict[str, Any], found: dict[str, float], *, long: bool) -> None:
    """What transformers takes, and the matrix products of one token in a graph."""
    model = unsharded(shape)
    for tokens in (2048, 128) if long else ():
        ids = prompt(tokens)
        found[f"prefill_{tokens}"] = timed(partial(model, input_ids=ids, logits_to_keep=1))
    for context in (512, 4096) if long else (512,):
        ids = prompt(context - 40)
        found[f"decode_{context}"] = a_token(partial(by_generate, model, ids), 4, 36)
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {
        width: torch.randn(1, width, device=DEVICE, dtype=torch.float16)
        for width in {weight.shape[1] for weight in weights}
    }

    def products() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    products()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products()
    found["products"] = timed(graph.replay, repeats=20)


def ours(front: Any, found: dict[str, float], *, long: bool) -> None:
    """What prompts and tokens take over the front's ranks, and what recording took."""
    runner = front.tp_rs_runner
    begin = time.perf_counter()
    steps = runner.capture.ready(1, CAPACITY)
    for tokens in (2048, 128) if long else (128,):
        row = prompt(tokens)[0].cpu()
        steps.prefill([row], [0])
        torch.cuda.synchronize()
        found["record_seconds"] = time.perf_counter() - begin
    for tokens in (2048, 128) if long else ():
        row = prompt(tokens)[0].cpu()
        found[f"prefill_{tokens}"] = timed(partial(steps.prefill, [row], [0]))
    begin = time.perf_counter()
    front.generate_fast(prompt(128), max_new_tokens=3, **NO_END)
    torch.cuda.synchronize()
    found["record_seconds"] += time.perf_counter() - begin
    for context in (512, 4096) if long else (512,):
        ids = prompt(context - 40)
        found[f"decode_{context}"] = a_token(partial(in_the_loop, front, ids))
    ids = prompt(472)
    found["generate_512"] = a_token(partial(by_generate, front, ids))
    found["host_microseconds"] = host_time(steps)


def host_time(steps: Any) -> float:
    """Microseconds that the host works between two tokens of the loop: launching, and reading a token."""
    from tp_rs.integrations.transformers.fast import _Reader  # noqa: PLC0415  what is measured

    kind = ("greedy", False)
    times = []
    with steps.entered():
        step = steps.then(steps.decode_shape(1, 300), kind)
        reader = _Reader(steps.chooser(1), steps.recorder.stream(steps.lead))
        steps.place(1, [100])
        for _ in range(200):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            reader.put()
            launched = time.perf_counter() - begin
            torch.cuda.synchronize()
            begin = time.perf_counter()
            reader.get()
            times.append(1e6 * (launched + time.perf_counter() - begin))
    return statistics.median(times)


def free() -> None:
    """Give what is no longer used back."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--small", action="store_true", help="only the shape of SmolLM2-135M")
    parser.add_argument("--skip-compiled", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("no NVIDIA GPU, or no driver for it\n")
        return 2
    logs: Any = transformers.logging
    logs.set_verbosity_error()
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(DEVICE), "torch": torch.__version__}
    shapes = [("SmolLM2-135M", SMOLLM2_135M, [[3], [2, 1]], False)]
    if not options.small:
        shapes.insert(0, ("Llama-3-8B", LLAMA_8B, [[8], [5, 3]], True))
    for name, shape, cuts, long in shapes:
        found: dict[str, dict[str, float]] = {"transformers": {}}
        by_transformers(shape, found["transformers"], long=long)
        free()
        for kv in cuts:
            title = f"{len(kv)} rank{'s' if len(kv) > 1 else ''}"
            for compiled in (False,) if options.skip_compiled or len(kv) > 1 else (False, True):
                front = made(shape, kv)
                front.tp_rs_runner.capture.compiled = compiled
                column = f"{title}, compiled" if compiled else title
                found[column] = {}
                ours(front, found[column], long=long and len(kv) == 1)
                front.unload()
                del front
                free()
        figures[name] = found
        show(name, found)
        if options.json is not None:
            options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


ROWS = {
    "products": "matrix products of a token alone, ms",
    "decode_512": "a token at context 512, ms",
    "decode_4096": "a token at context 4096, ms",
    "generate_512": "the same by generate(), ms",
    "prefill_2048": "prompt of 2048, ms",
    "prefill_128": "prompt of 128, ms",
    "record_seconds": "recording all of it, s",
    "host_microseconds": "host's work a token, us",
}


def show(name: str, found: dict[str, dict[str, float]]) -> None:
    """Print the table of a shape."""
    table = Table(title=f"{name}, float16, random weights, batch 1")
    table.add_column("")
    for column in found:
        table.add_column(column, justify="right")
    for key, title in ROWS.items():
        if any(key in each for each in found.values()):
            values = [f"{each[key]:.2f}" if key in each else "" for each in found.values()]
            table.add_row(title, *values)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
