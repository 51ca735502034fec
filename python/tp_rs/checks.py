"""Checks of what tensors' calls are given, and the words for what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tp_rs.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["described", "first", "invalid", "whole"]


def described(argument: str, tensor: object) -> tuple[tuple[int, ...], torch.dtype]:
    shape, dtype = getattr(tensor, "shape", None), getattr(tensor, "dtype", None)
    if shape is None or not hasattr(dtype, "itemsize") or not hasattr(tensor, "data_ptr"):
        raise invalid(argument, f"a {type(tensor).__name__}", "a torch tensor")
    if not len(shape):
        raise invalid(
            argument, "a tensor without dimensions", "one whose last dimension is that of the split"
        )
    return tuple(shape), dtype


def first(argument: str, tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], torch.dtype]:
    if not isinstance(tensors, (list, tuple)) or not tensors:
        got = "an empty list" if isinstance(tensors, (list, tuple)) else f"a {type(tensors).__name__}"
        raise invalid(argument, got, "a list with one tensor for each interval of the split")
    return described(f"{argument}[0]", tensors[0])


def whole(argument: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise invalid(argument, repr(value), "a whole number of 0 or more")
    return value


def invalid(argument: str, got: str, wanted: str) -> InvalidInput:
    return InvalidInput(f"{argument}: got {got}, wanted {wanted}")
