"""Times tp_rs beside the reference's arithmetic in Python, on the same models and budgets, in one run.

The arithmetic is written here from its description in `src/split/reference.rs`: largest remainders, shares
below the minimum levelled up, budgets charged in whole MiB a layer. tp_rs also accounts for the memory of
every rank and searches the largest context in the same call. Run it with `make bench`.
"""

from __future__ import annotations

import json
import sys
import timeit
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tp_rs

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIGS = Path(__file__).parent.parent / "tests" / "data" / "configs"
BUDGETS = [24.0, 12.0, 8.0, 16.0, 24.0, 10.0, 11.0, 12.0, 6.0, 24.0, 16.0, 8.0, 12.0, 20.0, 16.0, 10.0]
CONTEXT = 4096


def apportion(total: int, ratios: list[float], minimum: int = 0) -> list[int]:
    """Largest remainders; shares below `minimum` go, a unit at a time, to the smallest that is left."""
    whole = sum(ratios)
    exact = [total * ratio / whole for ratio in ratios]
    shares = [int(share) for share in exact]
    rest = [e - s for e, s in zip(exact, shares, strict=True)]
    for _ in range(total - sum(shares)):
        index = rest.index(max(rest))
        shares[index] += 1
        rest[index] -= 1
    freed = sum(share for share in shares if share < minimum)
    shares = [0 if share < minimum else share for share in shares]
    for _ in range(freed):
        smallest = min((share for share in shares if share), default=None)
        shares[-1 if smallest is None else shares.index(smallest)] += 1
    return shares


def splits(config: dict[str, Any], budgets: list[float], footprint: int) -> list[list[int]]:
    """KV heads, intermediate, residual and vocabulary shares."""
    heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    left = [gib * 1024 for gib in budgets]
    kv = apportion(heads, left)
    parts = [share / heads for share in kv]
    for charge in [2 * 2 * heads * dim * layers * CONTEXT] + [footprint] * layers:
        left = [max(0, b - int(charge * part / 1024**2)) for b, part in zip(left, parts, strict=True)]
    return [
        kv,
        apportion(config["intermediate_size"] // 128, left, 2),
        apportion(config["hidden_size"] // 32, left, 8),
        apportion((config["vocab_size"] + 31) // 32, left, 16),
    ]


def row(name: str, ranks: int) -> str:
    """One row: microseconds a call, the best of five times fifty."""
    config = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    shape = tp_rs.ModelShape.from_config(config)
    attention = sum(tensor.bytes for tensor in shape.tensors if tensor.role.startswith("attention"))
    budgets = [gib * (4 if name == "llama-3-70b" else 1) for gib in BUDGETS[:ranks]]
    calls: list[Callable[[], object]] = [
        partial(splits, config, budgets, attention // config["num_hidden_layers"]),
        partial(tp_rs.plan, shape, budgets, context=CONTEXT, strategy="exllamav2"),
        partial(tp_rs.plan, shape, budgets, context=CONTEXT),
    ]
    best = [min(timeit.repeat(call, number=50, repeat=5)) / 50 * 1e6 for call in calls]
    return f"{name:<14}{ranks:>6}{best[0]:>22.0f}{best[1]:>11.0f}{best[2]:>10.0f}\n"


def main() -> None:
    """Print the table."""
    out = sys.stdout
    out.write(
        f"{'model':<14}{'ranks':>6}{'arithmetic in Python':>22}{'exllamav2':>11}{'balanced':>10}   (us)\n"
    )
    for name in ("llama-3-8b", "llama-3-70b", "qwen3-8b"):
        for ranks in (2, 4, 16):
            out.write(row(name, ranks))


if __name__ == "__main__":
    main()
