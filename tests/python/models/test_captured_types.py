"""Which types generate in steps of fixed shapes, and that those say what the whole model says."""

import logging

import pytest
import torch
from architectures import built

from tp_rs.integrations.transformers import captured_check, load, selfcheck


@pytest.mark.parametrize("architecture", ["qwen3_next", "llama4_text"])
def test_types_without_static_steps_run_as_before(architecture, caplog):
    model = built(architecture)
    front = load(model, plan=selfcheck.uneven(model.config.get_text_config(), [2, 1]), capture=True)
    ids, mask = selfcheck.prompt(model)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    try:
        with caplog.at_level(logging.WARNING, "tp_rs.transformers"):
            for _ in range(2):
                assert torch.equal(front.generate(ids, **options), model.generate(ids, **options))
    finally:
        front.unload()
    assert len([1 for each in caplog.records if "not captured" in each.message]) == 1


def test_types_that_count_padding_have_no_steps():
    # Its decoder numbers columns, whatever the mask says; steps number tokens.
    model = built("whisper", seed=torch.seed() % 1000)
    assert "padding on the left changes its logits" in captured_check.settle(model)
    front = load(model, plan=selfcheck.uneven(model.config, [2, 1]), check=False, capture=True)
    ids, mask = selfcheck.prompt(model)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    try:
        assert torch.equal(front.generate(ids, **options), model.generate(ids, **options))
        assert torch.equal(front.generate_fast(ids, **options), model.generate(ids, **options))
    finally:
        front.unload()


# Windows, soft caps, sinks and experts; latent attention; learned positions; a head that scales.
@pytest.mark.parametrize(
    "architecture", ["mistral", "gemma3_text", "gpt_oss", "mixtral", "deepseek_v2", "gpt2", "cohere2"]
)
@pytest.mark.parametrize("kv", [(2, 1), (2, 0, 1)])
def test_static_steps_are_the_whole_model(architecture, kv):
    model = built(architecture, seed=torch.seed() % 1000)
    own = captured_check.settle(model)
    assert isinstance(own, bool), own
    assert captured_check.difference(model, own=own, kv=kv) <= selfcheck.TOLERANCE
