"""A plan that fits is enough: with no more memory than it counts, the whole of its context can be used."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from models_common import DEVICE, limited, made, settled  # noqa: E402  torch and transformers may be missing

import tp_rs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

NEW = 4
RANK_BYTES = 64 << 20
"""Bytes of the framework's item that torch's allocator takes, for each rank."""


def saved(folder: Any, architecture: str) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 1536,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 4000,
        "max_position_embeddings": 32768,
    }
    if architecture == "gemma3_text":
        sizes["sliding_window"] = 512
    model = made(architecture, **sizes).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("architecture", "ranks"), [("llama", 1), ("llama", 2), ("gemma3_text", 1), ("qwen3", 3)]
)
def test_the_largest_context_can_be_used_within_the_plan(tmp_path, architecture, ranks):
    saved(tmp_path, architecture)
    budgets = [1.04] + [0.38] * (ranks - 1)
    devices = ["cuda:0"] * ranks
    plan = tp_rs.plan(
        tmp_path, budgets, devices=devices, context="max", batch=2, chunk=512, weights=torch.bfloat16
    )
    assert 600 < plan.context < 32768, plan
    # What the tests before have left in the context is none of the plan's.
    tensors = sum(
        rank.total - rank.items["framework"] - rank.items.get("communicator", 0) for rank in plan.ranks
    )
    settled()
    with limited(torch.cuda.memory_reserved(DEVICE) + tensors + ranks * RANK_BYTES):
        front = tp_rs.load(tmp_path, plan=plan)
        for rows in (2, 1):
            ids = torch.randint(3, 4000, (rows, plan.context - NEW), device=DEVICE)
            mask = torch.ones_like(ids)
            mask[0, :5] = 0
            got = front.generate(
                input_ids=ids,
                attention_mask=mask,
                min_new_tokens=NEW,
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
            assert got.shape == (rows, plan.context)
        with pytest.raises(tp_rs.InvalidInput, match="the model was loaded for"):
            front.generate(input_ids=ids, max_new_tokens=NEW + 1, pad_token_id=0)
        front.unload()


def test_load_takes_the_largest_context(tmp_path):
    saved(tmp_path, "llama")
    front = tp_rs.load(tmp_path, [1.04], devices=["cuda:0"], context="max")
    assert front.context_limit == front.plan.context == front.plan.max_context
    assert front.plan.fits
    front.unload()
