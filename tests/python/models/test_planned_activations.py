"""The plan's activations are what transformers' modules have alive at once, at the sizes of real models.

Tensors are fake: they have sizes and no memory. On a GPU their peak was the same to a MiB
(benches/plan_truth.py).
"""

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import CONFIG_MAPPING, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tp_rs
from tp_rs.integrations.transformers.captured import _CHUNKS
from tp_rs.integrations.transformers.roomy import give_room

MIB = 1 << 20
FRAGMENTS = 8 / 7
"""What the plan adds for gaps."""
SHAPES = {
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
    },
    "phi3": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 0,
    },
    "gemma2": {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 4096,
    },
    "gemma3_text": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 1024,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
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
    },
}
COMMON = {"num_hidden_layers": 2, "vocab_size": 32000, "max_position_embeddings": 65536}


@pytest.mark.parametrize("step", _CHUNKS)
def test_short_prompts_are_counted_with_the_tokens_that_fill_up_their_step(step):
    config = COMMON | SHAPES["llama"] | {"model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 32}

    def planned(context, chunk):
        return tp_rs.plan(config, [70.0, 70.0], devices=["cuda:0", "cuda:1"], context=context, chunk=chunk)

    for context in (step // 4 + 1, step - 1, step):
        plan = planned(context, 8192)
        assert plan.buffer_bytes == step * 4096 * 2
        assert [rank.items for rank in plan.ranks] == [rank.items for rank in planned(context, step).ranks]
        # A chunk that is shorter than the step fills it up to its own size only.
        assert planned(context, step // 2).buffer_bytes == step // 2 * 4096 * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("context", "batch", "chunk"), [(8192, 1, 2048), (2048, 4, 2048), (32768, 1, 512)])
@pytest.mark.parametrize("architecture", list(SHAPES))
def test_activations_are_no_more_than_planned_and_not_much_less(architecture, context, batch, chunk):
    config = CONFIG_MAPPING[architecture](**COMMON, **SHAPES[architecture])
    plan = tp_rs.plan(
        config, [70.0], devices=["cuda:0"], context=context, batch=batch, chunk=chunk, weights=torch.bfloat16
    )
    items = plan.ranks[0].items
    measured = peak(config, architecture, context, batch, chunk // batch) - items["kv_cache"]
    planned = (items["activations"] + items["logits"]) / FRAGMENTS
    weights = sum(items.get(item, 0) for item in ("attention", "mlp", "experts", "embedding", "head"))
    assert measured <= planned + MIB
    # From a configuration alone it is not known whether gate and up are one tensor; and masks may be padded.
    assert planned - measured <= 0.02 * (weights * 10 + planned), f"{measured / MIB} of {planned / MIB}"


def peak(config, architecture, context, batch, own):
    """Bytes of the tensors that are alive at once, parameters left out, in the last chunk of the context."""
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = kind._from_config(config, dtype=torch.bfloat16).eval()  # noqa: SLF001  no public name
        cache = give_room(DynamicCache(config=config), context)
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layer in cache.layers:
            past = torch.empty(batch, heads, context - own, width, dtype=torch.bfloat16)
            layer.update(past, past)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            model(
                input_ids=torch.zeros(batch, own, dtype=torch.long),
                attention_mask=torch.ones(batch, context, dtype=torch.long),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return sum(count for kind, count in snapshot.items() if str(kind).endswith(("ACT", "TEMP", "OTH")))
