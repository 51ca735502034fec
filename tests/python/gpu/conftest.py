"""Tests that need an NVIDIA GPU. One is enough: several ranks share it."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _why_not() -> str | None:
    try:
        import torch  # noqa: PLC0415
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "no NVIDIA GPU, or no driver for it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them with the reason where there is no GPU."""
    reason = _why_not()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
