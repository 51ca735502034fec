"""Parts of GGUF tensors: the blocks that hold them are taken from the file and decoded alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tp_rs.errors import ModelError
from tp_rs.integrations.transformers.mapped import forget, new_memory

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ARCHITECTURES", "read"]

ARCHITECTURES = {
    "llama": True,
    "qwen2": False,
    "qwen3": False,
    "phi3": False,
    "starcoder2": False,
    "stablelm": False,
}
"""Architectures whose tensors lie in a GGUF file as in the model, and whether llama.cpp's reordering of query
and key rows has to be undone. Others transform weights while they are loaded."""

_DECODED_AT_ONCE = 4 << 20
"""Bytes in float32."""


class GgufSource:
    """A tensor of a GGUF file.

    Args:
        data: Its bytes, a row each.
        kind: How it is stored.
        shape: Its shape, as torch counts.
        heads: The heads over which its rows were reordered, 0 where they were not.
    """

    def __init__(self, data: np.ndarray[Any, Any], kind: Any, shape: list[int], heads: int) -> None:
        module = importlib.import_module("gguf")
        self._data = data
        self._kind = kind
        self._shape = shape
        self._rows = shape[0] // heads if heads else 0
        self._block, self._bytes = module.GGML_QUANT_SIZES[kind]
        self._dequantize = module.dequantize

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Decoded to float32."""
        return "F32"

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Decode a part: rows and columns by slices."""
        slices = list(index) if isinstance(index, tuple) else [slice(None)]
        start, end, _ = (
            slices[0].indices(self._shape[0]) if slices[0] is not Ellipsis else (0, self._shape[0], 1)
        )
        if len(self._shape) == 1:
            return torch.from_numpy(np.array(self._dequantize(self._data[start:end], self._kind), np.float32))
        first, last, _ = (slices[1] if len(slices) > 1 else slice(None)).indices(self._shape[1])
        part = new_memory([max(end - start, 0), last - first], torch.float32)
        if part.numel() == 0:
            return part
        self._decode(part, start, first)
        return part

    def _decode(self, part: torch.Tensor, start: int, first: int) -> None:
        """Fill in the part that begins at a row and a column, some rows at a time.

        Decoding makes several arrays of the size of what it decodes.
        """
        end, last = start + part.shape[0], first + part.shape[1]
        skip, stop = first // self._block * self._block, -(-last // self._block) * self._block
        low, high = self._whole_heads(start, end)
        step = max(1, _DECODED_AT_ONCE // (4 * (stop - skip)))
        step = -(-step // self._rows) * self._rows if self._rows else step
        into = part.numpy()
        for top in range(low, high, step):
            data = np.ascontiguousarray(self._columns(self._data[top : min(top + step, high)], skip, stop))
            values = np.asarray(self._dequantize(data, self._kind), dtype=np.float32)
            if self._rows:
                values = self._restore(values)
            above, below = max(start, top), min(end, top + len(values))
            into[above - start : below - start] = values[
                above - top : below - top, first - skip : last - skip
            ]
        if isinstance(self._data, np.memmap) and self._data.mode == "r":
            read = self._data[low:high]
            forget(read.ctypes.data, read.nbytes)

    def _columns(self, data: np.ndarray[Any, Any], start: int, stop: int) -> np.ndarray[Any, Any]:
        # Floats come as numbers, quantised tensors as bytes.
        if data.dtype == np.uint8:
            return data[:, start // self._block * self._bytes : stop // self._block * self._bytes]
        return data[:, start:stop]

    def _whole_heads(self, start: int, end: int) -> tuple[int, int]:
        if not self._rows:
            return start, end
        return start // self._rows * self._rows, -(-end // self._rows) * self._rows

    def _restore(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        # llama.cpp alternates the rows of a head's two rotary halves (convert_hf_to_gguf.py, permute).
        shape = (values.shape[0] // self._rows, self._rows // 2, 2, *values.shape[1:])
        return values.reshape(shape).swapaxes(1, 2).reshape(values.shape)


def read(path: Path, config: Any, names: list[str]) -> dict[str, GgufSource]:
    """The tensors of a GGUF file, by the model's names.

    Raises:
        ModelError: The architecture's tensors do not lie as in the model, or gguf is not installed.
    """
    try:
        module = importlib.import_module("gguf")
    except ImportError as error:
        message = f"{path}: reading GGUF needs the gguf package (pip install 'tp_rs[models]')"
        raise ModelError(message) from error
    reader = module.GGUFReader(str(path))
    field = reader.fields.get("general.architecture")
    architecture = str(bytes(field.parts[field.data[0]]), "utf-8") if field is not None else "none"
    if architecture not in ARCHITECTURES:
        message = (
            f"{path}: GGUF of architecture {architecture!r} is not read in parts; "
            f"those that are: {', '.join(sorted(ARCHITECTURES))}. Use the safetensors checkpoint"
        )
        raise ModelError(message)
    kind = next(key for key, value in module.MODEL_ARCH_NAMES.items() if value == architecture)
    table = module.get_tensor_name_map(kind, config.num_hidden_layers)
    wanted = {}
    for name in names:
        stem, dot, suffix = name.rpartition(".")
        known = table.get_name(stem)
        if known is not None:
            wanted[known + dot + suffix] = name
    return {
        wanted[tensor.name]: _source(tensor, config, reordered=ARCHITECTURES[architecture])
        for tensor in reader.tensors
        if tensor.name in wanted
    }


def _source(tensor: Any, config: Any, *, reordered: bool) -> GgufSource:
    heads = 0
    if reordered and ".attn_q." in tensor.name:
        heads = config.num_attention_heads
    elif reordered and ".attn_k." in tensor.name:
        heads = config.num_key_value_heads
    return GgufSource(tensor.data, tensor.tensor_type, [int(size) for size in reversed(tensor.shape)], heads)
