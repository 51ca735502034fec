"""Reading checkpoints: every rank its part, all transformers' conversions included, and what is refused."""

import json
import os

import numpy as np
import pytest
import torch
from architectures import small
from safetensors.torch import load_file, save_file
from test_architectures import ranked
from transformers import AutoModelForCausalLM

from tp_rs.errors import InvalidInput, ModelError
from tp_rs.integrations.transformers import Splits, gguf, load, selfcheck, sources
from tp_rs.integrations.transformers.assemble import decide
from tp_rs.integrations.transformers.checkpoint import open_checkpoint
from tp_rs.integrations.transformers.conversion import Conversion
from tp_rs.integrations.transformers.loader import load_rank
from tp_rs.integrations.transformers.sources import Counter, Part, TensorSource, same_values
from tp_rs.integrations.transformers.twin import make_twin


@pytest.fixture
def folder(tmp_path):
    def save(architecture, shard="40KB"):
        model = make_twin(small(architecture))
        model.save_pretrained(tmp_path, max_shard_size=shard)
        return model, tmp_path

    return save


@pytest.mark.parametrize(
    "architecture",
    [
        "llama",
        "mixtral",
        "qwen3_moe",
        "qwen2_moe",
        "phi3",
        "gpt_neox",
        "olmo2",
        "deepseek_v3",
        "gemma3_text",
        "gpt_oss",
        "llama4_text",
        "ernie4_5_moe",
        "qwen3_next",
        "minimax_m2",
    ],
)
@pytest.mark.parametrize("experts", [None, [4, 2]])
def test_ranks_read_their_parts(folder, architecture, experts):
    model, path = folder(architecture)
    ids, mask = selfcheck.prompt(model)
    splits = selfcheck.uneven(model.config.get_text_config(), [2, 1])
    if experts:
        splits = Splits(
            splits.kv_split, splits.q_split, splits.id_split, splits.vc_split, (), [(0, 0, 4), (1, 4, 6)]
        )
    checkpoint = open_checkpoint(path)
    skeleton, layout = decide(checkpoint, splits, 2)
    conversion = Conversion(skeleton, checkpoint.read(skeleton))
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    for rank in range(2):
        counter = Counter()
        part = load_rank(checkpoint, conversion, layout, rank, device=torch.device("cpu"), counter=counter)
        held = {tensor.data_ptr(): tensor.nbytes for tensor in part.state_dict().values()}
        # Tied weights are stored once, and buffers that are not in the file are small.
        assert counter.bytes <= sum(held.values()) * 1.02 + 256
        assert counter.bytes < size
    front = ranked(model, [2, 1], splits)
    from_file = load(path, devices=["cpu"] * 2, plan=splits, check=False)
    for own, other in zip(from_file.tp_rs_runner.models, front.tp_rs_runner.models, strict=True):
        weights = other.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in own.state_dict().items())
    # Not bitwise: weights in a mapped file are aligned otherwise, and products then round otherwise.
    for own, whole in zip(
        selfcheck.steps(from_file, ids, mask), selfcheck.steps(model, ids, mask), strict=True
    ):
        assert (own - whole).abs().max() <= selfcheck.TOLERANCE * whole.std()
    from_file.unload()
    front.unload()


@pytest.mark.parametrize("seed", range(20))
def test_a_part_is_what_indexing_gives(seed):
    generator = np.random.default_rng(seed)
    tensor = torch.from_numpy(generator.standard_normal((7, 12, 5)))
    cuts = {}
    expected = tensor
    for dim in generator.permutation(3)[: generator.integers(1, 4)]:
        bounds = np.sort(generator.integers(0, tensor.shape[dim] + 1, 4))
        intervals = [(int(bounds[2]), int(bounds[3])), (int(bounds[0]), int(bounds[1]))]
        cuts[int(dim)] = intervals
        index = torch.tensor([row for start, end in intervals for row in range(start, end)], dtype=torch.long)
        expected = expected.index_select(int(dim), index)
    part = Part(TensorSource(tensor), cuts)
    assert part.get_shape() == list(expected.shape)
    assert torch.equal(part[...], expected)


KINDS = ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K", "Q2_K"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [0, 6])
def test_gguf_parts_are_slices_of_the_whole_bit_for_bit(kind, heads):
    library = pytest.importorskip("gguf")
    number = library.GGMLQuantizationType[kind]
    rows, columns = 48, 512
    generator = np.random.default_rng(os.getpid())
    if kind in {"F32", "F16"}:
        data = generator.standard_normal((rows, columns)).astype(np.float32 if kind == "F32" else np.float16)
    else:
        block, size = library.GGML_QUANT_SIZES[number]
        data = generator.integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    source = gguf.GgufSource(data, number, [rows, columns], heads)
    with np.errstate(all="ignore"):
        whole = np.asarray(library.dequantize(data, number), dtype=np.float32)
        if heads:
            whole = whole.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        for start, end, first, last in [
            (0, 48, 0, 512),
            (8, 32, 0, 512),
            (0, 48, 256, 512),
            (16, 24, 32, 40),
            (5, 5, 0, 9),
        ]:
            part = source[start:end, first:last].numpy()
            assert part.shape == (end - start, last - first)
            assert part.tobytes() == whole[start:end, first:last].tobytes()


def test_a_gguf_file_over_ranks(tmp_path):
    library = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path = tmp_path / "small.gguf"
    config = small("llama")
    write_llama(library, path, config)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ids, mask = selfcheck.prompt(whole)
    splits = Splits.of(kv=[2, 0, 1], intermediate=[32, 0, 32], vocabulary=[17, 50, 30], groups=2)
    front = load(path, devices=["cpu"] * 3, plan=splits, check=False)
    for own, other in zip(selfcheck.steps(front, ids, mask), selfcheck.steps(whole, ids, mask), strict=True):
        assert (own - other).abs().max() <= selfcheck.TOLERANCE * other.std()
    state = dict(whole.state_dict())
    rank = front.tp_rs_runner.models[2]
    assert torch.equal(
        rank.model.layers[1].self_attn.k_proj.weight, state["model.layers.1.self_attn.k_proj.weight"][16:]
    )
    assert torch.equal(
        rank.model.layers[1].mlp.down_proj.weight, state["model.layers.1.mlp.down_proj.weight"][:, 32:]
    )
    front.unload()
    planned = load(path, [0.2, 0.1], devices=["cpu"] * 2, check=False)
    items = ("attention", "mlp", "embedding", "head", "replicated")
    for each, model in zip(planned.tp_rs_runner.plan.ranks, planned.tp_rs_runner.models, strict=True):
        held = sum(parameter.nbytes for parameter in model.parameters())
        assert sum(each.items.get(item, 0) for item in items) == held
    planned.unload()


def write_llama(library, path, config, architecture="llama"):
    writer = library.GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    generator = np.random.default_rng(0)

    def add(name, *shape):
        values = generator.standard_normal(shape).astype(np.float32) / shape[-1] ** 0.5
        if shape[-1] % 32 == 0 and len(shape) > 1:
            kind = library.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, library.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values + (len(shape) == 1))

    hidden, width = config.hidden_size, config.intermediate_size
    rows, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    add("token_embd.weight", config.vocab_size, hidden)
    add("output_norm.weight", hidden)
    add("output.weight", config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        for name, shape in {
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
            "attn_q": (rows, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, rows),
            "ffn_gate": (width, hidden),
            "ffn_up": (width, hidden),
            "ffn_down": (hidden, width),
        }.items():
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SPLITS = Splits.of(kv=[2, 1], intermediate=[40, 24], vocabulary=[60, 37], groups=2)


def change(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_missing_weights_are_named(folder):
    _, path = folder("llama", shard="1GB")
    change(path, num_hidden_layers=5)
    with pytest.raises(ModelError, match=r"9 weights are missing: model.layers.4.input_layernorm.weight"):
        load(path, plan=SPLITS, check=False)


def test_weights_that_are_not_used_are_told(folder, caplog):
    _, path = folder("llama", shard="1GB")
    change(path, num_hidden_layers=3)
    load(path, plan=SPLITS, check=False).unload()
    assert "9 weights are not used: model.layers.3.input_layernorm.weight" in caplog.text


def test_shapes_that_contradict_the_configuration(folder):
    _, path = folder("llama", shard="1GB")
    change(path, intermediate_size=72)
    with pytest.raises(
        ModelError, match=r"mlp\.\w+\.weight: got shape \[.*\], and the configuration wants \["
    ):
        load(path, plan=SPLITS, check=False)


def test_a_shard_that_is_not_there(folder):
    _, path = folder("llama")
    sorted(path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match=r"is not there|does not exist|missing"):
        load(path, plan=SPLITS, check=False)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nothing", plan=SPLITS)
    with pytest.raises(ModelError, match=r"no config.json"):
        load(tmp_path, plan=SPLITS)
    with pytest.raises(InvalidInput, match="got int, wanted a folder"):
        load(3, plan=SPLITS)
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows"}')
    with pytest.raises(ModelError, match="cannot read its configuration"):
        load(tmp_path, plan=SPLITS)
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    with pytest.raises(ModelError, match="encoder-decoder"):
        load(tmp_path, plan=SPLITS)


def test_gguf_of_other_architectures(tmp_path):
    library = pytest.importorskip("gguf")
    write_llama(library, tmp_path / "small.gguf", small("llama"), "gemma2")
    with pytest.raises(ModelError, match=r"'gemma2' is not read in parts"):
        load(tmp_path / "small.gguf", plan=SPLITS, check=False)


def test_the_file_that_is_planned_for_is_read(folder):
    model, path = folder("llama", shard="1GB")
    ids, mask = selfcheck.prompt(model)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits
    other = {name: tensor * 3 for name, tensor in load_file(path / "model.safetensors").items()}
    # Both sort behind the model's own name.
    save_file(other, path / "model_old.safetensors", metadata={"format": "pt"})
    save_file(other, path / "zz.safetensors", metadata={"format": "pt"})

    def logits(named):
        front = load(named, plan=SPLITS, check=False)
        try:
            return front(input_ids=ids, attention_mask=mask).logits
        finally:
            front.unload()

    for named in (path, path / "config.json", path / "model.safetensors"):
        torch.testing.assert_close(logits(named), expected)
    assert not torch.allclose(logits(path / "zz.safetensors"), expected)
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="name the file that is meant"):
        load(path, plan=SPLITS, check=False)
    for left in ("model_old.safetensors", "zz.safetensors"):
        (path / left).rename(path / f"adapter_{left}")
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        load(path, plan=SPLITS, check=False)


def test_tied_weights_that_differ_are_refused(folder):
    model, path = folder("llama", shard="1GB")
    ids, mask = selfcheck.prompt(model)
    tensors = load_file(path / "model.safetensors")
    change(path, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"(?s)lm_head.*are both there and differ.*tie_word_embeddings"):
        load(path, plan=SPLITS, check=False)
    # Older versions of transformers wrote both.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(path).eval()
    front = load(path, plan=SPLITS, check=False)
    try:
        with torch.inference_mode():
            wanted = expected(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(front(input_ids=ids, attention_mask=mask).logits, wanted)
    finally:
        front.unload()


def test_values_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr(sources, "_COMPARED", 40)
    one = torch.randn(9, 16)
    other = one.clone()
    assert same_values(TensorSource(one), TensorSource(other))
    other[8, 15] += 1
    assert not same_values(TensorSource(one), TensorSource(other))
    assert not same_values(TensorSource(one), TensorSource(one[:8]))
    assert same_values(TensorSource(torch.tensor(2.0)), TensorSource(torch.tensor(2.0)))


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": "X"},
        {"architectures": [None]},
        {"hidden_size": "64"},
        {"hidden_size": None},
        {"hidden_size": -1},
        {"num_attention_heads": 4.0},
        {"intermediate_size": [1]},
        {"rms_norm_eps": None},
        {"tie_word_embeddings": "x"},
        {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
        {"hidden_act": "nope"},
        {"dtype": "float8"},
        {"quantization_config": "x"},
    ],
    ids=str,
)
def test_configurations_that_make_no_model(folder, fields):
    _, path = folder("llama")
    change(path, **fields)
    with pytest.raises(ModelError, match="config"):
        load(path, plan=SPLITS, check=False)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_configurations_that_are_none(folder, name):
    _, path = folder("llama")
    (path / name).write_text("[]")
    with pytest.raises(ModelError, match="config"):
        load(path, plan=SPLITS, check=False)


def test_a_file_that_is_no_pickle(folder):
    _, path = folder("llama", shard="1GB")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin: .*cannot read it"):
        load(path, plan=SPLITS, check=False)
