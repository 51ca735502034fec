"""What `tp_rs` raises. A missing file stays `FileNotFoundError`, an unreadable one `OSError`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tp_rs._native import Shortfall

__all__ = ["CollectiveTimeout", "CudaError", "DoesNotFit", "InvalidInput", "ModelError", "TPError"]


class TPError(Exception):
    """Above all others."""


class InvalidInput(TPError, ValueError):
    """The caller passed something that cannot be used; the message names the argument."""


class DoesNotFit(InvalidInput):
    """The model does not fit the budgets."""

    shortfall: Shortfall | None
    """Which rank misses how much, and what to do."""

    def __init__(self, message: str, shortfall: Shortfall | None = None) -> None:
        super().__init__(message)
        self.shortfall = shortfall


class ModelError(TPError):
    """The checkpoint is broken or cannot be split."""


class CudaError(TPError, RuntimeError):
    """The CUDA driver refused a call."""

    call: str | None
    """The driver function."""
    code: int | None
    """The driver's error code."""

    def __init__(self, message: str, call: str | None = None, code: int | None = None) -> None:
        super().__init__(message)
        self.call = call
        self.code = code


class CollectiveTimeout(TPError, TimeoutError):
    """Ranks did not come to a collective operation in time."""

    missing: tuple[int, ...]
    """The ranks that did not come."""

    def __init__(self, message: str, missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
