"""What steps of fixed shapes let go of, and when, on CPU ranks."""

import gc
import weakref

import pytest
import torch
from architectures import small

from tp_rs.errors import DoesNotFit
from tp_rs.integrations.transformers import Splits, load
from tp_rs.integrations.transformers import front as front_module
from tp_rs.integrations.transformers.static_step import StaticStep
from tp_rs.integrations.transformers.twin import make_twin

SPLITS = Splits.of(kv=[2, 1, 0], intermediate=[24, 16, 24], vocabulary=[60, 0, 37], groups=2)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def front(request):
    model = make_twin(small(request.param), seed=torch.seed() % 1000)
    front = load(model, plan=SPLITS, check=False, capture=True)
    yield front
    front.unload()


def test_a_step_that_is_over_holds_no_masks(front, monkeypatch):
    masks = []
    finish = StaticStep.finish

    def noted(*args):
        mask = finish(*args)
        masks.append(weakref.ref(mask))
        return mask

    monkeypatch.setattr(StaticStep, "finish", noted)
    captured = front.tp_rs_runner.capture.ready(2, 40)
    gc.collect()
    gc.disable()
    try:
        captured.prefill([torch.randint(3, 90, (length,)) for length in (21, 9)], [0, 0])
        captured.decode(torch.randint(3, 90, (2, 1)), [21, 9])
        assert masks
        # Not when the collector comes: until then no graph could have the memory that they lie in.
        assert not [mask for mask in masks if mask() is not None]
    finally:
        gc.enable()


def test_memory_that_steps_gave_back_is_taken_again(front, monkeypatch):
    taken = []

    def reserve(*_):
        taken.append(1)
        if len(taken) > 1:
            # As where somebody holds the cache that the plan counts.
            raise DoesNotFit("full")

    monkeypatch.setattr(front_module, "reserve", reserve)
    runner = front.tp_rs_runner
    ids = torch.randint(3, 90, (1, 5))
    monkeypatch.setattr(runner.capture, "make_way", lambda: True)
    front(input_ids=ids)
    monkeypatch.setattr(runner.capture, "make_way", lambda: False)
    front(input_ids=ids)
    assert len(taken) == 1
    monkeypatch.setattr(runner.capture, "make_way", lambda: True)
    front(input_ids=ids)
    assert len(taken) == 2
