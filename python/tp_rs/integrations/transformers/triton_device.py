"""What kernels that are written in Triton ask of a device."""

from __future__ import annotations

import functools
from typing import Any

import torch

__all__ = ["multiprocessors", "overlaps"]

_OVERLAPS = 9
"""The first number of the compute capability from which on a kernel may begin before the last has ended."""


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many it has."""
    if device.type != "cuda":
        return 8  # the interpreter
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before is still at work, and wait for its end by itself.

    Programmatic dependent launch: CUDA programming guide, section of that name. A kernel of ours lets the
    next one begin only after its own wait, so that of all kernels before that one only ours may be at work.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _OVERLAPS
