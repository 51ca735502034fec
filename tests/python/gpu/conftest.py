"""Tests that need an NVIDIA GPU. Ranks share the first one, and where there are more, are on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gpu_common import Place

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


@pytest.fixture(params=["together", "spread"])
def place(request: pytest.FixtureRequest) -> Place:
    """Where ranks are: on one GPU, or on all."""
    import torch  # noqa: PLC0415
    from gpu_common import Place  # noqa: PLC0415

    gpus = torch.cuda.device_count()
    if request.param == "spread" and gpus < 2:
        pytest.skip("needs two GPUs or more")
    return Place(1 if request.param == "together" else gpus)


@pytest.fixture
def spread() -> Place:
    """Ranks on all GPUs, of which there are at least two."""
    import torch  # noqa: PLC0415
    from gpu_common import Place  # noqa: PLC0415

    gpus = torch.cuda.device_count()
    if gpus < 2:
        pytest.skip("needs two GPUs or more")
    return Place(gpus)
