"""A model of the same type, small enough to run whole in a second: what a layout is tried on."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from tp_rs.errors import ModelError
from tp_rs.integrations.transformers.sizes import KV_HEADS, LAYERS, SHAPES, Shape, chosen, sizes

__all__ = ["KV_HEADS", "SHAPES", "make_twin", "shrunk_config", "twin_config"]

_LARGEST = 50_000_000
_NOT_CHOICES = ("architectures", "model_type", "transformers_version", "quantization_config", "dtype")


def twin_config(
    kind: type[PretrainedConfig], changes: dict[str, Any] | None = None, shape: Shape = SHAPES[0]
) -> PretrainedConfig:
    """A small configuration of a type: its defaults with every known size made small, parts included.

    Args:
        kind: The configuration class.
        changes: Fields to set otherwise. A dictionary for a part changes fields of that part.
        shape: The sizes of the heads.
    """
    return _small(kind, kind(), None, changes or {}, shape)


def shrunk_config(config: PretrainedConfig, shape: Shape = SHAPES[0]) -> PretrainedConfig:
    """A small configuration with the choices of a given one: only its known sizes are made small."""
    kind = type(config)
    return _small(kind, kind(), config, {}, shape)


def _small(
    kind: type[PretrainedConfig],
    defaults: PretrainedConfig,
    own: PretrainedConfig | None,
    changes: dict[str, Any],
    shape: Shape,
) -> PretrainedConfig:
    mapped: dict[str, str] = getattr(kind, "attribute_map", {})
    usual = defaults.to_dict()
    values = usual if own is None else own.to_dict()
    known = {name: value for name, value in sizes(shape).items() if name in values or name in mapped}
    known = {
        name: chosen(name, usual.get(mapped.get(name, name)), value)
        for name, value in known.items()
        if mapped.get(name) not in known and _settable(kind, name)
    }
    small = {} if own is None else _choices(own, defaults, known)
    small |= known
    small |= _layer_kinds(kind, own or defaults)
    parameters = getattr(own or defaults, "rope_parameters", None)
    if isinstance(parameters, dict) and "mrope_section" in parameters:
        small["rope_parameters"] = {**parameters, "mrope_section": _sections(shape)}
    if values.get("kv_lora_rank") is not None:
        small["num_key_value_heads"] = shape.heads
        if "rope_interleave" in values:
            small["head_dim"] = small["qk_rope_head_dim"]
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(own or defaults, name, None)
        if isinstance(part, PretrainedConfig):
            part_changes = changes.get(name)
            small[name] = _small(
                type(part),
                type(part)() if own is not None else part,
                part if own is not None else None,
                part_changes if isinstance(part_changes, dict) else {},
                shape,
            )
    whole = {
        name: value
        for name, value in changes.items()
        if not isinstance(small.get(name), PretrainedConfig) or not isinstance(value, dict)
    }
    return kind(**small | whole)


def _settable(kind: type[PretrainedConfig], name: str) -> bool:
    """Whether a field is one of its own: a property is made from others, and some refuse to be set."""
    name = getattr(kind, "attribute_map", {}).get(name, name)
    return not isinstance(getattr(kind, name, None), property)


def _sections(shape: Shape) -> list[int]:
    """Rotary pairs of a head by time, height and width."""
    pairs = shape.head // 2
    return [pairs // 4, pairs // 4, pairs - 2 * (pairs // 4)]


def _choices(own: PretrainedConfig, defaults: PretrainedConfig, known: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that its type would set otherwise, sizes left out."""
    usual = defaults.to_dict()
    layers = getattr(own, "num_hidden_layers", None)
    choices = {}
    for name, value in own.to_dict().items():
        if name in _NOT_CHOICES or (name in usual and usual[name] == value):
            continue
        if value is None and name in known:
            # What a model does without is a choice too.
            del known[name]
        if name not in known and _settable(type(own), name):
            choices[name] = _kinds(value) if isinstance(value, list) and len(value) == layers else value
    for name in getattr(type(own), "sub_configs", {}):
        choices.pop(name, None)
    return choices


def _layer_kinds(kind: type[PretrainedConfig], config: PretrainedConfig) -> dict[str, list[str]]:
    """The lists that say what each layer is, made as short as the small model."""
    found = {}
    mapped = getattr(kind, "attribute_map", {})
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        types = getattr(config, name, None)
        if isinstance(types, list) and types and name not in mapped and _settable(kind, name):
            found[name] = _kinds(types)
    return found


def _kinds(types: list[Any]) -> list[Any]:
    """Kinds of layers for a small model, all of the large one's among them."""
    kinds = [kind for place, kind in enumerate(types) if kind not in types[:place]]
    return (kinds * LAYERS)[:LAYERS]


def make_twin(
    config: PretrainedConfig, kind: type[PreTrainedModel] | None = None, seed: int = 0
) -> PreTrainedModel:
    """A model with random weights that are large enough for every part to matter.

    Raises:
        ModelError: transformers has no causal language model of this configuration, or it is not small.
    """
    chosen_kind: Any = kind
    if chosen_kind is None:
        with suppress(KeyError):
            chosen_kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if chosen_kind is None:
        message = f"{config.model_type}: no causal language model"
        raise ModelError(message)
    text = config.get_text_config()
    if chosen_kind.config_class is type(text):
        # The class is the text model's, as `AutoModelForCausalLM` has it for a wrapper's configuration.
        config = text
    with torch.device("meta"):
        size = sum(each.numel() for each in chosen_kind._from_config(config).parameters())  # noqa: SLF001  as below
    if size > _LARGEST:
        message = (
            f"{config.model_type}: its small model still has {size:,} parameters, more than {_LARGEST:,}"
        )
        raise ModelError(message)
    model: Any = chosen_kind._from_config(config, dtype=torch.float32)  # noqa: SLF001  no public name
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (0.5 if "embed" in name else 1.0 / fan**0.5))
            else:
                parameter.copy_(noise * 0.2 + (1.0 if "norm" in name else 0.0))
    made: PreTrainedModel = model.eval()
    return made
