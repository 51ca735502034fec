"""Matrix products of one row by a kernel of our own, inside recorded steps.

A step of one token reads every weight once and does little else. Libraries' products of one row reach between
a fifth and nine tenths of the memory's speed: least for the small ones, of which a model over ranks is full.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from tp_rs.integrations.transformers.static_step import has_triton

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["OneRow", "multiply", "one_row_products"]

_DTYPES = {torch.float16, torch.bfloat16, torch.float32}
_CAPABILITY = 8
"""The first number of the compute capability from which on Triton knows all of them."""


class OneRow(nn.Linear):
    """A linear layer while its products are of one row. An object becomes one, and is itself again later."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        one_row = hidden.numel() == hidden.shape[-1] == self.weight.shape[1]
        if not one_row or hidden.dtype != self.weight.dtype:
            return linear(hidden, self.weight, self.bias)
        # Loaded by `one_row_products`; under this name the compiler sees an operation.
        result: torch.Tensor = torch.ops.tp_rs.product(hidden, self.weight, self.bias)
        return result


def multiply(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What the forward of a linear layer returns that has got another forward."""
    if isinstance(module, OneRow):
        return OneRow.forward(module, hidden)
    return linear(hidden, module.weight, module.bias)  # type: ignore[arg-type]  # a linear layer's


@contextmanager
def one_row_products(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let products of one row be made by our kernel where that is the faster one.

    Args:
        modules: A rank's. Linear layers on a CUDA device are changed meanwhile.
    """
    changed: list[Any] = [module for module in modules if _can(module)] if has_triton() else []
    if changed:
        # Makes the operation known.
        from tp_rs.integrations.transformers import product_kernel  # noqa: F401, PLC0415  needs Triton
    for module in changed:
        module.__class__ = OneRow
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Linear


def _can(module: nn.Module) -> bool:
    if type(module) is not nn.Linear:
        return False
    weight: torch.Tensor = module.weight
    bias: torch.Tensor | None = module.bias
    return (
        weight.device.type == "cuda"
        and weight.dtype in _DTYPES
        and weight.numel() > 0
        and weight.stride(1) == 1
        and (bias is None or bias.dtype == weight.dtype)
        and torch.cuda.get_device_capability(weight.device)[0] >= _CAPABILITY
    )
