"""The front as its users meet it: all of generate(), errors that lose nothing, unloading."""

import copy
import gc
import os
import signal
import sys
import threading
import time
import weakref

import pytest
import torch
from architectures import small
from test_architectures import ranked
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from tp_rs.errors import InvalidInput, ModelError, TPError
from tp_rs.integrations.transformers import Splits, load, selfcheck
from tp_rs.integrations.transformers.twin import make_twin

SPLITS = Splits.of(kv=[2, 1, 0], intermediate=[24, 16, 24], vocabulary=[60, 0, 37], groups=2)


@pytest.fixture(scope="module")
def model():
    return make_twin(small("llama"))


@pytest.fixture(scope="module")
def front(model):
    front = load(model, plan=SPLITS, check=False)
    yield front
    front.unload()


@pytest.fixture
def inputs(model):
    ids, mask = selfcheck.prompt(model)
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 12}


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_generate(model, front, inputs, options):
    torch.manual_seed(7)
    expected = model.generate(**inputs, **options)
    torch.manual_seed(7)
    assert torch.equal(front.generate(**inputs, **options), expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3n_text", "deepseek_v2"])
def test_generate_with_prompt_lookup(architecture):
    model = make_twin(small(architecture))
    front = ranked(model, [2, 1])
    ids = torch.randint(3, 90, (1, 5)).repeat(1, 4)
    options = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        front.generate(**options, prompt_lookup_num_tokens=3),
        model.generate(**options, prompt_lookup_num_tokens=3),
    )
    front.unload()


@pytest.mark.parametrize("architecture", ["gemma2", "minimax", "qwen3_next", "deepseek_v2", "gemma3n_text"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_other_caches(architecture, options):
    model = make_twin(small(architecture))
    ids, mask = selfcheck.prompt(model)
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 10, "pad_token_id": 0, **options}
    try:
        expected = model.generate(**inputs)
    except (ValueError, AttributeError, TypeError, RuntimeError, IndexError) as error:
        pytest.skip(f"the whole model cannot: {error}")
    front = ranked(model, [2, 1, 0])
    assert torch.equal(front.generate(**inputs), expected)
    front.unload()


def test_streamer_and_processors(model, front, inputs):
    class Streamer(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    class Ban(LogitsProcessor):
        def __call__(self, _, scores):
            scores[:, 5:50] = -float("inf")
            return scores

    one = {name: value[1:] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    ours, theirs = Streamer(), Streamer()
    a = front.generate(**one, streamer=ours, logits_processor=LogitsProcessorList([Ban()]))
    b = model.generate(**one, streamer=theirs, logits_processor=LogitsProcessorList([Ban()]))
    assert torch.equal(a, b)
    assert ours.tokens == theirs.tokens
    assert not ((a[:, 13:] >= 5) & (a[:, 13:] < 50)).any()


def test_what_else_the_front_gives(model, front):
    ids, mask = selfcheck.prompt(model)
    expected = model(input_ids=ids, attention_mask=mask, labels=ids, output_hidden_states=True)
    got = front(input_ids=ids, attention_mask=mask, labels=ids, output_hidden_states=True)
    assert torch.allclose(got.loss, expected.loss, rtol=1e-5)
    assert len(got.hidden_states) == len(expected.hidden_states)
    assert torch.allclose(got.hidden_states[-1], expected.hidden_states[-1], atol=1e-4)
    assert type(front).__mro__[1] is type(model)
    assert isinstance(front, type(model))
    assert sum(p.numel() for p in front.parameters()) == 0
    assert front.device == torch.device("cpu")
    assert front.dtype is torch.float32
    assert front.plan is SPLITS
    assert front.config.num_attention_heads == 6


def test_the_caller_keeps_an_unchanged_model(model):
    before = copy.deepcopy(model.state_dict())
    front = load(model, plan=SPLITS, check=False)
    for rank in front.tp_rs_runner.models:
        for parameter in rank.parameters():
            parameter.data.fill_(3)
    front.unload()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.num_attention_heads == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    # Grouped products of experts take no float64 in torch.
    model = make_twin(small("qwen3" if dtype is torch.float64 else "qwen3_moe"))
    ids, mask = selfcheck.prompt(model)
    exact = selfcheck.steps(model, ids, mask)
    front = load(model, plan=selfcheck.uneven(model.config, [2, 1]), dtype=dtype, check=False)
    assert front.dtype is dtype
    errors = []
    for each in (front, copy.deepcopy(model).to(dtype)):
        rounded = selfcheck.steps(each, ids, mask)
        off = [(one.float() - true).flatten(0, -2) for one, true in zip(rounded, exact, strict=True)]
        # Rounded otherwise, single tokens may get other experts; a wrong sum would be off for all.
        errors.append(torch.cat(off).pow(2).mean(-1).sqrt().median())
    assert errors[0] <= 3 * errors[1] + 1e-5
    front.unload()


def test_a_failing_rank_ends_the_call_and_nothing_else(front, model, inputs):
    broken = front.tp_rs_runner.models[1].model.layers[2].mlp
    forward = broken.forward

    def fail(_):
        message = "no more memory"
        raise MemoryError(message)

    broken.forward = fail
    with pytest.raises(MemoryError, match="no more memory"):
        front.generate(**inputs)
    broken.forward = forward
    assert torch.equal(front.generate(**inputs), model.generate(**inputs))


def test_a_long_prompt_loses_nothing(model):
    front = load(model, plan=SPLITS, check=False, context=20)
    ids = torch.randint(3, 90, (1, 15))
    with pytest.raises(InvalidInput, match="21 tokens, and the model was loaded for 20"):
        front(input_ids=torch.randint(3, 90, (1, 21)))
    first = front(input_ids=ids, use_cache=True)
    with pytest.raises(InvalidInput, match="23 tokens"):
        front(input_ids=ids[:, :8], past_key_values=first.past_key_values)
    after = front(input_ids=ids[:, :3], past_key_values=first.past_key_values)
    whole = model(input_ids=torch.cat([ids, ids[:, :3]], 1))
    assert torch.allclose(after.logits, whole.logits[:, 15:], atol=1e-4)
    front.unload()


def test_refusals(model, front):
    ids, _ = selfcheck.prompt(model)
    with pytest.raises(InvalidInput, match="output_attentions"):
        front(input_ids=ids, output_attentions=True)
    used = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(InvalidInput, match="cache with tokens in it"):
        front(input_ids=ids, past_key_values=used)
    with pytest.raises(InvalidInput, match="offloaded caches and quantised"):
        front.generate(input_ids=ids, max_new_tokens=2, cache_implementation="offloaded", pad_token_id=0)
    with pytest.raises(InvalidInput, match=r"dtype: got torch\.int8"):
        load(model, plan=SPLITS, dtype=torch.int8)
    with pytest.raises(InvalidInput, match="context: got 257, wanted 1 to 256"):
        load(model, plan=SPLITS, context=257)
    with pytest.raises(InvalidInput, match="made for another model"):
        load(model, plan=Splits.of(kv=[2, 2], intermediate=[1, 1], vocabulary=[60, 37], groups=2))
    with pytest.raises(InvalidInput, match="plan is for 3 ranks"):
        load(model, plan=SPLITS, devices=["cpu"])
    with pytest.raises(InvalidInput, match="beside plan"):
        load(model, [1.0], plan=SPLITS)
    with pytest.raises(InvalidInput, match="all ranks on the CPU or all on CUDA"):
        load(model, plan=SPLITS, devices=["cpu", "cpu", "cuda:0"])
    with pytest.raises(InvalidInput, match="on meta, wanted them on the CPU"):
        load(copy.deepcopy(model).to("meta"), plan=SPLITS)
    with pytest.raises(InvalidInput, match="cannot be copied"):
        copy.deepcopy(front)
    with pytest.raises(InvalidInput, match="tokenizer"):
        next(front.stream("a"))


def test_unloading(model):
    front = load(model, plan=SPLITS, check=False)
    threads = front.tp_rs_runner.ranks.threads
    assert [thread.is_alive() for thread in threads] == [True] * 3
    weight = weakref.ref(front.tp_rs_runner.models[0].model.layers[0].mlp.up_proj.weight)
    front.unload()
    front.unload()
    gc.collect()
    assert weight() is None
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(TPError, match="unloaded"):
        front(input_ids=torch.ones(1, 2, dtype=torch.long))


def test_loading_and_running_from_many_threads(model):
    ids, mask = selfcheck.prompt(model)
    expected = selfcheck.steps(model, ids, mask)
    results = {}

    def work(name):
        front = load(model, plan=SPLITS, check=False)
        results[name] = selfcheck.steps(front, ids, mask)
        front.unload()

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in results.values():
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(own, expected, strict=True))
    assert len(results) == 4


def test_an_unknown_type_is_tried_first(monkeypatch):
    model = make_twin(small("llama"))
    monkeypatch.setattr(selfcheck, "_passed", {})
    tried = []
    monkeypatch.setattr(selfcheck, "compare", lambda *args: tried.append(args) or 0.5)
    with pytest.raises(ModelError, match=r"the logits are off by 5.0e-01 standard deviations"):
        load(model, plan=SPLITS, check=True)
    monkeypatch.undo()
    load(model, plan=SPLITS, check=True).unload()
    # In float32, and in float64 whether it is more than rounding. A plan leaves nothing to guess otherwise.
    assert len(tried) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_during_a_step(model):
    front = load(model, plan=SPLITS, check=False)
    ids, mask = selfcheck.prompt(model)
    slow = front.tp_rs_runner.models[0].model.layers[0].mlp
    forward = slow.forward

    def wait(hidden):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return forward(hidden)

    slow.forward = wait
    with pytest.raises(KeyboardInterrupt):
        front(input_ids=ids, attention_mask=mask)
    slow.forward = forward
    for own, whole in zip(selfcheck.steps(front, ids, mask), selfcheck.steps(model, ids, mask), strict=True):
        assert torch.allclose(own, whole, atol=1e-4)
    front.unload()
