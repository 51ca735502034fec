"""The models: shapes of known ones with random weights, whole and over ranks, so that nothing is fetched."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tp_rs
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
    from collections.abc import Sequence

    from tp_rs.integrations.transformers.splits import SplitSource

__all__ = ["CAPACITY", "DEVICE", "LLAMA_8B", "SMOLLM2_135M", "by_heads", "free", "over", "planned", "whole"]

DEVICE = torch.device("cuda:0")
CAPACITY = 4608
"""Tokens that caches have room for."""
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SMOLLM2_135M: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_TIMEOUT = 90.0
"""Seconds that ranks wait for each other: each compiles for itself."""


def by_heads(shape: dict[str, Any], kv: list[int]) -> Splits:
    """Splits with these KV heads, and everything else in the same proportions."""

    def share(whole: int) -> list[int]:
        parts = [whole * own // sum(kv) // 64 * 64 for own in kv]
        parts[0] += whole - sum(parts)
        return parts

    splits: Splits = Splits.of(
        kv=kv,
        intermediate=share(shape["intermediate_size"]),
        vocabulary=share(shape["vocab_size"]),
        groups=shape["num_attention_heads"] // shape["num_key_value_heads"],
    )
    return splits


def planned(shape: dict[str, Any], budgets: Sequence[float]) -> tp_rs.Plan:
    """The plan of a GPU a rank for these budgets in GiB.

    Raises:
        DoesNotFit: They are too small.
    """
    plan = tp_rs.plan(
        LlamaConfig(**shape),
        budgets,
        devices=[f"cuda:{rank}" for rank in range(len(budgets))],
        context=CAPACITY,
        weights=torch.float16,
    )
    plan.require_fit()
    return plan


def over(shape: dict[str, Any], splits: SplitSource, devices: Sequence[torch.device]) -> Any:
    """A float16 model with random weights that are made where they stay, over a rank a device."""
    config = LlamaConfig(**shape)
    layout = make_layout(make_skeleton(LlamaForCausalLM, config, torch.float16), splits, len(devices))
    ranks = Ranks(Communicator(devices, _TIMEOUT))
    models = []
    for rank, device in enumerate(devices):

        def build(self: Any, config: Any, *, rank: int = rank) -> None:
            LlamaForCausalLM.__init__(self, config)
            shrink(self, layout, rank)

        kind: Any = type("LlamaForCausalLM", (LlamaForCausalLM,), {"__init__": build})
        with torch.device(device):
            model = kind._from_config(config, dtype=torch.float16).eval()  # noqa: SLF001  no public name
        model.generation_config.eos_token_id = None
        _lay_together(model)
        wire(model, layout, ranks.link(rank), {})
        models.append(model)
    front = make_front(models, ranks, list(devices), layout.lead())
    front.tp_rs_runner.capture.room = Room(tokens=CAPACITY)
    return front


def _lay_together(model: Any) -> None:
    """Put weights into one piece where a loaded model has them so."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        for modules in (projections, [mlp.gate_proj, mlp.up_proj]):
            together = torch.cat([module.weight.detach() for module in modules])
            parts = together.split([len(module.weight) for module in modules])
            for module, part in zip(modules, parts, strict=True):
                module.weight = torch.nn.Parameter(part, requires_grad=False)


def whole(shape: dict[str, Any]) -> Any:
    """The same shape as transformers has it, on the first GPU."""
    with torch.device(DEVICE):
        kind: Any = LlamaForCausalLM
        model = kind._from_config(LlamaConfig(**shape), dtype=torch.float16).eval()  # noqa: SLF001  as above
    model.generation_config.eos_token_id = None
    return model


def free() -> None:
    """Give what is no longer used back."""
    gc.collect()
    torch.cuda.empty_cache()
