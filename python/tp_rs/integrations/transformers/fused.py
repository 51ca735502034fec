"""torch.compile of a rank's layers in recorded steps: what lies between the products becomes few kernels."""

from __future__ import annotations

import functools
import importlib.util
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tp_rs.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

__all__ = ["Fused", "require_triton"]

_RECOMPILES = 1024
"""Layers differ in numbers that are compiled in, and steps in shape."""


def require_triton() -> None:
    """Refuse compilation where torch's compiler has no Triton.

    Raises:
        InvalidInput: It is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        message = "compile: it needs the package triton, which is not installed; leave compile out"
        raise InvalidInput(message)


class Fused:
    """The compiled layers of a rank, used only inside `active`.

    Args:
        model: The rank, with its collectives.
        backend: The compiler.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "inductor") -> None:
        kinds = set(getattr(model, "_no_split_modules", None) or ())
        layers = [module for module in model.modules() if type(module).__name__ in kinds]
        self._layers: list[tuple[Any, Any]] = [
            (layer, torch.compile(layer.forward, dynamic=False, backend=backend)) for layer in layers
        ]
        self._numbered: list[tuple[Any, int, Any]] = [
            (module, int(getattr(module, "layer_idx", 0)), torch.tensor(module.layer_idx))
            for layer in layers
            for module in layer.modules()
            if isinstance(getattr(module, "layer_idx", None), int)
        ]
        # A module with a forward of its own meets other ranks, which the compiler cannot look into.
        self._apart: list[Any] = [module for module in model.modules() if "forward" in module.__dict__]

    @contextmanager
    def active(self) -> Iterator[None]:
        """The rank's layers being compiled ones."""
        before = [(module, type(module), module.__dict__.pop("forward")) for module in self._apart]
        for module, kind, forward in before:
            # Of a class and not of the object, so that one layer's code serves all layers.
            module.__class__ = _apart(kind)  # type: ignore[arg-type]  # mypy takes the class for unhashable
            module.__dict__[_OWN] = forward
        for module, _, number in self._numbered:
            # A number would be compiled in; a tensor is passed on to the cache.
            module.layer_idx = number
        for layer, compiled in self._layers:
            layer.forward = compiled
        try:
            with _many_compilations():
                yield
        finally:
            for layer, _ in self._layers:
                layer.__dict__.pop("forward", None)
            for module, number, _ in self._numbered:
                module.layer_idx = number
            for module, kind, forward in before:
                module.__class__ = kind
                del module.__dict__[_OWN]
                module.forward = forward


_OWN = "tp_rs_forward"

_lock = threading.Lock()
_users = 0
_settings: Any = None


@contextmanager
def _many_compilations() -> Iterator[None]:
    """Torch's limits of compilations a function, raised: they are the process's, and ranks come and go."""
    global _users, _settings  # noqa: PLW0603  counted for the process
    dynamo: Any = torch._dynamo  # noqa: SLF001  its settings are documented under this name
    with _lock:
        if not _users:
            _settings = dynamo.config.patch(
                recompile_limit=_RECOMPILES, accumulated_recompile_limit=_RECOMPILES
            )
            _settings.__enter__()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _settings.__exit__(None, None, None)


@functools.cache
def _apart(kind: type) -> type:
    """A class whose modules run their own forward, out of the compiler's sight."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_OWN](*args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
