"""What a step makes finds room in the one block that a plan counts for it, whatever lies between.

Tensors are fake: they have sizes and no memory. A model of torch's allocator places them into the block. On a
GPU, `benches/plan_truth.py` and `tests/python/gpu/test_plans_on_gpu.py` hold the real one to plans.
"""

import re
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from test_planned_activations import COMMON, SHAPES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tp_rs
from tp_rs.integrations.transformers.roomy import give_room
from tp_rs.integrations.transformers.selfcheck import find_twin
from tp_rs.integrations.transformers.twin import twin_config

MIB = 1 << 20
LARGE = MIB
"""What is not above this lies elsewhere, and so little may be left over."""
ROUNDING = 512
CUT = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size")
"""What every rank has a part of."""
WIDE = {
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
"""Experts whose gate and up are wider than a row."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("context", "batch"), [(8192, 1), (2048, 4)])
@pytest.mark.parametrize(
    ("architecture", "shape", "ranks"),
    [
        ("qwen3_moe", SHAPES["qwen3_moe"], 1),
        ("qwen3_moe", SHAPES["qwen3_moe"], 4),
        ("qwen3_moe", WIDE, 1),
        ("mixtral", SHAPES["mixtral"], 1),
        ("mixtral", SHAPES["mixtral"], 4),
        ("mixtral", SHAPES["mixtral"], 8),
        ("llama", SHAPES["llama"], 1),
        ("llama", SHAPES["llama"], 4),
        ("gemma3_text", SHAPES["gemma3_text"], 4),
        ("phi3", SHAPES["phi3"], 2),
    ],
    ids=str,
)
def test_a_step_fits_into_the_planned_block(architecture, shape, ranks, context, batch):
    chunk = 2048
    config = CONFIG_MAPPING[architecture](**COMMON, **shape)
    plan = tp_rs.plan(
        config,
        [70.0] * ranks,
        devices=["cuda:0"] * ranks,
        context=context,
        batch=batch,
        chunk=chunk,
        weights=torch.bfloat16,
    )
    heads = {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    }
    part = {name: count // ranks if name in CUT else count for name, count in (heads | shape).items()}
    step = made_in_a_step(CONFIG_MAPPING[architecture](**COMMON, **part), architecture, context, batch, chunk)
    for rank in plan.ranks:
        counted = rank.items["activations"] + rank.items["logits"]
        assert fits(step, -(-counted // (2 * MIB)) * 2 * MIB), f"rank {rank.rank}: {counted / MIB:.0f} MiB"


class Noted(TorchDispatchMode):
    """Notes when memory is taken and given back: a number, and bytes or None."""

    def __init__(self):
        super().__init__()
        self.events = []
        self._seen = {}

    def know(self, tensors):
        """Leave out what is there already."""
        self._seen |= {tensor.untyped_storage()._cdata: None for tensor in tensors}  # noqa: SLF001  its address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key, number = storage._cdata, len(self.events)  # noqa: SLF001  as above
        if key in self._seen or storage.nbytes() <= LARGE:
            return
        self.events.append((number, -(-storage.nbytes() // ROUNDING) * ROUNDING))

        def gone(_):
            self._seen.pop(key)
            self.events.append((number, None))

        self._seen[key] = weakref.ref(storage, gone)


def made_in_a_step(config, architecture, context, batch, chunk):
    """What the last chunk of a context takes and gives back, in order."""
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture])
    own = chunk // batch
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = kind._from_config(config, dtype=torch.bfloat16).eval()  # noqa: SLF001  no public name
        cache = give_room(DynamicCache(config=config), context)
        for layer in cache.layers:
            shape = (batch, config.num_key_value_heads, context - own, config.head_dim)
            past = torch.empty(shape, dtype=torch.bfloat16)
            layer.update(past, past)
        noted = Noted()
        noted.know(model.parameters())
        noted.know(each for layer in cache.layers for each in (layer.keys, layer.values))
        ids = torch.zeros(batch, own, dtype=torch.long)
        mask = torch.ones(batch, context, dtype=torch.long)
        with noted:
            model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return noted.events


def fits(events, size):
    """Whether all of it finds room in a block: each in the smallest hole that it fits, as in torch."""
    holes, taken = [(0, size)], {}
    for number, count in events:
        if count is not None:
            large = [(length, start) for start, length in holes if length >= count]
            if not large:
                return False
            length, start = min(large)
            holes.remove((start, length))
            if length - count > LARGE:
                holes.append((start + count, length - count))
                length = count
            taken[number] = start, length
        else:
            start, length = taken.pop(number)
            for at, free in list(holes):
                if at + free == start or start + length == at:
                    holes.remove((at, free))
                    start, length = min(at, start), length + free
            holes.append((start, length))
    return True


def of_the_models_type():
    """The types whose routers are counted with weights of the model's type."""
    source = Path(__file__).parents[3] / "src" / "split" / "activations.rs"
    listed = re.search(
        r"WEIGHTS_LIKE_ROWS: &\[&str\] = &\[(.*?)\];", source.read_text(encoding="utf-8"), re.DOTALL
    )
    return sorted(set(re.findall(r'"(\w+)"', listed.group(1))) & set(CONFIG_MAPPING))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", of_the_models_type())
def test_routers_make_weights_of_the_models_type(architecture):
    model = find_twin(lambda shape: twin_config(CONFIG_MAPPING[architecture], shape=shape)).to(torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    seen = set()

    def look(_module, args, kwargs):
        seen.update(each.dtype for each in (*args, *kwargs.values()) if each.is_floating_point())

    for module in model.modules():
        if hasattr(module, "_apply_gate"):
            module.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.randint(3, model.config.get_text_config().vocab_size - 1, (1, 7)))
    assert seen == {torch.bfloat16}
