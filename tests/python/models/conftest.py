"""Models: small random checkpoints, run whole and over ranks."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")


def pytest_addoption(parser):
    parser.addoption(
        "--all-architectures", action="store_true", help="every architecture with a plan, not a third of them"
    )


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)
