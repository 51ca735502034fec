"""Quantised checkpoints: which are read, and their tensors as those of the float model.

Sources: the tensors that AutoGPTQ and GPTQModel (`checkpoint_format` "gptq" and "gptq_v2") and AutoAWQ
(`version` "gemm") write, and transformers' `weight_scale_inv` of float8 blocks.
"""

from __future__ import annotations

import json
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from tp_rs.errors import ModelError
from tp_rs.integrations.transformers.decoded import BlockSource, PackedSource, Packing

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig

    from tp_rs.integrations.transformers.sources import Source

__all__ = ["Settings", "decode", "settings_of", "without_settings"]

Settings = dict[str, Any]
"""A checkpoint's `quantization_config`."""

_INSTEAD = "use the checkpoint that is not quantised, or one in GPTQ, AWQ, fp8 blocks or GGUF"
_REASONS = {
    "bitsandbytes": "its blocks run on from row to row, so that no cut of columns keeps to them",
    "mxfp4": "its experts are two elements a byte in a layout that only its own kernels take",
    "exl2": "every layer has groups of different bits, which ExLlamaV2 alone reads",
    "compressed-tensors": "its tensors have as many layouts as it has schemes",
}
_ORDINARY = {2: tuple(range(16)), 4: tuple(range(8)), 8: tuple(range(4))}
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Outputs 0, 2, 4, 6, 1, 3, 5, 7 follow each other in a word, from its lowest bits."""
_PACKED = ("qweight", "qzeros", "scales", "g_idx")
_SCALES = "_scale_inv"


def settings_of(config: PretrainedConfig, path: Path | None = None) -> Settings | None:
    """How a checkpoint is quantised, None where it is not.

    Raises:
        ModelError: It is quantised in a way that is not read; the message says why and what to do.
    """
    found: Any = None
    for holder in (config, config.get_text_config()):
        found = (
            found
            or getattr(holder, "quantization_config", None)
            or getattr(holder, "compression_config", None)
        )
    settings: Settings = {} if found is None else dict(found if isinstance(found, dict) else found.to_dict())
    # Older writers kept them apart from the configuration.
    for name in ("quantize_config.json", "quant_config.json"):
        if not settings and path is not None and (path / name).exists():
            settings = json.loads((path / name).read_text(encoding="utf-8"))
            settings.setdefault("quant_method", "awq" if "w_bit" in settings else "gptq")
    if not settings:
        return None
    if "quant_method" not in settings and any(f"load_in_{bits}bit" in settings for bits in (4, 8)):
        settings["quant_method"] = "bitsandbytes"
    method = str(settings.get("quant_method", "a method it does not name")).lower()
    subject = f"{config.model_type}: weights quantised with {method} are not read in parts"
    if method == "fp8":
        _block(settings, subject)
    elif method in {"gptq", "gptqmodel", "awq"}:
        _packing(settings, subject)
    else:
        reason = _REASONS.get(method, "its tensors are not known here")
        message = f"{subject}: {reason}; {_INSTEAD}"
        raise ModelError(message)
    return settings


def without_settings(config: PretrainedConfig) -> None:
    """Take the settings out of a configuration: what is loaded is the float model."""
    for holder in (config, config.get_text_config()):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config


def decode(
    sources: dict[str, Source], settings: Settings, dtype: torch.dtype, name: str = "model"
) -> dict[str, Source]:
    """The tensors of the float model, each decoded as it is read.

    Raises:
        ModelError: A tensor that decoding needs is missing or has another shape than it must have.
    """
    if str(settings["quant_method"]).lower() == "fp8":
        return _decode_blocks(sources, _block(settings, name), dtype)
    packing = _packing(settings, name)
    decoded: dict[str, Source] = {}
    for key, source in sources.items():
        stem, _, leaf = key.rpartition(".")
        if leaf == "qweight":
            parts = {each: sources[f"{stem}.{each}"] for each in _PACKED if f"{stem}.{each}" in sources}
            _check_packed(stem, parts, packing)
            decoded[f"{stem}.weight"] = PackedSource(parts, packing, dtype)
        elif leaf not in _PACKED or f"{stem}.qweight" not in sources:
            decoded[key] = source
    if decoded.keys() == sources.keys():
        message = (
            f"{name}: its configuration says {settings['quant_method']}, and no tensor is called qweight"
        )
        raise ModelError(message)
    return decoded


def _packing(settings: Settings, subject: str) -> Packing:
    """Raises ModelError for the variants that are not read."""
    awq = str(settings["quant_method"]).lower() == "awq"
    # Whatever the file says; both are checked below.
    bits: Any = settings.get("bits", settings.get("w_bit", settings.get("wbits")))
    group: Any = settings.get("group_size", settings.get("q_group_size", 128))
    form = str(
        settings.get("version", "gemm") if awq else settings.get("checkpoint_format") or "gptq"
    ).lower()
    reason = None
    if bits not in ({4} if awq else _ORDINARY):
        reason = f"they have {bits} bits, wanted {'4' if awq else '2, 4 or 8, which fill words of 32'}"
    elif not isinstance(group, int) or (group < 1 and group != -1):
        reason = f"group_size is {group!r}, wanted a whole number, or -1 for one group"
    elif form not in ({"gemm"} if awq else {"gptq", "gptq_v2"}):
        reason = f"they lie in the {form} layout, wanted {'gemm' if awq else 'gptq or gptq_v2'}"
    elif settings.get("dynamic"):
        reason = 'some modules have settings of their own ("dynamic")'
    if reason is not None:
        message = f"{subject}: {reason}; {_INSTEAD}"
        raise ModelError(message)
    whole = max(int(group), 0)
    if awq:
        return Packing(4, whole, along_inputs=False, order=_AWQ_ORDER)
    return Packing(bits, whole, along_inputs=True, order=_ORDINARY[bits], one_less=form == "gptq")


def _check_packed(stem: str, parts: dict[str, Source], packing: Packing) -> None:
    missing = [each for each in ("qzeros", "scales") if each not in parts]
    if missing:
        message = (
            f"{stem}.qweight: {' and '.join(f'{stem}.{each}' for each in missing)} is missing, without which "
            "it cannot be decoded; download the checkpoint again"
        )
        raise ModelError(message)
    rows, columns = _matrix(f"{stem}.qweight", parts["qweight"])
    count = packing.count
    outputs, inputs = (columns, rows * count) if packing.along_inputs else (columns * count, rows)
    groups = ceil(inputs / packing.group) if packing.group else 1
    wanted = {"qzeros": [groups, ceil(outputs / count)], "scales": [groups, outputs], "g_idx": [inputs]}
    for leaf, shape in wanted.items():
        got = parts[leaf].get_shape() if leaf in parts else shape
        if got != shape:
            message = (
                f"{stem}.{leaf}: got shape {got}, wanted {shape} for {outputs} outputs and {inputs} inputs "
                f"of {packing.bits} bits in groups of {packing.group or inputs}; correct bits and group_size "
                "of the configuration"
            )
            raise ModelError(message)
    if "g_idx" in parts:
        index = parts["g_idx"][slice(None)]
        if inputs and not 0 <= int(index.min()) <= int(index.max()) < groups:
            message = (
                f"{stem}.g_idx: got groups {int(index.min())} to {int(index.max())}, wanted 0 to {groups - 1}"
            )
            raise ModelError(message)


def _matrix(name: str, source: Source) -> tuple[int, int]:
    shape, dtype = source.get_shape(), source.get_dtype()
    if len(shape) != len(("rows", "columns")) or dtype != "I32":
        message = f"{name}: got {dtype} of shape {shape}, wanted a matrix of I32"
        raise ModelError(message)
    return shape[0], shape[1]


def _block(settings: Settings, subject: str) -> tuple[int, int] | None:
    """The blocks' outputs and inputs, None for one scale a matrix."""
    block = settings.get("weight_block_size")
    if block is None:
        return None
    if (
        not isinstance(block, (list, tuple))
        or len(block) != len(("outputs", "inputs"))
        or not all(isinstance(each, int) and each > 0 for each in block)
    ):
        message = f"{subject}: weight_block_size is {block!r}, wanted two numbers above 0; {_INSTEAD}"
        raise ModelError(message)
    return block[0], block[1]


def _decode_blocks(
    sources: dict[str, Source], block: tuple[int, int] | None, dtype: torch.dtype
) -> dict[str, Source]:
    packed = {
        key for key, source in sources.items() if source.get_dtype().startswith("F8_E") and _is_weight(key)
    }
    used = {key + _SCALES for key in packed}
    decoded: dict[str, Source] = {}
    for key, source in sources.items():
        stem, _, leaf = key.rpartition(".")
        if key in packed:
            decoded[key] = _block_source(key, source, sources.get(key + _SCALES), block, dtype)
        elif key not in used and not (leaf.endswith(("activation_scale", "input_scale")) and stem):
            decoded[key] = source
    return decoded


def _is_weight(key: str) -> bool:
    return not key.endswith((_SCALES, "_scale", ".scale"))


def _block_source(
    key: str, weight: Source, scales: Source | None, block: tuple[int, int] | None, dtype: torch.dtype
) -> BlockSource:
    if scales is None:
        message = (
            f"{key}: it is {weight.get_dtype()}, and {key}{_SCALES} is missing, without which it cannot be "
            "decoded; download the checkpoint again"
        )
        raise ModelError(message)
    shape, got = weight.get_shape(), scales.get_shape()
    rows, columns = block or (max(shape[-2:], default=1),) * 2
    wanted = [*shape[:-2], ceil(shape[-2] / rows), ceil(shape[-1] / columns)] if len(shape) > 1 else []
    if not wanted or (got != wanted and not (block is None and prod(got) == 1)):
        message = (
            f"{key}{_SCALES}: got shape {got}, wanted {wanted} for {shape} in blocks of {rows} x {columns}"
        )
        raise ModelError(message)
    if scales.get_dtype() not in {"F32", "F16", "BF16", "F64", "F8_E8M0"}:
        message = f"{key}{_SCALES}: got {scales.get_dtype()}, wanted floats"
        raise ModelError(message)
    return BlockSource(weight, scales, (rows, columns), dtype)
