"""What reading a checkpoint leaves in memory, and that giving memory back loses nothing."""

import hashlib
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import small
from safetensors import safe_open
from safetensors.torch import save_file
from test_checkpoints import write_llama
from transformers import LlamaConfig, LlamaForCausalLM

import tp_rs
from tp_rs.integrations.transformers import gguf
from tp_rs.integrations.transformers.mapped import MappedSource, new_memory
from tp_rs.integrations.transformers.sources import Part

MIB = 1 << 20


def intervals(size):
    bounds = sorted(random.randint(0, size) for _ in range(random.choice([2, 4])))
    return [(bounds[place], bounds[place + 1]) for place in range(0, len(bounds), 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_of_a_mapped_file_survive_each_other(tmp_path, dtype):
    whole = torch.randn(random.randint(300, 900), random.randint(300, 900)).to(torch.bfloat16)
    save_file({"a": whole, "b": -whole}, tmp_path / "x.safetensors")
    before = hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).digest()
    file = safe_open(tmp_path / "x.safetensors", framework="pt")
    sources = {name: MappedSource(file.get_slice(name), dtype) for name in ("a", "b")}

    def read(_):
        name, dim = random.choice(["a", "b"]), random.randrange(2)
        cuts = intervals(whole.shape[dim])
        got = Part(sources[name], {dim: cuts})[...]
        pieces = [whole.narrow(dim, start, end - start) for start, end in cuts]
        wanted = torch.cat(pieces, dim) * (1 if name == "a" else -1)
        return got.is_contiguous(), torch.equal(got, wanted), got, wanted

    # Readers give pages back that others are reading.
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, range(60)))
    assert all(contiguous and equal for contiguous, equal, _, _ in results)
    # Nor do later reads change what was read before.
    assert all(torch.equal(got, wanted) for _, _, got, wanted in results)
    assert hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).digest() == before


def test_new_memory_is_ordinary():
    for shape in ((0, 5), (3, 7), (700, 801), ()):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            tensor = new_memory(shape, dtype)
            assert (tensor.shape, tensor.dtype) == (torch.Size(shape), dtype)
            assert tensor.is_contiguous()
            tensor.fill_(3)
            assert tensor.clone().eq(3).all()


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_gguf_tensors_decoded_in_pieces(tmp_path, monkeypatch, rows_at_once):
    library = pytest.importorskip("gguf")
    config = small("llama")
    config.hidden_size = 96
    write_llama(library, tmp_path / "small.gguf", config)
    names = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    ]
    reader = library.GGUFReader(str(tmp_path / "small.gguf"))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    monkeypatch.setattr(gguf, "_DECODED_AT_ONCE", rows_at_once * 4 * 96)
    sources = gguf.read(tmp_path / "small.gguf", config, names)
    for name, theirs in zip(names, ("blk.0.attn_q", "blk.1.ffn_down", "output"), strict=True):
        tensor = stored[f"{theirs}.weight"]
        whole = np.array(library.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if theirs.endswith("attn_q"):
            heads = config.num_attention_heads
            whole = whole.reshape(heads, len(whole) // heads // 2, 2, -1).swapaxes(1, 2).reshape(whole.shape)
        for _ in range(20):
            (a, b), (c, d) = (sorted(random.randint(0, size) for _ in range(2)) for size in whole.shape)
            assert np.array_equal(sources[name][a:b, c:d].numpy(), whole[a:b, c:d])


def resident(field):
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(f"{field}:"))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_load_takes_the_model_and_one_tensor_at_most(tmp_path, dtype):
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_hidden_layers=3,
        vocab_size=12000,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60MB")

    def load():
        return tp_rs.load(tmp_path, [8.0, 8.0], ["cpu", "cpu"], context=64, dtype=dtype, check=False)

    # What libraries allocate at first use is not the model's.
    load().unload()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    front = load()
    peak = resident("VmHWM") - before
    held = sum(parameter.nbytes for rank in front.tp_rs_runner.models for parameter in rank.parameters())
    largest = config.vocab_size * config.hidden_size * dtype.itemsize
    front.unload()
    assert held > 100 * MIB
    assert peak <= held + largest + 8 * MIB
