"""A rank's scratch memory: slices are cut off one after the other and all given back at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Scratch"]

# What CUDA allocates by; a multiple of every element's size and of a line of any cache.
_ALIGNMENT = 256


class Scratch:
    """Scratch of one rank on its device. It grows to the most taken between two calls of `begin`."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._memory: torch.Tensor | None = None
        self._taken = 0
        self._most = 0

    def begin(self) -> None:
        """Give everything back. Memory that turned out too small is replaced by one that would have done."""
        if self._memory is not None and self._taken > len(self._memory):
            self._memory = None
        self._most, self._taken = max(self._most, self._taken), 0

    def take(self, size: int) -> torch.Tensor:
        """Bytes that nobody else has until `begin`."""
        import torch  # noqa: PLC0415 - the package works without torch until tensors are wanted

        start = self._taken
        self._taken += -(-size // _ALIGNMENT) * _ALIGNMENT
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            if self._memory is None and self._most >= self._taken:
                self._memory = torch.empty(self._most, dtype=torch.uint8, device=self._device)
            if self._memory is None or self._taken > len(self._memory):
                # Memory of its own for now: slices given out before keep theirs.
                return torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._memory[start : start + size]
