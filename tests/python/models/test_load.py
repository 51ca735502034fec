"""`tp_rs.load`: plans and contexts, what it refuses, and what a failure or an interrupt leaves behind."""

import copy
import gc
import os
import random
import signal
import sys
import threading
import time
import weakref

import pytest
import torch
from architectures import small
from transformers.generation.streamers import BaseStreamer

import tp_rs
from tp_rs.errors import DoesNotFit, InvalidInput, ModelError, TPError
from tp_rs.integrations.transformers import Splits, assemble, selfcheck
from tp_rs.integrations.transformers.room import require_free
from tp_rs.integrations.transformers.twin import make_twin

SPLITS = Splits.of(kv=[2, 1], intermediate=[40, 24], vocabulary=[60, 37], groups=2)
CPUS = ["cpu", "cpu"]


@pytest.fixture(scope="module")
def model():
    return make_twin(small("llama"))


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def rank_threads():
    return sum(thread.name.startswith("tp_rs rank") for thread in threading.enumerate())


def assert_runs(front, model):
    ids, mask = selfcheck.prompt(model)
    for own, whole in zip(selfcheck.steps(front, ids, mask), selfcheck.steps(model, ids, mask), strict=True):
        assert torch.allclose(own, whole, atol=1e-4)


def test_a_planned_model_has_its_plan_and_a_context_that_it_uses(model, folder):
    front = tp_rs.load(folder, [1.0, 0.5], CPUS, context=64)
    assert isinstance(front.plan, tp_rs.Plan)
    assert isinstance(front.context, tp_rs.TPContext)
    assert front.context.plan == front.plan
    assert front.context.communicator.devices == CPUS
    assert front.plan.context == front.context_limit == 64
    assert_runs(front, model)
    # The ranks meet in the context's communicator.
    front.context.communicator.abort("by the test")
    ids, _ = selfcheck.prompt(model)
    with pytest.raises(TPError, match="by the test"):
        front(input_ids=ids)
    assert_runs(front, model)
    context = front.context
    front.unload()
    assert context.ext_tp_context is None


def test_a_plan_made_before(model, folder):
    plan = tp_rs.plan(folder, [1.0, 0.5, 0.5], devices=["cpu"] * 3, context=32)
    for source in (folder, model):
        front = tp_rs.load(source, plan=plan)
        assert front.plan is plan
        assert front.context_limit == 32
        assert_runs(front, model)
        front.unload()
    front = tp_rs.load(folder, plan=SPLITS)
    assert front.context is front.context_limit is None
    front.unload()


def test_a_context_that_is_unloaded_under_the_model(model, folder):
    front = tp_rs.load(folder, [1.0, 1.0], CPUS)
    front.context.unload()
    for _ in range(2):
        with pytest.raises(TPError, match="context was unloaded; load the model again"):
            front(input_ids=selfcheck.prompt(model)[0])
    front.unload()


def test_plans_that_cannot_be_used(model, folder):
    other = make_twin(small("llama"))
    config = copy.deepcopy(other.config)
    config.num_hidden_layers += 1
    plan = tp_rs.plan(config, [1.0, 1.0], devices=CPUS, context=32)
    with pytest.raises(InvalidInput, match="num_hidden_layers"):
        tp_rs.load(folder, plan=plan)
    fitting = tp_rs.plan(folder, [1.0, 1.0], devices=CPUS, context=32)
    with pytest.raises(InvalidInput, match="context: got 33, and the plan has room for 32"):
        tp_rs.load(folder, plan=fitting, context=33)
    with pytest.raises(InvalidInput, match=r"devices: got 3 entries, wanted 2"):
        tp_rs.load(folder, plan=fitting, devices=["cpu"] * 3)
    for context in (0, -1, True, 2.5):
        with pytest.raises(InvalidInput, match="context: got"):
            tp_rs.load(folder, plan=SPLITS, context=context)
    gc.collect()
    before = rank_threads()
    small_budgets = [1e-6, 1e-6]
    with pytest.raises(DoesNotFit) as refused:
        tp_rs.load(folder, small_budgets, CPUS)
    assert refused.value.shortfall.missing_bytes > 0
    assert rank_threads() <= before
    front = tp_rs.load(folder, small_budgets, CPUS, force=True)
    assert_runs(front, model)
    front.unload()


def test_a_plan_for_memory_that_is_not_there(folder, monkeypatch):
    plan = tp_rs.plan(folder, [2.0, 3.0, 2.5], devices=["cuda:0", "cuda:1", "cuda:0"], context=32)
    places = [torch.device(rank.device) for rank in plan.ranks]
    needed = [rank.total - rank.items["framework"] for rank in plan.ranks]
    needed = {"cuda:0": needed[0] + needed[2], "cuda:1": needed[1]}
    kept, used = random.randrange(1 << 20), 1 << 19
    free = {name: size - kept + used for name, size in needed.items()}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (free[str(place)], 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: kept)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: used)
    require_free(plan, places)
    # Splits say nothing of memory.
    require_free(SPLITS, places)
    for short in needed:
        before = free[short]
        free[short] -= 1 + random.randrange(1000)
        with pytest.raises(
            DoesNotFit, match=rf"{short}: the plan counts \d+ MiB .* MiB are free; .*gpu_split"
        ):
            require_free(plan, places)
        free[short] = before


@pytest.mark.parametrize("cache", ["8bit", "q8", "q6", "q4"])
@pytest.mark.parametrize("there", [True, False])
def test_quantised_caches_are_refused_before_anything_is_read(folder, monkeypatch, cache, there):
    plan = tp_rs.plan(folder, [1.0, 1.0], devices=CPUS, context=32, cache=cache)
    module = sys.modules["tp_rs.integrations.transformers.load"]
    monkeypatch.setattr(module, "open_checkpoint", lambda *_: pytest.fail("it was opened"))
    path = folder if there else folder / "nowhere"
    kept = r"cache=\"fp16\" \(float16 or bfloat16\) or cache=\"fp32\" \(float32\)"
    for force in (False, True):
        with pytest.raises(InvalidInput, match=rf"plan: it counts a '{cache}' cache.*{kept}.*of your own"):
            tp_rs.load(path, plan=plan, force=force)
        with pytest.raises(InvalidInput, match=rf"cache: got '{cache}'.*{kept}.*of your own"):
            tp_rs.load(path, [1.0, 1.0], CPUS, cache=cache, force=force)


def test_the_cache_is_the_dtypes(model, folder):
    for dtype, cache, other in (
        (torch.float32, "fp32", "fp16"),
        (torch.bfloat16, "fp16", "fp32"),
        (torch.float16, "fp16", "fp32"),
    ):
        refused = rf"cache: got '{other}'.*{dtype}: wanted '{cache}', or dtype=float"
        with pytest.raises(InvalidInput, match=refused):
            tp_rs.load(folder, [1.0, 1.0], CPUS, cache=other, dtype=dtype)
        front = tp_rs.load(folder, [1.0, 1.0], CPUS, cache=cache, dtype=dtype, context=32)
        assert front.plan.cache == cache
        front.unload()
    for cache in ("bf16", "", 16, ["fp16"], True):
        with pytest.raises(InvalidInput, match="cache: got"):
            tp_rs.load(folder, [1.0, 1.0], CPUS, cache=cache)
    with pytest.raises(InvalidInput, match="cache: got 'fp32' beside plan"):
        tp_rs.load(model, plan=SPLITS, cache="fp32")


def test_a_plan_with_a_narrower_cache_needs_the_room_for_the_real_one(folder, caplog):
    asked = {"devices": CPUS, "context": 64, "batch": 256, "weights": torch.float32}
    narrow = tp_rs.plan(folder, [1.0, 1.0], cache="fp16", **asked)
    # So much that the plan fits, and not with twice the cache.
    budgets = [(rank.total + rank.items["kv_cache"] / 2) / (1 << 30) for rank in narrow.ranks]
    narrow = tp_rs.plan(folder, budgets, cache="fp16", **asked)
    assert narrow.fits
    with pytest.raises(DoesNotFit, match=r'weights and cache take .* as float32, .* cache="fp32"'):
        tp_rs.load(folder, plan=narrow)
    tp_rs.load(folder, plan=narrow, force=True).unload()
    # With room it is told.
    caplog.clear()
    tp_rs.load(folder, plan=tp_rs.plan(folder, [1.0, 1.0], cache="fp16", **asked)).unload()
    assert any('cache="fp32"' in record.message for record in caplog.records)
    caplog.clear()
    tp_rs.load(folder, plan=tp_rs.plan(folder, [1.0, 1.0], cache="fp32", **asked)).unload()
    assert not caplog.records


def test_a_model_on_devices_is_refused(model):
    placed = copy.deepcopy(model)
    placed.model.layers[2].to("meta")
    with pytest.raises(InvalidInput, match="on cpu, meta, wanted them on the CPU"):
        tp_rs.load(placed, plan=SPLITS)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_callers_model_is_not_touched(model, dtype):
    weights, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    generation = copy.deepcopy(model.generation_config.to_dict())
    forwards = [module.forward for module in model.modules()]
    front = tp_rs.load(model, [1.0, 1.0], CPUS, dtype=dtype)
    front.generate(input_ids=torch.ones(1, 3, dtype=torch.long), max_new_tokens=3, pad_token_id=0)
    front.config.num_attention_heads = 77
    front.generation_config.max_length = 3
    front.unload()
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.forward for module in model.modules()] == forwards


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError("no memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_out_of_memory_in_one_rank_frees_the_others(folder, monkeypatch, failure):
    held = []
    real = assemble.load_rank

    def load_rank(*args, **kwargs):
        if held:
            raise failure
        loaded = real(*args, **kwargs)
        held.append(weakref.ref(loaded.model.layers[0].mlp.up_proj.weight))
        return loaded

    gc.collect()
    before = rank_threads()
    monkeypatch.setattr(assemble, "load_rank", load_rank)
    with pytest.raises(DoesNotFit, match="rank 1: cpu ran out of memory while loading") as caught:
        tp_rs.load(folder, [1.0, 1.0], CPUS)
    gc.collect()
    assert held[0]() is None, "kept beside an exception that is looked at"
    assert caught.value.__cause__ is failure
    assert rank_threads() <= before


def test_out_of_memory_while_reading_is_told_apart(folder, monkeypatch):
    from tp_rs.integrations.transformers.mapped import MappedSource  # noqa: PLC0415

    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(MappedSource, "__getitem__", fail)
    with pytest.raises((DoesNotFit, ModelError)):
        tp_rs.load(folder, [1.0, 1.0], CPUS)
    monkeypatch.undo()
    tp_rs.load(folder, [1.0, 1.0], CPUS).unload()


def test_more_than_the_context_is_refused_before_it_costs_anything(model, folder):
    front = tp_rs.load(folder, [1.0, 1.0], CPUS, context=20)
    ids = torch.randint(3, 90, (1, 15))
    options = {"do_sample": False, "pad_token_id": 0}
    calls = []
    forward = front.tp_rs_runner.run
    front.tp_rs_runner.run = lambda *args: calls.append(args) or forward(*args)
    with pytest.raises(InvalidInput, match=r"may get 21 tokens.* loaded for 20; ask for 1 fewer"):
        front.generate(input_ids=ids, max_new_tokens=6, **options)
    with pytest.raises(InvalidInput, match="loaded for 20"):
        front.generate(input_ids=torch.randint(3, 90, (1, 30)), max_new_tokens=6, **options)
    assert not calls
    got = front.generate(input_ids=ids, max_new_tokens=5, **options)
    assert torch.equal(got, model.generate(input_ids=ids, max_new_tokens=5, **options))
    front.unload()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupts_at_any_moment_of_generating(model, folder):
    front = tp_rs.load(folder, [1.0, 1.0], CPUS)
    options = {
        "input_ids": torch.randint(3, 90, (1, 5)),
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    interrupts = 0
    for _ in range(12):
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.25))
        try:
            front.generate(max_new_tokens=100, **options)
            # The alarm must not go off in the checks below.
            while signal.getitimer(signal.ITIMER_REAL)[0]:
                time.sleep(0.01)
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        got = front.generate(max_new_tokens=4, **options)
        assert torch.equal(got, model.generate(max_new_tokens=4, **options))
    assert interrupts
    front.unload()


def test_unloading_during_use_is_a_clear_error(folder):
    front = tp_rs.load(folder, [1.0, 1.0], CPUS)
    ranks = front.tp_rs_runner.ranks

    class Streamer(BaseStreamer):
        def __init__(self):
            self.seen = threading.Semaphore(0)

        def put(self, _):
            self.seen.release()

        def end(self):
            pass

    streamer, errors = Streamer(), []

    def generate():
        try:
            front.generate(
                input_ids=torch.randint(3, 90, (1, 5)),
                max_new_tokens=200,
                streamer=streamer,
                pad_token_id=0,
                eos_token_id=None,
            )
        except TPError as error:
            errors.append(str(error))

    thread = threading.Thread(target=generate)
    thread.start()
    for _ in range(4):
        assert streamer.seen.acquire(timeout=60)
    front.unload()
    thread.join(60)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert "unloaded" in errors[0]
    assert not any(thread.is_alive() for thread in ranks.threads)


def test_calls_from_two_threads_take_turns(model, folder):
    front = tp_rs.load(folder, [1.0, 1.0], CPUS)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    prompts = [torch.randint(3, 90, (1, length)) for length in (3, 8, 5)]
    texts = {}

    def generate(number):
        texts[number] = front.generate(input_ids=prompts[number], **options)

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, ids in enumerate(prompts):
        assert torch.equal(texts[number], model.generate(input_ids=ids, **options))
    front.unload()


def test_a_dropped_model_ends_its_threads(folder):
    front = tp_rs.load(folder, [1.0, 1.0], CPUS)
    front(input_ids=torch.ones(1, 2, dtype=torch.long))
    threads = list(front.tp_rs_runner.ranks.threads)
    assert all(thread.is_alive() for thread in threads)
    weight = weakref.ref(front.tp_rs_runner.models[0].model.layers[0].mlp.up_proj.weight)
    del front
    gc.collect()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert weight() is None


def test_results_may_be_changed_in_place(model, folder):
    front = tp_rs.load(folder, [1.0, 1.0], CPUS)
    result = front(input_ids=selfcheck.prompt(model)[0], output_hidden_states=True, use_cache=True)
    result.logits.mul_(2)
    result.hidden_states[-1].zero_()
    result.past_key_values.reset()
    listed = front(input_ids=selfcheck.prompt(model)[0], return_dict=False, use_cache=False)
    listed[0].add_(1)
    front.unload()


def test_threads_of_operations_are_divided(folder):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        front = tp_rs.load(folder, [1.0, 1.0], CPUS)
        counts = front.tp_rs_runner.ranks.run(lambda _: torch.get_num_threads())
        assert counts == [2, 2]
        assert torch.get_num_threads() == 4
        others = []
        thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert others == [4]
        front.unload()
    finally:
        torch.set_num_threads(before)
