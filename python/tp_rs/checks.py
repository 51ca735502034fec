"""Checks of what tensors' calls are given, and the words for what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tp_rs._native import Plan
from tp_rs.errors import InvalidInput
from tp_rs.models import shape_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["checked_dtype", "described", "first", "invalid", "same_model", "whole"]


def checked_dtype(argument: str, dtype: object) -> torch.dtype:
    """A torch dtype, else `InvalidInput`."""
    import torch  # noqa: PLC0415 - the package works without torch until tensors are wanted

    if not isinstance(dtype, torch.dtype):
        raise invalid(argument, repr(dtype), "a torch dtype, such as torch.float16")
    return dtype


def described(argument: str, tensor: object) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a tensor that has a last dimension."""
    shape, dtype = getattr(tensor, "shape", None), getattr(tensor, "dtype", None)
    if shape is None or dtype is None or not hasattr(dtype, "itemsize") or not hasattr(tensor, "data_ptr"):
        raise invalid(argument, f"a {type(tensor).__name__}", "a torch tensor")
    if not len(shape):
        raise invalid(
            argument, "a tensor without dimensions", "one whose last dimension is that of the split"
        )
    return tuple(shape), dtype


def first(argument: str, tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a list's first tensor."""
    if not isinstance(tensors, (list, tuple)) or not tensors:
        got = "an empty list" if isinstance(tensors, (list, tuple)) else f"a {type(tensors).__name__}"
        raise invalid(argument, got, "a list with one tensor for each interval of the split")
    return described(f"{argument}[0]", tensors[0])


def whole(argument: str, value: object) -> int:
    """A whole number of 0 or more, else `InvalidInput`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise invalid(argument, repr(value), "a whole number of 0 or more")
    return value


def invalid(argument: str, got: str, wanted: str) -> InvalidInput:
    """The exception in the words that the native half uses too."""
    return InvalidInput(f"{argument}: got {got}, wanted {wanted}")


def same_model(plan: Plan, model: object) -> None:
    """Refuse what is no plan, and a plan that was made for a model of other dimensions."""
    if not isinstance(plan, Plan):
        raise invalid("plan", f"a {type(plan).__name__}", "a tp_rs.Plan; Plan.from_dict makes one of a dict")
    shape, planned = shape_of(model), plan.model
    pairs = {
        "hidden_size": (planned.hidden, shape.hidden_size),
        "intermediate_size": (planned.intermediate, shape.intermediate_size),
        "num_attention_heads": (planned.query_heads, shape.num_attention_heads),
        "num_key_value_heads": (planned.kv_heads, shape.num_key_value_heads),
        "head_dim": (planned.head_dim, shape.head_dim),
        "num_hidden_layers": (planned.layers, shape.num_hidden_layers),
        "vocab_size": (planned.vocabulary, shape.vocab_size),
    }
    for name, (left, right) in pairs.items():
        if left != right:
            got = f"one for {planned.name} with {name} {left}"
            raise invalid("plan", got, f"one for {shape.name}, whose {name} is {right}: make the plan anew")
