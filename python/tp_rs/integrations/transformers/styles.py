"""The tensor-parallel plan that an architecture ships, by module name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["has_plan", "planned"]


def has_plan(model: PreTrainedModel) -> bool:
    """Whether the architecture itself says how its layers are cut."""
    return any(plan for _, plan, _ in _plans(model))


def planned(model: PreTrainedModel) -> dict[str, str]:
    """The style of every module and parameter that a plan names.

    The plans come from the configuration classes: a quantiser may have replaced an instance's plan by one
    whose keys match no module. Where an architecture ships only an expert-parallel plan, the styles of that
    are taken, so that its experts and routers are known.
    """
    styles: dict[str, str] = {}
    for prefix, plan, fallback in _plans(model):
        patterns = {**fallback, **plan}
        compiled = [
            (re.compile(re.escape(prefix) + re.escape(key).replace(r"\*", r"\d+") + r"$"), style)
            for key, style in patterns.items()
        ]
        for name in _names(model):
            for pattern, style in compiled:
                if pattern.match(name):
                    styles[name] = style
    return styles


def _names(model: nn.Module) -> Iterator[str]:
    for name, _ in model.named_modules():
        yield name
    for name, _ in model.named_parameters(remove_duplicate=False):
        yield name


def _plans(model: PreTrainedModel) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    for name, module in model.named_modules():
        # A head's configuration is its body's; the plan speaks of the body.
        if isinstance(module, PreTrainedModel) and module.base_model is module:
            kind = type(module.config)
            plan = getattr(kind, "base_model_tp_plan", None)
            experts = getattr(kind, "base_model_ep_plan", None)
            if plan or experts:
                yield (f"{name}." if name else ""), dict(plan or {}), dict(experts or {})
