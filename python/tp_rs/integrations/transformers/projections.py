"""The linear layers of a module, whatever holds them and whichever way their weights lie."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["Projection", "projection", "projections"]


@dataclass(frozen=True)
class Projection:
    """A linear layer, or GPT-2's `Conv1D`, whose weight is the transpose of one."""

    path: str
    """Its module, from the one that it was looked up in."""
    module: nn.Module

    @property
    def out_dim(self) -> int:
        """The dimension of the weight that outputs are along."""
        return 1 if isinstance(self.module, Conv1D) else 0

    @property
    def out_features(self) -> int:
        """Columns that it gives."""
        return self.module.get_parameter("weight").shape[self.out_dim]

    @property
    def in_features(self) -> int:
        """Columns that it takes."""
        return self.module.get_parameter("weight").shape[1 - self.out_dim]

    @property
    def has_bias(self) -> bool:
        """Whether it adds something."""
        return getattr(self.module, "bias", None) is not None


def projection(module: nn.Module, path: str) -> Projection | None:
    """The linear layer at a path, None where there is none."""
    found: nn.Module | None = module
    for leaf in path.split("."):
        found = dict(found.named_children()).get(leaf) if found is not None else None
    if isinstance(found, (nn.Linear, Conv1D)):
        return Projection(path, found)
    inner = dict(found.named_children()) if found is not None else {}
    only = inner.get("linear")
    # Moshi wraps each of its layers.
    if len(inner) == 1 and isinstance(only, nn.Linear) and not list(found.parameters(recurse=False)):  # type: ignore[union-attr]  # it has children
        return Projection(f"{path}.linear", only)
    return None


def projections(module: nn.Module) -> dict[str, Projection]:
    """The linear layers among a module's children, by the children's names."""
    found = ((leaf, projection(module, leaf)) for leaf, _ in module.named_children())
    return {leaf: each for leaf, each in found if each is not None}
