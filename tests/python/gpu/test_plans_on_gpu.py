"""A plan that fits is enough: with no more memory than it counts, the whole of its context can be used.

With recorded steps and without, and when a model is loaded again.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from models_common import (  # noqa: E402  they may be missing
    DEVICE,
    assert_captured,
    limited,
    made,
    settled,
    within,
)

import tp_rs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

NEW = 4


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
    # Experts' rows are wider than their gate and up; Mixtral makes float32 of them.
    if architecture in {"qwen3_moe", "mixtral"}:
        width = "moe_intermediate_size" if architecture == "qwen3_moe" else "intermediate_size"
        sizes |= {width: 256, "num_local_experts": 8, "num_experts_per_tok": 6}
    if architecture == "mixtral":
        sizes["sliding_window"] = None
    model = made(architecture, **sizes).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("architecture", "ranks", "place"),
    [
        ("llama", 1, "together"),
        ("llama", 2, "together"),
        ("llama", 2, "spread"),
        ("gemma3_text", 1, "together"),
        ("qwen3", 3, "together"),
        ("qwen3", 3, "spread"),
        ("qwen3_moe", 1, "together"),
        ("qwen3_moe", 2, "together"),
        ("mixtral", 1, "together"),
    ],
    indirect=["place"],
)
def test_the_largest_context_can_be_used_within_the_plan(tmp_path, architecture, ranks, place):
    saved(tmp_path, architecture)
    # The first rank of a device has the context of CUDA to pay for.
    budgets = [1.04 if rank < place.gpus else 0.38 for rank in range(ranks)]
    plan = tp_rs.plan(
        tmp_path,
        budgets,
        devices=place.devices(ranks),
        context="max",
        batch=2,
        chunk=512,
        weights=torch.bfloat16,
    )
    assert 600 < plan.context < 32768, plan
    settled(place)
    with limited(within(plan)):
        for capture in (None, False):
            fill(tp_rs.load(tmp_path, plan=plan, capture=capture), (2, 1), capture=capture)


@pytest.mark.parametrize(("architecture", "ranks"), [("qwen3_moe", 1), ("mixtral", 1), ("mixtral", 4)])
def test_experts_find_room_for_a_long_chunk_within_the_plan(tmp_path, architecture, ranks):
    # At a short context it is experts that make the most at once: attention does not hide them.
    saved(tmp_path, architecture)
    devices = [str(DEVICE)] * ranks
    plan = tp_rs.plan(
        tmp_path, [4.0] * ranks, devices=devices, context=2048, batch=4, chunk=8192, weights=torch.bfloat16
    )
    settled()
    with limited(within(plan)):
        for capture in (None, False):
            fill(tp_rs.load(tmp_path, plan=plan, capture=capture), (4,), capture=capture)


def fill(front, batches, *, capture):
    """Use all of the context with so many sequences at once, and unload the model."""
    try:
        for rows in batches:
            ids = torch.randint(3, 4000, (rows, front.context_limit - NEW), device=DEVICE)
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
            assert got.shape == (rows, front.context_limit)
        with pytest.raises(tp_rs.InvalidInput, match="the model was loaded for"):
            front.generate(input_ids=ids, max_new_tokens=NEW + 1, pad_token_id=0)
        if capture is not False:
            assert_captured(front)
    finally:
        front.unload()


def test_load_takes_the_largest_context(tmp_path):
    saved(tmp_path, "llama")
    front = tp_rs.load(tmp_path, [1.04], devices=["cuda:0"], context="max")
    assert front.context_limit == front.plan.context == front.plan.max_context
    assert front.plan.fits
    front.unload()
