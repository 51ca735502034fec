"""Quantised checkpoints of small random models, written from the formats' definitions with numpy in float64.

Every writer gives the stored tensors of a matrix and the matrix that they stand for, `[outputs, inputs]`.
"""

import json
import re

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

QUANTISED = re.compile(r"layers\.\d+\..*(proj|w1|w2|w3)\.weight$")
"""What quantisers take: the linear layers but routers and the head."""


def words(integers, order):
    """The last dimension's integers in words of 32 bits: the one at `order[k]` of each run k places up."""
    count = len(order)
    bits = 32 // count
    runs = integers.reshape(*integers.shape[:-1], -1, count).astype(np.uint64)
    return sum(runs[..., place] << np.uint64(bits * k) for k, place in enumerate(order))


def as_int32(values):
    return (values % (1 << 32)).astype(np.uint32).view(np.int32)


def gptq(generator, outputs, inputs, *, bits=4, group=32, sym=False, act_order=False, form="gptq", zero=1):
    """`zero` is the smallest zero point, `bits` 2, 4 or 8."""
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    integers = generator.integers(0, 1 << bits, (inputs, outputs))
    zeros = generator.integers(zero, 1 << bits, (groups, outputs))
    if sym:
        zeros[:] = 1 << (bits - 1)
    scales = random_scales(generator, (groups, outputs), (1 << bits) * inputs**0.5)
    index = np.arange(inputs) // size
    if act_order:
        generator.shuffle(index)
    dense = (integers - zeros[index]) * scales.astype(np.float64)[index]
    order = range(32 // bits)
    stored_zeros = words(zeros, order).astype(np.int64)
    if form == "gptq":
        stored_zeros -= sum(1 << (bits * k) for k in order)
    tensors = {
        "qweight": as_int32(words(integers.T, order)).T.copy(),
        "qzeros": as_int32(stored_zeros),
        "scales": scales,
        "g_idx": index.astype(np.int32),
    }
    return tensors, dense.T


def awq(generator, outputs, inputs, *, group=32):
    size = inputs if group == -1 else group
    integers = generator.integers(0, 16, (inputs, outputs))
    zeros = generator.integers(0, 16, (-(-inputs // size), outputs))
    scales = random_scales(generator, zeros.shape, 16 * inputs**0.5)
    index = np.arange(inputs) // size
    dense = (integers - zeros[index]) * scales.astype(np.float64)[index]
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        "qweight": as_int32(words(integers, order)),
        "qzeros": as_int32(words(zeros, order)),
        "scales": scales,
    }
    return tensors, dense.T


def fp8(generator, outputs, inputs, *, block=(64, 64)):
    """`block` None for one scale."""
    rows, columns = block or (outputs, inputs)
    values = torch.from_numpy(generator.standard_normal((outputs, inputs))).to(torch.float8_e4m3fn)
    scales = random_scales(generator, (-(-outputs // rows), -(-inputs // columns)), inputs**0.5, np.float32)
    spread = scales.astype(np.float64).repeat(rows, 0)[:outputs].repeat(columns, 1)[:, :inputs]
    stored = scales if block else scales.reshape(())
    return {
        "weight": values,
        "weight_scale_inv": torch.from_numpy(stored.copy()),
    }, values.double().numpy() * spread


def random_scales(generator, shape, divisor, dtype=np.float16):
    return (generator.uniform(0.5, 3.0, shape) / divisor).astype(dtype)


def write(folder, model, settings, writer, seed):
    """Save a model twice, packed and in float32 with the same values, and return both folders."""
    generator = np.random.default_rng(seed)
    packed, plain = folder / "packed", folder / "plain"
    model.save_pretrained(packed)
    model.save_pretrained(plain)
    tensors, dense = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if QUANTISED.search(name):
            parts, values = writer(generator, *tensor.shape)
            stem = name.removesuffix("weight")
            tensors.update({stem + leaf: torch.as_tensor(part) for leaf, part in parts.items()})
            dense[name] = values.astype(np.float32)
        else:
            tensors[name] = torch.from_numpy(tensor)
            dense[name] = tensor
    save_torch({name: tensor.contiguous() for name, tensor in tensors.items()}, packed / "model.safetensors")
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in dense.items()},
        plain / "model.safetensors",
        {"format": "pt"},
    )
    change(packed, quantization_config=settings)
    return packed, plain


def change(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder, edit):
    """Change the stored tensors: `edit` takes and changes them by name."""
    file = folder / "model.safetensors"
    tensors = load_torch(file)
    edit(tensors)
    save_torch(tensors, file)
