"""Layers whose weights lie in one piece: how they are read, and that one product takes them all."""

import random
from collections import Counter as Counts
from typing import Any

import pytest
import torch
from architectures import small
from test_upload import Recorded
from torch import nn
from torch._dynamo import lookup_backend
from torch.nn.functional import linear
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from tp_rs.integrations.transformers import Splits, load, products, selfcheck
from tp_rs.integrations.transformers.conversion import Conversion
from tp_rs.integrations.transformers.loader import make_skeleton
from tp_rs.integrations.transformers.products import Stacked, find_stacks, stacked_products
from tp_rs.integrations.transformers.room import part_bytes
from tp_rs.integrations.transformers.rules import make_layout
from tp_rs.integrations.transformers.sources import Counter, TensorSource
from tp_rs.integrations.transformers.twin import make_twin

SPLITS = Splits.of(kv=[2, 1, 0], intermediate=[24, 16, 24], vocabulary=[60, 0, 37], groups=2)


def lay_together(model, *groups):
    """Move the weights and biases of these children into one piece, in every module that has them."""
    groups = groups or (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    for parent in model.modules():
        for names in groups:
            children = [child for name, child in parent.named_children() if name in names]
            for kind in ("weight", "bias") if len(children) == len(names) else ():
                own = [getattr(child, kind) for child in children]
                if own[0] is None:
                    continue
                whole = torch.cat([each.detach() for each in own])
                parts = whole.split([len(each) for each in own])
                for child, part in zip(children, parts, strict=True):
                    setattr(child, kind, nn.Parameter(part, requires_grad=False))


@pytest.fixture
def counted(monkeypatch):
    """How many products of how many outputs were made."""
    counts = Counts()

    def counting(hidden, weight, bias=None):
        counts[len(weight)] += 1
        return linear(hidden, weight, bias)

    monkeypatch.setattr(products, "linear", counting)
    return counts


class Block(nn.Module):
    """Three layers of the same input, and one of another."""

    def __init__(self, bias):
        super().__init__()
        self.first = nn.Linear(16, 24, bias=bias)
        self.second = nn.Linear(16, 8, bias=bias)
        self.third = nn.Linear(16, 8, bias=bias)
        self.out = nn.Linear(24, 16, bias=bias)

    def forward(self, hidden):
        more = self.second(hidden) * self.third(hidden)
        return self.out(self.first(hidden) + more.repeat(1, 3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 600])
def test_one_product_for_all(counted, bias, rows):
    block = Block(bias)
    hidden = torch.randn(rows, 16)
    assert find_stacks(block) == []
    lay_together(block, ("first", "second", "third"))
    (stack,) = find_stacks(block)
    assert [len(module.weight) for module in stack.modules] == [24, 8, 8]
    with torch.inference_mode():
        expected = block(hidden)
        with stacked_products([stack], rows):
            # In the order in which they lie, as all known models have them.
            for layer in (block.first, block.second, block.third):
                torch.testing.assert_close(layer(hidden), linear(hidden, layer.weight, layer.bias))
            assert dict(counted) == ({40: 1} if rows < 600 else {})
            # In another one, each may make them all.
            torch.testing.assert_close(block(hidden), expected)
        assert all(type(module) is nn.Linear for module in stack.modules)
        assert not any("tp_rs_stack" in module.__dict__ for module in stack.modules)
        assert stack.given is stack.result is None


def test_layers_of_other_inputs_are_on_their_own(counted):
    block = Block(bias=True)
    lay_together(block, ("first", "second", "third"))
    stacks = find_stacks(block)
    inputs = [torch.randn(2, 16) for _ in range(3)]
    layers = (block.first, block.second, block.third)
    with torch.inference_mode():
        for turn in range(3):
            counted.clear()
            with stacked_products(stacks, 2):
                for layer, hidden in zip(layers, inputs, strict=True):
                    torch.testing.assert_close(layer(hidden), linear(hidden, layer.weight, layer.bias))
            # Found out once, and for good.
            assert counted[40] == (turn == 0)


def test_an_error_leaves_layers_as_they_were():
    block = Block(bias=False)
    lay_together(block, ("first", "second", "third"))
    stacks = find_stacks(block)
    with pytest.raises(RuntimeError, match="shapes"), stacked_products(stacks, 1):
        # The first layer's product is made, and the others' parts of it are not taken.
        block.out(block.first(torch.randn(1, 16))[:, :7])
    assert stacks[0].result is None
    assert type(block.first) is nn.Linear


def test_what_does_not_follow_is_no_stack():
    block = Block(bias=False)
    lay_together(block, ("second", "third"))
    assert [[len(module.weight) for module in stack.modules] for stack in find_stacks(block)] == [[8, 8]]
    block.third.forward = block.third.forward
    assert find_stacks(block) == []
    block = Block(bias=True)
    lay_together(block, ("second", "third"))
    block.third.bias = nn.Parameter(block.third.bias.clone())
    assert find_stacks(block) == []


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers_make_one_product(backend):
    blocks = [Block(bias=True) for _ in range(3)]
    stacks = []
    for block in blocks:
        lay_together(block, ("first", "second", "third"))
        stacks += find_stacks(block)
    frames = []

    def compiler(graph, inputs):
        frames.append(sum("linear" in str(node.target) for node in graph.graph.nodes))
        return lookup_backend(backend)(graph, inputs)

    def layer(block, hidden):
        return block.first(hidden) + (block.second(hidden) * block.third(hidden)).repeat(1, 3)

    compiled = torch.compile(layer, backend=compiler, dynamic=False, fullgraph=True)
    with torch.inference_mode():
        for _ in range(2):
            hidden = torch.randn(2, 16)
            expected = [layer(block, hidden) for block in blocks]
            with stacked_products(stacks, 2):
                for block, want in zip(blocks, expected, strict=True):
                    torch.testing.assert_close(compiled(block, hidden), want)
    # One graph for all of them, and one product in it.
    assert frames == [1]
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "qwen3_moe"])
def test_steps_over_ranks_say_the_same(kind, counted):
    model = make_twin(small(kind), seed=random.randrange(1000))
    ids, mask = selfcheck.prompt(model)
    inputs = {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 8}
    expected = model.generate(**inputs, do_sample=False)
    front = load(model, plan=SPLITS, check=False, capture=True)
    try:
        for rank in front.tp_rs_runner.models:
            lay_together(rank)
        used = []
        forward = Stacked.forward

        def noted(self, hidden):
            used.append(self)
            return forward(self, hidden)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stacked, "forward", noted)
            assert torch.equal(front.generate(**inputs, do_sample=False), expected)
        assert used
        assert counted
    finally:
        front.unload()


SIZES: Any = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 64,
    "vocab_size": 97,
}


def read_part(rank, *, config=None, dtype=torch.float32):
    """A rank's parameters as a loader reads them, and bytes: of pieces of memory, and by parameter."""
    config = config or LlamaConfig(**SIZES)
    kind = type(config)
    whole = AutoModelForCausalLM.from_config(config).state_dict()
    skeleton = make_skeleton(MODEL_FOR_CAUSAL_LM_MAPPING[kind], config, dtype)
    layout = make_layout(skeleton, SPLITS, 3)
    conversion = Conversion(skeleton, {name: TensorSource(tensor) for name, tensor in whole.items()})
    upload, stacks = Recorded(), conversion.stacks(layout, rank)
    parts = conversion.state(layout, rank, Counter(), upload, stacks)
    # Threads read in any order.
    names = random.sample(list(parts), len(parts))
    read = {name: parts[name][...] for name in names}
    plain = conversion.state(layout, rank, Counter())
    assert all(torch.equal(read[name], plain[name][...]) for name in names)
    own = dict(part_bytes(skeleton, layout, rank))
    return read, list(stacks.together(own.items())), own


def followers(read, *names):
    """Whether these lie one behind the other, in the first layer."""
    tensors = [read[f"model.layers.0.{name}"] for name in names]
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
    return tensors[0].numel() > 0 and [tensor.data_ptr() for tensor in tensors[1:]] == ends[:-1]


# The last has no heads, and so nothing of an attention.
@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_layers_of_one_input_are_read_to_one_piece(rank, kind):
    config = kind(**SIZES)
    read, pieces, own = read_part(rank, config=config)
    projections = [f"self_attn.{name}_proj" for name in "qkv"]
    heads = rank < 2
    assert followers(read, *(f"{name}.weight" for name in projections)) is heads
    assert followers(read, "mlp.gate_proj.weight", "mlp.up_proj.weight")
    gates = own["model.layers.0.mlp.gate_proj.weight"] + own["model.layers.0.mlp.up_proj.weight"]
    assert gates in pieces
    assert sum(pieces) == sum(own.values())
    # In each of two layers two parameters are one piece, and three of an attention's, or six.
    of_heads = 0 if not heads else 4 if kind is Qwen2Config else 2
    assert len(own) - len(pieces) == 2 * (1 + of_heads)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[kind](config)
    for name, tensor in read.items():
        module = model.get_submodule(name.rpartition(".")[0])
        setattr(module, name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
    found = find_stacks(model)
    assert sorted(len(stack.modules) for stack in found) == [2, 2, 3, 3] if heads else [2, 2]
    hidden = torch.randn(5, config.hidden_size)
    for stack in found:
        apart = torch.cat([module(hidden) for module in stack.modules], dim=-1)
        torch.testing.assert_close(stack.of(hidden), apart)


@pytest.mark.parametrize(
    "options",
    [
        # 16 rows of 24 bytes do not end where a product is fast.
        {"rank": 0, "config": LlamaConfig(**SIZES | {"hidden_size": 6, "head_dim": 8})},
        # What is read is not what is kept.
        {"rank": 0, "dtype": torch.bfloat16},
    ],
    ids=["ends anywhere", "converted"],
)
def test_what_is_read_to_memory_of_its_own(options):
    read, pieces, own = read_part(**options)
    assert not followers(read, *(f"self_attn.{name}_proj.weight" for name in "qkv"))
    assert sorted(pieces) == sorted(own.values())
