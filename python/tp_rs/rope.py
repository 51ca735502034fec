"""Tables of rotary position embeddings, from the parameters that a model's configuration carries.

`default`, `linear` and `llama3` are computed here, in float32 and in the order of operations of
transformers' `modeling_rope_utils`, so that the frequencies are the same numbers. The other kinds are asked
of transformers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tp_rs._native import ModelShape
from tp_rs.errors import InvalidInput
from tp_rs.models import shape_of

if TYPE_CHECKING:
    import torch

    from tp_rs._native import Plan

__all__ = ["checked", "merged", "settings_of", "tables"]

_HINT = (
    'pass rope={"rope_theta": 10000.0, "head_dim": 64, ...} to TPContext, with the fields of a config.json'
)


_FIELDS = {
    "head_dim",
    "hidden_size",
    "max_position_embeddings",
    "model_type",
    "n_embd",
    "n_head",
    "num_attention_heads",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "qk_rope_head_dim",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_dim",
    "rotary_emb_base",
    "rotary_pct",
}
"""What a config.json says of rotations."""
_OF_A_SET = ("rope_theta", "partial_rotary_factor")
"""Fields that transformers 5 writes into `rope_parameters`, and older versions beside it."""


def checked(own: object) -> dict[str, Any] | None:
    """Fields that a caller passes, each of them known.

    Raises:
        InvalidInput: They are no dict, or one is unknown.
    """
    if own is None:
        return None
    if not isinstance(own, Mapping):
        message = f"rope: got {own!r}, wanted a dict; {_HINT}"
        raise InvalidInput(message)
    unknown = sorted(str(name) for name in own if name not in _FIELDS)
    if unknown:
        message = f"rope: got {', '.join(unknown)}, wanted some of {', '.join(sorted(_FIELDS))}"
        raise InvalidInput(message)
    return dict(own)


def merged(settings: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A model's settings with a caller's fields over them, whichever version of transformers wrote either.

    Raises:
        InvalidInput: A field has one value, and the model's kinds of layers rotate differently.
    """
    if not own:
        return None if settings is None else dict(settings)
    nested = (settings or {}).get("text_config")
    base = dict(nested if isinstance(nested, Mapping) else settings or {})
    sets = base.get("rope_parameters")
    if "rope_scaling" in own or "rope_parameters" in own:
        # Either says all of it but the base.
        for name in ("rope_scaling", "rope_parameters"):
            base.pop(name, None)
        if isinstance(sets, Mapping) and "rope_theta" in sets:
            base["rope_theta"] = sets["rope_theta"]
    elif isinstance(sets, Mapping):
        values = {name: own[name] for name in _OF_A_SET if name in own}
        if values and any(isinstance(value, Mapping) for value in sets.values()):
            message = (
                f"rope: got {', '.join(values)}, and kinds of layers rotate differently: {', '.join(sets)}; "
                "pass rope_parameters with a dict for each"
            )
            raise InvalidInput(message)
        base["rope_parameters"] = {**sets, **values}
    return {**base, **own}


def settings_of(model: object, plan: Plan | None = None) -> dict[str, Any] | None:
    """The configuration in which a model's rotary parameters are, or None where it carries none.

    `plan` is asked where `model` itself does not tell.
    """
    if isinstance(model, Mapping):
        return dict(model)
    holders: tuple[Any, ...] = (model, getattr(model, "config", None))
    for holder in holders:
        if holder is None or isinstance(holder, type):
            continue
        if callable(getattr(holder, "to_dict", None)) and hasattr(holder, "model_type"):
            return dict(holder.to_dict())
        if hasattr(holder, "rotary_embedding_base"):
            return _from_exllamav2(holder)
    if plan is not None and plan.model.rotary is not None:
        return plan.model.rotary
    # A plan from elsewhere may lack them.
    return shape_of(model).rotary if isinstance(model, (str, os.PathLike, ModelShape)) else None


def _from_exllamav2(config: Any) -> dict[str, Any]:
    kind = getattr(config, "alt_rope_method", None)
    if kind not in (None, "default"):
        message = f"model: got alt_rope_method {kind!r}, wanted the plain or the linear one; {_HINT}"
        raise InvalidInput(message)
    dim = config.head_dim
    alpha = getattr(config, "scale_alpha_value", None) or 1.0
    settings = {
        "head_dim": dim,
        # NTK scaling as ExLlamaV2 does it (`device.py`): a larger base.
        "rope_theta": config.rotary_embedding_base * alpha ** (dim / (dim - 2)),
        "partial_rotary_factor": getattr(config, "partial_rotary_factor", None) or 1.0,
        "max_position_embeddings": config.max_seq_len,
    }
    scale = getattr(config, "scale_pos_emb", None) or 1.0
    if scale != 1.0:
        settings["rope_scaling"] = {"rope_type": "linear", "factor": scale}
    return settings


def tables(settings: Mapping[str, Any] | None, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sine and cosine of every position below `length`.

    Returns:
        Two float32 tensors `[sets, 1, length, rotated columns]`; `sets` is 1 but for models whose kinds of
        layers rotate differently. Both halves of the columns are alike (the NeoX layout).

    Raises:
        InvalidInput: The parameters are missing or not usable.
    """
    import torch  # noqa: PLC0415 - the package works without torch until tensors are wanted

    if settings is None:
        message = (
            "model: got one that does not say how positions are rotated (a GGUF file may keep that in a "
            f"tensor, which is not read), wanted a config that does; {_HINT}"
        )
        raise InvalidInput(message)
    nested = settings.get("text_config")
    config = dict(nested if isinstance(nested, Mapping) else settings)
    sines, cosines = [], []
    for layer_type, parameters in _sets(config):
        frequencies, scale = _frequencies(torch, config, parameters, layer_type, length)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies.float())
        angles = torch.cat((angles, angles), dim=-1)
        sines.append(angles.sin() * scale)
        cosines.append(angles.cos() * scale)
    return torch.stack(sines)[:, None], torch.stack(cosines)[:, None]


def _sets(config: Mapping[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
    """The sets of parameters with their layer types, as versions 4 and 5 of transformers write them."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        message = f"rope_parameters: got {given!r}, wanted a dict"
        raise InvalidInput(message)
    if given and all(isinstance(value, Mapping) for value in given.values()):
        return [(name, dict(value)) for name, value in given.items()]
    sets: list[tuple[str | None, dict[str, Any]]] = [(None, dict(given))]
    local = config.get("rope_local_base_freq")
    if local is not None:
        # Gemma 3 before transformers 5: its layers with a window rotate by a base of their own, unscaled.
        sets.append((None, {"rope_theta": local, "rope_type": "default"}))
    return sets


def _frequencies(
    torch: Any, config: Mapping[str, Any], parameters: dict[str, Any], layer_type: str | None, length: int
) -> tuple[Any, float]:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = _number("rope_theta", parameters.get("rope_theta"), config, "rotary_emb_base")
    if kind not in ("default", "linear", "llama3"):
        return _of_transformers(kind, config, {"rope_theta": theta, **parameters}, layer_type, length)
    dim = _rotated(config, parameters)
    frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    if kind == "linear":
        frequencies /= _needed(parameters, "factor")
    if kind == "llama3":
        frequencies = _llama3(torch, frequencies, parameters)
    return frequencies, 1.0


def _llama3(torch: Any, frequencies: Any, parameters: Mapping[str, Any]) -> Any:
    """Long waves are stretched by the factor, short ones kept, and those between blended (Llama 3.1)."""
    factor = _needed(parameters, "factor")
    low, high = _needed(parameters, "low_freq_factor"), _needed(parameters, "high_freq_factor")
    context = _needed(parameters, "original_max_position_embeddings")
    waves = 2 * math.pi / frequencies
    stretched = torch.where(waves > context / low, frequencies / factor, frequencies)
    blend = (context / waves - low) / (high - low)
    blended = (1 - blend) * stretched / factor + blend * stretched
    between = ~(waves < context / high) * ~(waves > context / low)
    return torch.where(between, blended, stretched)


def _of_transformers(
    kind: str, config: Mapping[str, Any], parameters: dict[str, Any], layer_type: str | None, length: int
) -> tuple[Any, float]:
    try:
        from transformers import AutoConfig  # noqa: PLC0415 - takes seconds, and few models need it
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415
    except ImportError as error:
        message = f"rope_type: got {kind!r}, wanted transformers installed for it: pip install transformers"
        raise InvalidInput(message) from error
    function = ROPE_INIT_FUNCTIONS.get(kind)
    if function is None:
        wanted = f"one of {sorted({'default', *ROPE_INIT_FUNCTIONS})}"
        message = f"rope_type: got {kind!r}, wanted {wanted}"
        raise InvalidInput(message)
    fields = {name: value for name, value in config.items() if name not in ("model_type", "rope_scaling")}
    if layer_type is None:
        fields["rope_parameters"] = {"rope_type": kind, **parameters}
    try:
        settings = AutoConfig.for_model(str(config.get("model_type", "llama")), **fields)
        more = {} if layer_type is None else {"layer_type": layer_type}
        frequencies, scale = function(settings, "cpu", seq_len=length, **more)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"rope_parameters: got {parameters!r}, which transformers refuses: {error}"
        raise InvalidInput(message) from error
    return frequencies, float(scale)


def _rotated(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    """Columns of a head that are rotated."""
    dim = config.get("qk_rope_head_dim") or config.get("rotary_dim")
    if dim is None:
        head = config.get("head_dim")
        if head is None:
            heads = int(_number("num_attention_heads", config.get("num_attention_heads"), config, "n_head"))
            head = int(_number("hidden_size", config.get("hidden_size"), config, "n_embd")) // heads
        part = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        dim = int(head * (config.get("rotary_pct", 1.0) if part is None else part))
    if dim <= 0 or dim % 2:
        message = f"head_dim: got {dim} rotated columns, wanted an even number above 0"
        raise InvalidInput(message)
    return int(dim)


def _number(name: str, value: object, config: Mapping[str, Any], *others: str) -> float:
    for candidate in (value, *(config.get(other) for other in (name, *others))):
        if isinstance(candidate, (int, float)) and candidate > 0:
            return float(candidate)
    message = f"{name}: got {config.get(name)!r}, wanted a number above 0; {_HINT}"
    raise InvalidInput(message)


def _needed(parameters: Mapping[str, Any], name: str) -> float:
    value = parameters.get(name)
    if not isinstance(value, (int, float)) or value <= 0:
        message = f"rope_parameters[{name!r}]: got {value!r}, wanted a number above 0"
        raise InvalidInput(message)
    return float(value)
