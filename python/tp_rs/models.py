"""From whatever the user has to a `ModelShape`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tp_rs._native import ModelShape
from tp_rs.errors import InvalidInput

__all__ = ["attention_footprint", "shape_of"]

_log = logging.getLogger("tp_rs")

_ACCEPTED = (
    "a path to a checkpoint's folder, a GGUF file, a safetensors file or a config.json; a config dict; a "
    "transformers config or model; an ExLlamaV2-like model or config; or a tp_rs.ModelShape"
)

_EXLLAMAV2_ATTRIBUTES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_key_value_groups",
    "num_hidden_layers",
    "head_dim",
    "max_seq_len",
    "max_batch_size",
    "max_input_len",
    "max_output_len",
    "num_experts",
    "num_experts_per_token",
    "tie_word_embeddings",
    "sliding_window",
)


def shape_of(model: object) -> ModelShape:
    """Read what a split must know of `model`.

    Args:
        model: A path, a config dict, a transformers config or model, an ExLlamaV2-like model or config, or a
            `ModelShape`, which is returned as it is.

    Raises:
        InvalidInput: `model` is none of these.
        ModelError: What it describes is broken or cannot be split.
        FileNotFoundError: The path does not exist.
    """
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        if not isinstance(path, str) or not path:
            message = f"model: got the path {path!r}, wanted {_ACCEPTED}"
            raise InvalidInput(message)
        return ModelShape.from_path(path)
    if isinstance(model, Mapping):
        return ModelShape.from_config(dict(model), _name(model.get("_name_or_path"), "config"))

    for holder in (model, getattr(model, "config", None)):
        # A class has the attributes of its instances, but not their values.
        if holder is None or isinstance(holder, type):
            continue
        if callable(getattr(holder, "to_dict", None)):
            return _from_transformers(holder)
        if hasattr(holder, "arch") and hasattr(holder, "hidden_size"):
            return _from_exllamav2(holder)

    message = f"model: got {_shown(model)}, wanted {_ACCEPTED}"
    raise InvalidInput(message)


def attention_footprint(model: object) -> list[int] | None:
    """Bytes of every attention module's weights as ExLlamaV2 reports them, or None where there are none.

    The reference's arithmetic rounds each of them by itself, so only the list lets a plan follow it exactly.
    """
    modules = getattr(model, "modules", None)
    if not isinstance(modules, (list, tuple)):
        return None
    footprints = [
        int(module.weight_footprint())
        for module in modules
        if any(base.__name__ == "ExLlamaV2Attention" for base in type(module).__mro__)
    ]
    return footprints or None


def _from_transformers(config: Any) -> ModelShape:
    settings = config.to_dict()
    if not isinstance(settings, Mapping):
        given = f"{_shown(config)} whose to_dict() gives {_shown(settings)}"
        message = f"model: got {given}, wanted {_ACCEPTED}"
        raise InvalidInput(message)
    name = _name(getattr(config, "name_or_path", None), type(config).__name__)
    return ModelShape.from_config(dict(settings), name)


def _from_exllamav2(config: Any) -> ModelShape:
    attributes: dict[str, object] = {}
    for name in _EXLLAMAV2_ATTRIBUTES:
        value = getattr(config, name, None)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float, str)):
            _log.debug("ignoring %s of %s: %s", name, type(config).__name__, _shown(value))
            continue
        attributes[name] = value
    arch = config.arch
    architecture = getattr(arch, "arch_string", None)
    if isinstance(architecture, str):
        attributes["arch_string"] = architecture
    supports_tp = getattr(getattr(arch, "lm", None), "supports_tp", None)
    if isinstance(supports_tp, bool):
        attributes["supports_tp"] = supports_tp
    folder = getattr(config, "model_dir", None)
    if isinstance(folder, (str, os.PathLike)) and Path(folder).is_dir():
        # Its headers give the exact bytes. Without it the attributes have to do.
        attributes["model_dir"] = os.fspath(folder)
    return ModelShape.from_exllamav2(attributes, _name(folder, type(config).__name__))


def _name(candidate: object, otherwise: str) -> str:
    return candidate if isinstance(candidate, str) and candidate else otherwise


def _shown(value: object) -> str:
    """A value for a message: its type, and its repr where that is short."""
    limit = 60
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a broken __repr__ must not hide the message that it is for
        text = ""
    kind = type(value).__name__
    return f"{text} ({kind})" if text and len(text) <= limit else f"an object of type {kind}"
