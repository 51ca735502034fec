"""Steps of fixed shapes: what generate() makes of them, on CPU ranks."""

import gc
import logging
import random
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from architectures import small
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from tp_rs.errors import InvalidInput, TPError
from tp_rs.integrations.transformers import Splits, load, selfcheck
from tp_rs.integrations.transformers.captured import Captured
from tp_rs.integrations.transformers.captured_cache import CapturedCache
from tp_rs.integrations.transformers.fused import Fused
from tp_rs.integrations.transformers.recorder import PlainRecorder
from tp_rs.integrations.transformers.seat import Seat
from tp_rs.integrations.transformers.twin import make_twin

SPLITS = Splits.of(kv=[2, 1, 0], intermediate=[24, 16, 24], vocabulary=[60, 0, 37], groups=2)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request):
    return make_twin(small(request.param), seed=torch.seed() % 1000)


@pytest.fixture(scope="module")
def front(model):
    front = load(model, plan=SPLITS, check=False, capture=True)
    # A type that is not known to work is tried first, in steps that the tests would count.
    front.tp_rs_runner.capture.ready(1, 1)
    yield front
    front.unload()


@pytest.fixture
def steps(monkeypatch):
    """The steps that were run."""
    shapes = []
    play = Captured.play
    monkeypatch.setattr(Captured, "play", lambda self, shape: (shapes.append(shape), play(self, shape))[1])
    return shapes


@pytest.fixture
def inputs(model):
    ids, mask = selfcheck.prompt(model)
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 12}


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prefill_chunk_size": 7},
        {"min_new_tokens": 4, "eos_token_id": list(range(3, 40))},
    ],
    ids=str,
)
def test_generate(model, front, inputs, options, steps):
    torch.manual_seed(7)
    expected = model.generate(**inputs, **options)
    torch.manual_seed(7)
    assert torch.equal(front.generate(**inputs, **options), expected)
    # The first token comes from the prompt's steps.
    assert sum(shape.tokens == 1 for shape in steps) == expected.shape[1] - inputs["input_ids"].shape[1] - 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"return_dict_in_generate": True},
        {"num_return_sequences": 5, "do_sample": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_generations_that_need_another_cache(model, front, inputs, options, steps):
    torch.manual_seed(7)
    expected = model.generate(**inputs, **options)
    torch.manual_seed(7)
    got = front.generate(**inputs, **options)
    assert torch.equal(getattr(got, "sequences", got), getattr(expected, "sequences", expected))
    assert not steps


def test_prompts_of_any_length(model, front):
    for _ in range(6):
        batch, length = random.randint(1, 8), random.randint(1, 90)
        ids = torch.randint(3, 90, (batch, length))
        mask = torch.ones_like(ids)
        for row in mask:
            row[: random.randint(0, length - 1)] = 0
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(ids, **options)
        assert torch.equal(front.generate(ids, **options), expected), (batch, mask.sum(1))


def test_a_prompt_in_several_steps(model, inputs, steps):
    front = load(model, plan=SPLITS, check=False, capture=True)
    front.tp_rs_runner.capture.room = type(front.tp_rs_runner.capture.room)(chunk=8)
    try:
        expected = model.generate(**inputs, do_sample=False)
        assert torch.equal(front.generate(**inputs, do_sample=False), expected)
        assert [shape.tokens for shape in steps if shape.tokens > 1] == [4] * 4
    finally:
        front.unload()


def test_a_step_run_twice_changes_nothing(front):
    captured = front.tp_rs_runner.capture.ready(2, 40)
    rows = [torch.randint(3, 90, (length,)) for length in (21, 9)]
    captured.prefill(rows, [0, 0])
    token = torch.randint(3, 90, (2, 1))
    captured.decode(token, [21, 9])
    once = captured.logits(2).clone()
    captured.decode(token, [21, 9])
    assert torch.equal(captured.logits(2), once)


def test_tokens_are_forgotten_by_a_smaller_number(front, model):
    if model.config.model_type == "gemma2":
        pytest.skip("a ring has overwritten what lies before its window")
    captured = front.tp_rs_runner.capture.ready(1, 60)
    row = torch.randint(3, 90, (20,))
    captured.prefill([row], [0])
    for place in range(5):
        captured.decode(torch.randint(3, 90, (1, 1)), [20 + place])
    token = torch.randint(3, 90, (1, 1))
    captured.decode(token, [12])
    with torch.no_grad():
        whole = model(input_ids=torch.cat([row[None, :12], token], dim=1)).logits[:, -1]
    assert (captured.logits(1) - whole).abs().max() <= selfcheck.TOLERANCE * whole.std()


def test_records_are_made_anew_with_more_memory(model, inputs):
    front = load(model, plan=SPLITS, check=False, capture=True)
    try:
        for more in (4, 80, 10):
            options = {**inputs, "max_new_tokens": more, "do_sample": False}
            assert torch.equal(front.generate(**options), model.generate(**options))
    finally:
        front.unload()


@pytest.mark.parametrize("room", [{"context": 60}, {}], ids=str)
def test_warmup_records_ahead(model, inputs, monkeypatch, room):
    front = load(model, plan=SPLITS, check=False, capture=True, warmup=[2], **room)
    try:
        monkeypatch.setattr(Captured, "_record", lambda *_: pytest.fail("recorded late"))
        front.generate(**inputs, do_sample=False)
    finally:
        front.unload()


@pytest.mark.parametrize(("context", "sizes"), [(20, [32]), (32, [32]), (60, [32, 128]), (128, [32, 128])])
def test_warmup_records_no_more_than_is_used(model, monkeypatch, context, sizes):
    recorded = []
    record = Captured._record  # noqa: SLF001  where steps come from

    def noted(self, key, *rest):
        recorded.append(key)
        return record(self, key, *rest)

    monkeypatch.setattr(Captured, "_record", noted)
    front = load(model, plan=SPLITS, check=False, capture=True, warmup=[1], context=context)
    try:
        assert [key.tokens for key in recorded if key.first] == sizes
        ids = torch.randint(3, 90, (1, context - 3))
        front.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert [key.tokens for key in recorded if key.first] == sizes
    finally:
        front.unload()


@pytest.mark.parametrize("warmup", [[0], [9], ["two"], 3.5, [True]])
def test_warmup_is_checked(model, warmup):
    with pytest.raises(InvalidInput, match="warmup"):
        load(model, plan=SPLITS, check=False, warmup=warmup)


def test_two_generations_at_once(model, front, inputs):
    expected = model.generate(**inputs, do_sample=False)
    results = []

    def work():
        results.append(front.generate(**inputs, do_sample=False))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(result, expected) for result in results)


class _Inside(LogitsProcessor):
    def __init__(self, front, inputs):
        self.front, self.inputs, self.results = front, inputs, []

    def __call__(self, _ids, scores):
        if not self.results:
            self.results.append(self.front.generate(**self.inputs, do_sample=False))
        return scores


def test_a_generation_inside_another(model, front, inputs):
    inside = _Inside(front, inputs)
    expected = model.generate(**inputs, do_sample=False)
    got = front.generate(**inputs, do_sample=False, logits_processor=LogitsProcessorList([inside]))
    assert torch.equal(got, expected)
    assert torch.equal(inside.results[0], expected)


class _Interrupts(BaseStreamer):
    def __init__(self):
        self.left = 3

    def put(self, _value):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def end(self):
        pass


def test_an_interrupt_leaves_the_model_usable(model, front, inputs):
    one = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with pytest.raises(KeyboardInterrupt):
        front.generate(**one, do_sample=False, streamer=_Interrupts())
    assert torch.equal(front.generate(**one, do_sample=False), model.generate(**one, do_sample=False))


def test_a_step_that_fails_leaves_the_model_usable(model, front, inputs, monkeypatch):
    expected = model.generate(**inputs, do_sample=False)
    broken = front.tp_rs_runner.models[1].get_submodule("model.layers.1.mlp")
    forward = broken.forward
    calls = []

    def fails(*args):
        calls.append(args)
        if len(calls) == 4:
            message = "on purpose"
            raise ValueError(message)
        return forward(*args)

    monkeypatch.setattr(broken, "forward", fails)
    with pytest.raises(ValueError, match="on purpose"):
        front.generate(**inputs, do_sample=False)
    assert torch.equal(front.generate(**inputs, do_sample=False), expected)


def test_unloading_ends_the_steps(model, inputs):
    front = load(model, plan=SPLITS, check=False, capture=True)
    front.generate(**inputs, do_sample=False)
    waits = threading.Event()

    class Waits(BaseStreamer):
        def put(self, _value):
            waits.set()

        def end(self):
            pass

    one = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    done, errors = [], []

    def generate():
        try:
            done.append(front.generate(**one, do_sample=False, streamer=Waits()))
        except TPError as error:
            errors.append(str(error))

    thread = threading.Thread(target=generate)
    thread.start()
    assert waits.wait(60)
    front.unload()
    thread.join(60)
    assert not thread.is_alive()
    if errors:
        assert "unloaded" in errors[0]
    else:
        # It was faster.
        assert torch.equal(done[0], model.generate(**one, do_sample=False))
    for call in (front.generate, front.generate_fast):
        with pytest.raises(TPError, match="unloaded"):
            call(**inputs)


def test_what_cannot_be_recorded_runs_as_it_is(model, inputs, monkeypatch, caplog):
    def refuses(_self, _work, _rehearse, _generator):
        message = "on purpose"
        raise RuntimeError(message)

    monkeypatch.setattr(PlainRecorder, "record", refuses)
    front = load(model, plan=SPLITS, check=False, capture=True)
    expected = model.generate(**inputs, do_sample=False)
    try:
        with caplog.at_level(logging.WARNING, "tp_rs.transformers"):
            for _ in range(3):
                assert torch.equal(front.generate(**inputs, do_sample=False), expected)
    finally:
        front.unload()
    said = [each.getMessage() for each in caplog.records if "on purpose" in each.getMessage()]
    # Of prompts and of tokens once each, then that generations run without steps.
    assert len(said) == 3


def test_memory_of_steps_is_free_before_a_generation_goes_on_without_them(model, inputs, monkeypatch):
    front = load(model, plan=SPLITS, check=False, capture=True)
    # A type that is not known to work is tried first.
    front.tp_rs_runner.capture.ready(1, 1)
    taken = []
    step, eager = Seat.step, type(front.tp_rs_runner)._step  # noqa: SLF001  what runs without steps

    def full(seat, *args, **named):
        step(seat, *args, **named)
        stored = [tensor for layer in seat.cache.layers for tensor in layer._storage or ()]  # noqa: SLF001
        taken.extend(weakref.ref(tensor) for tensor in stored)
        message = "on purpose"
        raise torch.OutOfMemoryError(message)

    def goes_on(runner, *args, **named):
        still = [ref for ref in taken if ref() is not None]
        assert not still
        return eager(runner, *args, **named)

    monkeypatch.setattr(Seat, "step", full)
    monkeypatch.setattr(type(front.tp_rs_runner), "_step", goes_on)
    # The collector may come at any time, or not.
    gc.disable()
    try:
        got = front.generate(**inputs, do_sample=False)
    finally:
        gc.enable()
        front.unload()
    assert taken
    assert torch.equal(got, model.generate(**inputs, do_sample=False))


def test_compiled_layers_leave_no_trace(model):
    # The compiler is not what is tried here, but what is shown to it; it takes a minute on a CPU.
    fused = Fused(model, backend="eager")
    ids, mask = selfcheck.prompt(model)
    before = {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits
        with fused.active():
            got = model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.std().item())
    after = {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}
    assert {name: kind for name, (kind, _) in after.items()} == {
        name: kind for name, (kind, _) in before.items()
    }
    for name, (_, values) in after.items():
        assert values.keys() == before[name][1].keys()
        assert values.get("layer_idx") == before[name][1].get("layer_idx")


@pytest.mark.parametrize(("budget", "stays"), [(104, False), (110, True)])
def test_memory_is_given_back_where_two_caches_do_not_fit(model, inputs, budget, stays, monkeypatch):
    front = load(model, plan=SPLITS, check=False, capture=True)
    rank = SimpleNamespace(items={"kv_cache": 6, "activations": 3}, total=100, budget=budget)
    front.tp_rs_runner.capture.plan = SimpleNamespace(ranks=[rank])
    closed = []
    # A function, so that it is bound.
    monkeypatch.setattr(Captured, "close", lambda self: closed.append(self))  # noqa: PLW0108
    try:
        for options in ({"do_sample": False}, {"num_beams": 2}, {"do_sample": False}):
            assert torch.equal(front.generate(**inputs, **options), model.generate(**inputs, **options))
        assert bool(closed) is not stays
    finally:
        front.unload()


def test_a_cache_ends_with_its_generation(front, inputs):
    kept = []

    class Keeps(LogitsProcessor):
        def __call__(self, _ids, scores):
            kept.append(front.tp_rs_runner.capture._cache)  # noqa: SLF001  nobody else gets hold of it
            return scores

    front.generate(**inputs, do_sample=False, logits_processor=LogitsProcessorList([Keeps()]))
    assert isinstance(kept[0], CapturedCache)
    with pytest.raises(TPError, match="ended"):
        front(input_ids=torch.tensor([[5]]), past_key_values=kept[0])
