"""Plans of about two to one: the same tokens as without, and models that are larger than either budget."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from models_common import (  # noqa: E402  torch and transformers may be missing
    DEVICE,
    above,
    assert_captured,
    limited,
    made,
    off,
    prompt,
    settled,
    whole,
    within,
)
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import tp_rs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

MIB, GIB = 1 << 20, 1 << 30
NEW = 4
SHARES = 420 * MIB, 220 * MIB
"""What two ranks may have beside the framework, for weights of 543 MiB."""
LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 16,
    "vocab_size": 16000,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "eos_token_id": None,
}
ROUNDED = 0.25
"""How far logits in bfloat16 may be off, in standard deviations: ranks round what they sum."""


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi3"])
def test_two_to_one_gives_the_tokens_of_the_whole_model_and_of_one_rank(tmp_path, architecture, place):
    model = made(architecture)
    model.save_pretrained(tmp_path)
    given = prompt(model)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = whole(model).generate(**given, **options)
    room = {"context": 64, "batch": 2, "cache": "fp32", "weights": torch.float32}
    one = tp_rs.plan(tmp_path, [2.0], devices=place.devices(1), **room)
    two = tp_rs.plan(tmp_path, [2.0] * 2, devices=place.devices(2), speeds=[2.0, 1.0], **room)
    assert [end - start for _, start, end in two.kv_split] == [2, 1]
    for plan in (one, two):
        for capture in (False, True):
            front = tp_rs.load(tmp_path, plan=plan, capture=capture)
            try:
                # Twice: recorded in the first one, replayed in the second.
                for _ in range(2):
                    for generate in (front.generate, front.generate_fast):
                        got = generate(**given, **options)
                        assert torch.equal(got, expected), (len(plan.ranks), capture, generate)
                if capture:
                    assert_captured(front)
            finally:
                front.unload()


def large() -> Any:
    """A model on the GPU that is too large for either share."""
    kind: Any = LlamaForCausalLM
    with torch.device(DEVICE):
        return kind._from_config(LlamaConfig(**LARGE), dtype=torch.bfloat16).eval()  # noqa: SLF001  no public name


def plan_for(folder: Any, devices: list[str]) -> Any:
    """The largest context for two ranks with `SHARES`, whatever the framework takes on their devices."""
    options = {"devices": devices, "chunk": 512, "weights": torch.bfloat16}
    ample = tp_rs.plan(folder, [64.0] * 2, context=64, **options)
    budgets = [
        (rank.items["framework"] + share) / GIB for rank, share in zip(ample.ranks, SHARES, strict=True)
    ]
    for budget, device in zip(budgets, devices, strict=True):
        alone = {**options, "devices": [device]}
        assert not tp_rs.plan(folder, [budget], context=64, **alone).fits
    return tp_rs.plan(folder, budgets, context="max", **options)


def test_a_model_that_neither_budget_holds_runs_its_whole_context_within_the_plan(tmp_path, place):
    model = large()
    weights = sum(each.nbytes for each in model.parameters())
    model.save_pretrained(tmp_path)
    few = torch.randint(3, LARGE["vocab_size"], (1, 100), device=DEVICE)
    with torch.no_grad():
        expected = model(input_ids=few).logits.cpu()
    del model
    before, _ = settled(place)
    plan = plan_for(tmp_path, place.devices(2))
    assert 600 < plan.context < LARGE["max_position_embeddings"], plan
    first, second = (
        sum(rank.items[item] for item in ("attention", "mlp", "embedding", "head")) for rank in plan.ranks
    )
    assert 1.7 < first / second < 2.3, plan
    allowed = within(plan)
    assert place.gpus == 1 or max(allowed.values()) < weights
    with limited(allowed):
        front = tp_rs.load(tmp_path, plan=plan)
        ids = torch.randint(3, LARGE["vocab_size"], (1, plan.context - NEW), device=DEVICE)
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        for generate in (front.generate, front.generate_fast):
            got = generate(ids, attention_mask=torch.ones_like(ids), **options)
            assert got.shape == (1, plan.context)
            assert torch.equal(got[:, : ids.shape[1]], ids)
    with torch.no_grad():
        assert off(front(input_ids=few).logits, expected) <= ROUNDED
    del got
    front.unload()
    del ids
    assert above(settled(place)[0], before) < MIB
