"""Matrix products inside recorded steps: of one row by a kernel of our own, and of several layers at once.

A step of one token reads every weight once and does little else. Libraries' products of one row reach between
a fifth and nine tenths of the memory's speed: least for the small ones, of which a model over ranks is full.
Layers that get the same input, as queries, keys and values do, are one product where their weights lie in one
piece (`stacks.py`): a device begins and ends a large one once, where it would do so for each.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from tp_rs.integrations.transformers.static_step import has_triton
from tp_rs.integrations.transformers.triton_device import multiprocessors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["OneRow", "Stack", "Stacked", "find_stacks", "multiply", "one_row_products", "stacked_products"]

_DTYPES = {torch.float16, torch.bfloat16, torch.float32}
_CAPABILITY = 8
"""The first number of the compute capability from which on Triton knows all of them."""
_TILE = 128
"""Rows and columns of a result that a multiprocessor usually makes at once."""
_MOST_ROWS = 512
"""Of a product of several layers: it stays until the last of them is used, which plans do not count."""


class OneRow(nn.Linear):
    """A linear layer while its products are of one row. An object becomes one, and is itself again later."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return _multiply(hidden, self.weight, self.bias)


class Stack:
    """Linear layers of one parent whose weights lie one behind the other.

    Args:
        modules: The layers, in the order of their weights.
    """

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self.modules = list(modules)
        self.weight = _joined([module.weight for module in modules])
        biases: list[Any] = [module.bias for module in modules]
        self.bias = None if biases[0] is None else _joined(biases)
        self.columns = self.weight.shape[0]
        self.least = min(module.weight.shape[0] for module in modules)
        """Outputs of the smallest layer."""
        self.by_kernel = _can(modules[0])
        self.apart = False
        """Whether the layers turned out to get different inputs."""
        self.given: torch.Tensor | None = None
        self.result: torch.Tensor | None = None

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """All layers' outputs, one behind the other."""
        if self.by_kernel:
            return _multiply(hidden, self.weight, self.bias)
        return linear(hidden, self.weight, self.bias)

    def pays(self, rows: int) -> bool:
        """Whether one product of so many rows is faster than one a layer.

        It is where a layer's own is too small to fill half of the device.
        """
        if rows == 1:
            return True
        if rows > _MOST_ROWS:
            return False
        return 2 * rows * self.least <= _TILE * _TILE * multiprocessors(self.weight.device)


class Stacked(OneRow):
    """A linear layer whose product is made with those of its stack, by the first of them to be called."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), a part of what the stack made."""
        stack: Stack = self.tp_rs_stack  # type: ignore[assignment]  # set while it is one
        start, end = self.tp_rs_columns  # type: ignore[misc]  # as above
        if stack.given is not None and stack.given is not hidden:
            stack.apart, stack.given, stack.result = True, None, None
        if stack.apart or hidden.dtype != self.weight.dtype:
            return linear(hidden, self.weight, self.bias)
        if stack.result is None:
            stack.given, stack.result = hidden, stack.of(hidden)
        part = stack.result[..., start:end]
        if end == stack.columns:
            stack.given = stack.result = None
        return part


def multiply(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What the forward of a linear layer returns that has got another forward."""
    if isinstance(module, OneRow):
        return OneRow.forward(module, hidden)
    return linear(hidden, module.weight, module.bias)  # type: ignore[arg-type]  # a linear layer's


def _multiply(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    one_row = hidden.numel() == hidden.shape[-1] == weight.shape[1]
    if not one_row or hidden.dtype != weight.dtype:
        return linear(hidden, weight, bias)
    # Loaded by `_ready`; under this name the compiler sees an operation.
    result: torch.Tensor = torch.ops.tp_rs.product(hidden, weight, bias)
    return result


@contextmanager
def one_row_products(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let products of one row be made by our kernel where that is the faster one.

    Args:
        modules: A rank's. Linear layers on a CUDA device are changed meanwhile.
    """
    changed: list[Any] = list(filter(_can, modules))
    for module in changed:
        module.__class__ = OneRow
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Linear


@contextmanager
def stacked_products(stacks: Iterable[Stack], rows: int) -> Iterator[None]:
    """Let layers that lie in one piece make one product of so many rows, where that pays.

    Args:
        stacks: A rank's. Their layers are changed meanwhile.
        rows: Of their inputs.
    """
    used = [stack for stack in stacks if not stack.apart and stack.pays(rows)]
    for stack in used:
        start = 0
        for module in stack.modules:
            end = start + module.weight.shape[0]
            module.__dict__.update(tp_rs_stack=stack, tp_rs_columns=(start, end))
            module.__class__ = Stacked
            start = end
    try:
        yield
    finally:
        for stack in used:
            stack.given = stack.result = None
            for module in stack.modules:
                module.__class__ = nn.Linear
                del module.__dict__["tp_rs_stack"], module.__dict__["tp_rs_columns"]


def find_stacks(model: nn.Module) -> list[Stack]:
    """The layers of one parent, of the same kind, whose weights and biases lie in one piece."""
    stacks = []
    for parent in model.modules():
        run: list[nn.Linear] = []
        for module in parent.children():
            # What meets other ranks has a forward of its own.
            if type(module) is not nn.Linear or "forward" in module.__dict__:
                continue
            if run and not _follows(run[-1], module):
                stacks += [Stack(run)] if len(run) > 1 else []
                run = []
            run.append(module)
        stacks += [Stack(run)] if len(run) > 1 else []
    return stacks


def _follows(before: nn.Linear, module: nn.Linear) -> bool:
    if (before.bias is None) != (module.bias is None):
        return False
    pairs = [(before.weight, module.weight)]
    if module.bias is not None:
        pairs.append((before.bias, module.bias))
    return all(
        first.dtype == second.dtype
        and first.shape[1:] == second.shape[1:]
        and first.is_contiguous()
        and second.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() != 0
        and first.storage_offset() + first.numel() == second.storage_offset()
        for first, second in pairs
    )


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    first = parts[0].detach()
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return first.as_strided(shape, first.stride())


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
        and _ready()
    )


def _ready() -> bool:
    """Whether there is the kernel, which is made known to torch."""
    if not has_triton():
        return False
    from tp_rs.integrations.transformers import product_kernel  # noqa: F401, PLC0415  needs Triton

    return True
