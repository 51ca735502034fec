"""Quantised checkpoints over ranks, against the same numbers decoded by numpy in float64."""

import functools
import logging

import numpy as np
import packing
import pytest
import torch
from architectures import small
from packing import change, rewrite
from safetensors import safe_open
from test_architectures import greedy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import tp_rs
from tp_rs.errors import DoesNotFit, InvalidInput, ModelError
from tp_rs.integrations.transformers import Splits, load, quantized, selfcheck
from tp_rs.integrations.transformers import checkpoint as checkpoints
from tp_rs.integrations.transformers.assemble import decide
from tp_rs.integrations.transformers.checkpoint import open_checkpoint
from tp_rs.integrations.transformers.conversion import Conversion
from tp_rs.integrations.transformers.loader import load_rank
from tp_rs.integrations.transformers.sources import Counter, TensorSource
from tp_rs.integrations.transformers.twin import make_twin, twin_config

KINDS = {
    "gptq": {"bits": 4, "group_size": 32, "sym": True},
    "gptq-asymmetric": {"bits": 4, "group_size": 64},
    "gptq-8-bits": {"bits": 8, "group_size": 128},
    "gptq-2-bits": {"bits": 2, "group_size": 32, "checkpoint_format": "gptq_v2"},
    "gptq-one-group": {"bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"},
    "gptq-act-order": {"bits": 4, "group_size": 32, "desc_act": True},
    "awq": {"bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "awq-128": {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "fp8": {"weight_block_size": [64, 64], "activation_scheme": "dynamic"},
    "fp8-small-blocks": {"weight_block_size": [32, 64], "activation_scheme": "dynamic"},
    "fp8-uneven-blocks": {"weight_block_size": [128, 32], "activation_scheme": "dynamic"},
    "fp8-one-scale": {"activation_scheme": "dynamic"},
}


def settings(kind):
    return {"quant_method": kind.partition("-")[0], **KINDS[kind]}


def writer(kind, **options):
    asked = KINDS[kind]
    if kind.startswith("gptq"):
        form = asked.get("checkpoint_format", "gptq")
        flags = {"sym": asked.get("sym", False), "act_order": asked.get("desc_act", False)}
        return functools.partial(
            packing.gptq, bits=asked["bits"], group=asked["group_size"], form=form, **flags, **options
        )
    if kind.startswith("awq"):
        return functools.partial(packing.awq, group=asked["group_size"])
    return functools.partial(packing.fp8, block=asked.get("weight_block_size"))


def model_of(architecture):
    sizes = {
        "hidden_size": 192,
        "head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
    }
    known = set(small(architecture).to_dict())
    config = twin_config(CONFIG_MAPPING[architecture], {k: v for k, v in sizes.items() if k in known})
    return make_twin(config)


@pytest.fixture
def saved(tmp_path):
    def save(kind, architecture="llama", **options):
        seed = np.random.SeedSequence().entropy
        return packing.write(tmp_path, model_of(architecture), settings(kind), writer(kind, **options), seed)

    return save


def splits(kv=(2, 1), intermediate=(128, 128), **options):
    return Splits.of(kv=kv, intermediate=intermediate, vocabulary=[60, 37, 0][: len(kv)], groups=2, **options)


def differs(front, path):
    """Compare with the decoded model that was never cut."""
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids, mask = selfcheck.prompt(whole)
    pairs = zip(selfcheck.steps(front, ids, mask), selfcheck.steps(whole, ids, mask), strict=True)
    for own, other in pairs:
        assert (own - other).abs().max() <= selfcheck.TOLERANCE * other.std()
    assert torch.equal(greedy(front, ids, mask), greedy(whole, ids, mask))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", [(2, 1), (3, 0), (2, 1, 0)])
def test_over_ranks_as_decoded_and_whole(saved, kind, kv):
    packed, plain = saved(kind)
    intermediate = (160, 96, 0)[: len(kv)] if len(kv) > 2 else (160, 96)
    front = load(packed, plan=splits(kv, intermediate), dtype=torch.float32, check=False)
    differs(front, plain)
    front.unload()


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["fp8", "gptq", "awq"])
@pytest.mark.parametrize("experts", [None, [4, 2]])
def test_experts(saved, architecture, kind, experts):
    packed, plain = saved(kind, architecture)
    plan = splits((2, 1), (64, 64) if architecture == "qwen3_moe" else (128, 128), experts=experts)
    front = load(packed, plan=plan, dtype=torch.float32, check=False)
    differs(front, plain)
    front.unload()


@pytest.mark.parametrize("architecture", ["phi3", "gpt_neox", "deepseek_v3"])
def test_other_layouts(tmp_path, architecture):
    config = small(architecture)
    seed = np.random.SeedSequence().entropy
    packed, plain = packing.write(
        tmp_path, make_twin(config), settings("fp8-uneven-blocks"), writer("fp8-uneven-blocks"), seed
    )
    plan = selfcheck.uneven(config, [2, 1])
    front = load(packed, plan=plan, dtype=torch.float32, check=False)
    differs(front, plain)
    front.unload()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_any_part_is_a_part_of_the_whole_bit_for_bit(kind, seed):
    generator = np.random.default_rng()
    outputs, inputs = 32 * generator.integers(1, 7), 32 * generator.integers(1, 7)
    # A zero point of 0 borrows from its neighbours where one less is stored.
    stored, dense = writer(kind, **({"zero": 0} if "gptq" in kind else {}))(generator, outputs, inputs)
    sources = {f"a.{leaf}": TensorSource(torch.as_tensor(part)) for leaf, part in stored.items()}
    if seed % 2 and "act-order" not in kind:
        sources.pop("a.g_idx", None)
    source = quantized.decode(sources, settings(kind), torch.float32)["a.weight"]
    assert source.get_shape() == [outputs, inputs]
    whole = torch.from_numpy(dense.astype(np.float32))
    assert torch.equal(source[...], whole)
    for _ in range(10):
        rows, columns = (np.sort(generator.integers(0, size + 1, 2)) for size in (outputs, inputs))
        index = (slice(*map(int, rows)), slice(*map(int, columns)))
        assert torch.equal(source[index], whole[index])


def test_a_stack_of_matrices_in_float8():
    generator = np.random.default_rng()
    made = [packing.fp8(generator, 96, 160, block=(64, 64)) for _ in range(3)]
    sources = {
        "experts.gate_up_proj": TensorSource(torch.stack([stored["weight"] for stored, _ in made])),
        "experts.gate_up_proj_scale_inv": TensorSource(
            torch.stack([stored["weight_scale_inv"] for stored, _ in made])
        ),
    }
    source = quantized.decode(sources, settings("fp8"), torch.float32)["experts.gate_up_proj"]
    whole = torch.from_numpy(np.stack([dense for _, dense in made]).astype(np.float32))
    assert torch.equal(source[1:3, 5:77, 60:160], whole[1:3, 5:77, 60:160])


def test_float8_is_decoded_as_transformers_does(saved):
    pytest.importorskip("accelerate")
    # It takes the blocks' size from the shapes, which is right where the last block is a whole one.
    packed, _ = saved("fp8-small-blocks")
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    plan = Splits.of(kv=[3], intermediate=[256], vocabulary=[97], groups=2)
    front = load(packed, plan=plan, dtype=torch.float32, check=False)
    own = front.tp_rs_runner.models[0].state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(own[name], tensor), name
    front.unload()


class Counted:
    """A safetensors file, or a tensor of it, that counts the bytes taken from it."""

    def __init__(self, inner, count):
        self.inner, self.count = inner, count

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def get_slice(self, name):
        return Counted(self.inner.get_slice(name), self.count)

    def __getitem__(self, index):
        part = self.inner[index]
        self.count[0] += part.nbytes
        return part


@pytest.mark.parametrize("kind", ["gptq", "gptq-act-order", "awq", "fp8"])
def test_ranks_read_their_parts(saved, kind, monkeypatch):
    packed, _ = saved(kind)
    count = [0]
    monkeypatch.setattr(
        checkpoints, "safe_open", lambda *args, **options: Counted(safe_open(*args, **options), count)
    )
    checkpoint = open_checkpoint(packed, torch.float32)
    plan = splits((2, 1), (192, 64))
    skeleton, layout = decide(checkpoint, plan, 2)
    conversion = Conversion(skeleton, checkpoint.read(skeleton))
    file = packed / "model.safetensors"
    read_by = []
    for rank in range(2):
        count[0], counter = 0, Counter()
        part = load_rank(checkpoint, conversion, layout, rank, device=torch.device("cpu"), counter=counter)
        read_by.append(count[0] / file.stat().st_size)
        assert counter.bytes == sum(tensor.nbytes for tensor in part.parameters())
    # Act-order spreads a rank's inputs over all groups, so each rank reads all scales of those.
    assert sum(read_by) <= (1.2 if kind == "gptq-act-order" else 1.06)
    assert 0.55 < read_by[0] < 0.8
    assert 0.2 < read_by[1] < 0.45


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp8-one-scale"])
def test_plans_of_packed_weights_keep_to_their_blocks(saved, kind):
    packed, _ = saved(kind)
    plan = tp_rs.plan(packed, [1.0, 0.8], devices=["cpu"] * 2)
    asked = KINDS[kind]
    rows, columns = asked.get("weight_block_size", (32 // asked.get("bits", 4), asked.get("group_size")))
    if "act-order" in kind:
        assert any("desc_act" in note for note in plan.notes)
        columns = 1
    for _, start, end in plan.kv_split:
        assert start * 32 % rows == end * 32 % rows == 0 or (start, end) == (0, 3)
    for _, start, end in plan.q_split:
        assert all(bound * 32 % max(columns, 1) == 0 or bound == 6 for bound in (start, end))
    for _, start, end in plan.id_split:
        assert all(bound % max(rows, columns) == 0 for bound in (start, end))


def test_a_cut_inside_a_block_is_refused_for_packed_weights(saved):
    packed, _ = saved("fp8")
    with pytest.raises(
        InvalidInput, match=r"splits\[\"kv\"\]\[0\]: got 2 KV heads, wanted 0 or 3.*_proj.weight"
    ):
        tp_rs.plan(packed, [1.0, 1.0], devices=["cpu"] * 2, splits={"kv": [2, 1]})
    with pytest.raises(InvalidInput, match=r"96 intermediate columns, wanted 64 or 128.* blocks of 64"):
        tp_rs.plan(packed, [1.0, 1.0], devices=["cpu"] * 2, splits={"id": [96, 160]})
    plan = tp_rs.plan(packed, [1.0, 1.0], devices=["cpu"] * 2, splits={"kv": [2, 1]}, weights="float32")
    assert plan.kv_split == [(0, 0, 2), (1, 2, 3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_count_what_ranks_hold(saved, kind, dtype):
    packed, _ = saved(kind)
    front = load(packed, [0.2, 0.1], devices=["cpu"] * 2, dtype=dtype, check=False)
    plan = front.tp_rs_runner.plan
    items = ("attention", "mlp", "experts", "embedding", "head", "replicated")
    for rank, model in zip(plan.ranks, front.tp_rs_runner.models, strict=True):
        held = sum(parameter.nbytes for parameter in model.parameters())
        assert sum(rank.items.get(item, 0) for item in items) == held
    front.unload()


def test_a_plan_of_packed_bytes_is_measured_again(saved, caplog):
    packed, _ = saved("gptq")
    options = {"devices": ["cpu"] * 2, "context": 16, "chunk": 16, "splits": {"kv": [2, 1], "id": [128, 128]}}
    roomy = tp_rs.plan(packed, [1.0, 1.0], **options)
    small_plan = tp_rs.plan(packed, [(rank.total + 1000) / 2**30 for rank in roomy.ranks], **options)
    assert small_plan.fits
    assert not tp_rs.plan(
        packed, [each.budget / 2**30 for each in small_plan.ranks], weights="float32", **options
    ).fits
    with pytest.raises(
        DoesNotFit, match=r"as float32, and the plan counts .* MiB are missing; plan with weights"
    ):
        load(packed, plan=small_plan, dtype=torch.float32, check=False)
    with caplog.at_level(logging.WARNING):
        load(packed, plan=small_plan, dtype=torch.float32, check=False, force=True).unload()
    assert "the plan counts" in caplog.text


REFUSED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised with bitsandbytes .* row to row"),
    ({"load_in_8bit": True}, "quantised with bitsandbytes"),
    ({"quant_method": "mxfp4"}, "quantised with mxfp4"),
    ({"quant_method": "exl2", "bits": 4.0}, "quantised with exl2"),
    ({"quant_method": "compressed-tensors"}, "quantised with compressed-tensors"),
    ({"quant_method": "something"}, "quantised with something .* not known here; use the checkpoint"),
    ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "3 bits, wanted 2, 4 or 8"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "the marlin layout"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"a": {"bits": 8}}}, "settings of their own"),
    ({"quant_method": "awq", "bits": 8}, "8 bits, wanted 4"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "the gemv layout, wanted gemm"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_is_not_read_is_refused_before_loading(tmp_path, config, message):
    small("llama").save_pretrained(tmp_path)
    change(tmp_path, quantization_config=config)
    with pytest.raises(ModelError, match=message):
        load(tmp_path, plan=splits())


@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8"])
def test_missing_scales_are_named(saved, kind):
    packed, _ = saved(kind)
    leaf = "weight_scale_inv" if kind == "fp8" else "scales"
    missing = f"model.layers.1.mlp.up_proj.{leaf}"
    rewrite(packed, lambda tensors: tensors.pop(missing))
    with pytest.raises(ModelError, match=f"{missing} is missing, without which"):
        load(packed, plan=splits(), check=False)


def test_tensors_that_contradict_the_settings(saved):
    packed, _ = saved("gptq")
    change(packed, quantization_config={**settings("gptq"), "group_size": 64})
    with pytest.raises(ModelError, match=r"got shape \[.*\], wanted \[.*in groups of 64"):
        load(packed, plan=splits(), check=False)
    change(packed, quantization_config={**settings("awq"), "group_size": 32})
    with pytest.raises(ModelError, match=r"correct bits and group_size"):
        load(packed, plan=splits(), check=False)
    change(packed, quantization_config=settings("gptq"))
    rewrite(packed, lambda tensors: tensors["model.layers.0.mlp.up_proj.g_idx"].add_(1))
    with pytest.raises(ModelError, match=r"up_proj.g_idx: got groups 1 to 6, wanted 0 to 5"):
        load(packed, plan=splits(), check=False)


def test_float8_scales_of_other_blocks(saved):
    packed, _ = saved("fp8")
    change(packed, quantization_config={**settings("fp8"), "weight_block_size": [32, 64]})
    with pytest.raises(ModelError, match=r"_scale_inv: got shape .*in blocks of 32 x 64"):
        load(packed, plan=splits(), check=False)


def test_settings_in_a_file_of_their_own(saved):
    packed, plain = saved("gptq")
    change(packed, quantization_config=None)
    (packed / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": false}')
    front = load(packed, plan=splits(), dtype=torch.float32, check=False)
    differs(front, plain)
    front.unload()


def test_a_checkpoint_that_is_not_packed_after_all(saved):
    _, plain = saved("gptq")
    change(plain, quantization_config=settings("gptq"))
    with pytest.raises(ModelError, match="no tensor is called qweight"):
        load(plain, plan=splits(), check=False)


def test_a_quantised_model_in_memory():
    model = model_of("llama")
    model.config.quantization_config = settings("gptq")
    with pytest.raises(ModelError, match="pass the folder it was loaded from"):
        load(model, plan=splits())
