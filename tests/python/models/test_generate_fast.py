"""The loop of our own: transformers' tokens, its distributions, and its ends; on CPU ranks."""

import copy
import random

import numpy as np
import pytest
import torch
from architectures import small
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tp_rs.errors import InvalidInput
from tp_rs.integrations.transformers import Splits, load, selfcheck
from tp_rs.integrations.transformers.captured import Captured
from tp_rs.integrations.transformers.sampling import Chooser, Sampling, largest
from tp_rs.integrations.transformers.twin import make_twin

SPLITS = Splits.of(kv=[2, 1, 0], intermediate=[24, 16, 24], vocabulary=[60, 0, 37], groups=2)


@pytest.fixture(scope="module")
def model():
    return make_twin(small("gemma2"), seed=torch.seed() % 1000)


@pytest.fixture(scope="module")
def front(model):
    front = load(model, plan=SPLITS, check=False, capture=True)
    yield front
    front.unload()


@pytest.fixture
def inputs(model):
    ids, mask = selfcheck.prompt(model)
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def tokenizer():
    """A token a byte, as far as a small vocabulary goes."""
    special = ["<pad>", "<unk>", "<s>"]
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())[:94]]
    made = Tokenizer(models.BPE({symbol: place for place, symbol in enumerate(symbols)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.4}, {"eos_token_id": 11}, {"eos_token_id": list(range(5, 21))}],
    ids=str,
)
def test_greedy_tokens_are_those_of_generate(model, front, inputs, options):
    assert torch.equal(
        front.generate_fast(**inputs, **options), model.generate(**inputs, **options, do_sample=False)
    )


def test_prompts_of_any_length(model, front):
    for _ in range(5):
        batch, length = random.randint(1, 8), random.randint(1, 70)
        ids = torch.randint(3, 90, (batch, length))
        mask = torch.ones_like(ids)
        for row in mask:
            row[: random.randint(0, length - 1)] = 0
        options = {"attention_mask": mask, "max_new_tokens": random.randint(1, 9), "pad_token_id": 0}
        expected = model.generate(ids, **options, do_sample=False)
        assert torch.equal(front.generate_fast(ids, **options), expected), (batch, mask.sum(1))


def test_the_loop_is_used(front, inputs, monkeypatch):
    monkeypatch.setattr(type(front), "generate", lambda *_a, **_k: pytest.fail("generate was used"))
    front.generate_fast(**inputs)


def test_a_model_without_captured_steps_generates_as_well(model, inputs):
    front = load(model, plan=SPLITS, check=False)
    try:
        assert torch.equal(front.generate_fast(**inputs), model.generate(**inputs, do_sample=False))
        first = front.generate_fast(**inputs, do_sample=True, seed=5)
        assert torch.equal(front.generate_fast(**inputs, do_sample=True, seed=5), first)
    finally:
        front.unload()


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.8}, {"top_k": 300, "top_p": 0.9}], ids=str)
def test_a_seed_gives_the_same_tokens_again(front, inputs, options):
    options = {**options, "temperature": 30.0}
    first = front.generate_fast(**inputs, **options, do_sample=True, seed=31)
    assert torch.equal(front.generate_fast(**inputs, **options, do_sample=True, seed=31), first)
    others = [front.generate_fast(**inputs, **options, do_sample=True, seed=seed) for seed in range(3)]
    assert not all(torch.equal(other, first) for other in others)


def test_without_a_seed_torch_decides(front, inputs):
    torch.manual_seed(3)
    options = {**inputs, "do_sample": True, "temperature": 30.0}
    first = front.generate_fast(**options)
    torch.manual_seed(3)
    assert torch.equal(front.generate_fast(**options), first)
    assert not torch.equal(front.generate_fast(**options), first)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(do_sample=True),
        Sampling(do_sample=True, temperature=0.6),
        Sampling(do_sample=True, top_k=5),
        Sampling(do_sample=True, top_p=0.7, temperature=1.5),
        Sampling(do_sample=True, top_k=12, top_p=0.85, repetition_penalty=1.6),
        Sampling(do_sample=True, top_k=290, top_p=0.5, repetition_penalty=0.7),
        Sampling(do_sample=True, top_p=1e-6),
    ],
    ids=str,
)
def test_tokens_are_as_likely_as_transformers_has_them(sampling):
    draws, vocabulary = 4000, 320
    logits = (2 * torch.randn(1, vocabulary)).expand(draws, -1)
    ids = torch.randint(0, vocabulary, (1, 20)).expand(draws, -1)
    chooser = Chooser(draws, vocabulary, torch.device("cpu"))
    chooser.begin(sampling, random.randrange(2**31), (), 0, ids)
    chooser.choose(logits, sampling.kind)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.repetition_penalty != 1.0:
        warpers.insert(0, RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    likely = warpers(ids[:1], logits[:1].clone()).softmax(-1)[0].double()
    counts = torch.bincount(chooser.token, minlength=vocabulary).double()
    assert not counts[likely == 0].any()
    # A normal deviate for each token; beyond 6 once in 5e8 of them.
    spread = (draws * likely * (1 - likely)).sqrt()
    sure = spread > 1
    assert ((counts - draws * likely)[sure].abs() < 6 * spread[sure]).all()


def test_the_first_token_after_an_end_is_padding():
    chooser = Chooser(2, 10, torch.device("cpu"))
    chooser.begin(Sampling(), 0, (4,), 7, torch.zeros(2, 1, dtype=torch.int64))
    logits = torch.nn.functional.one_hot(torch.tensor([4, 5]), 10).float()
    chooser.choose(logits, Sampling().kind)
    assert chooser.token.tolist() == [4, 5]
    chooser.choose(logits, Sampling().kind)
    assert chooser.token.tolist() == [7, 5]


@pytest.mark.parametrize("ends", [{}, {"eos_token_id": 2}], ids=str)
def test_stop_strings(model, front, inputs, tokenizer, ends):
    plain = model.generate(**inputs, do_sample=False)
    columns = inputs["input_ids"].shape[1]
    string = tokenizer.decode(plain[0, columns + 4])
    options = {"stop_strings": ["??", string], "tokenizer": tokenizer, **ends}
    expected = model.generate(**inputs, **options, do_sample=False)
    assert torch.equal(front.generate_fast(**inputs, **options), expected)


def test_text_comes_in_pieces(model, front, tokenizer):
    prompt = "abc"
    options = {"max_new_tokens": 12, "pad_token_id": 0}
    expected = model.generate(**tokenizer(prompt, return_tensors="pt"), **options, do_sample=False)
    text = tokenizer.decode(expected[0, 3:], skip_special_tokens=True)
    assert "".join(front.stream(prompt, tokenizer=tokenizer, **options)).strip() == text.strip()
    pieces = front.stream(prompt, tokenizer=tokenizer, max_new_tokens=400, pad_token_id=0)
    next(pieces)
    pieces.close()
    assert torch.equal(front.generate_fast(**tokenizer(prompt, return_tensors="pt"), **options), expected)


def test_the_models_own_defaults_count(model, inputs):
    front = load(model, plan=SPLITS, check=False, capture=True)
    front.generation_config.eos_token_id = [12, 14]
    front.generation_config.no_repeat_ngram_size = 2
    try:
        expected = model.generate(**inputs, do_sample=False, eos_token_id=[12, 14], no_repeat_ngram_size=2)
        assert torch.equal(front.generate_fast(**inputs), expected)
    finally:
        front.unload()


def test_a_failure_leaves_the_loop_usable(model, front, inputs, monkeypatch):
    expected = model.generate(**inputs, do_sample=False)
    played = []
    step = Captured._step  # noqa: SLF001  to make it fail

    def fails(self, rank, shape):
        played.append(rank)
        if len(played) == 14:
            message = "on purpose"
            raise ValueError(message)
        step(self, rank, shape)

    monkeypatch.setattr(Captured, "_step", fails)
    with pytest.raises(ValueError, match="on purpose"):
        front.generate_fast(**inputs)
    assert torch.equal(front.generate_fast(**inputs), expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"eos_token_id": list(range(17))}, "eos_token_id"),
        ({"stop_strings": ["x"]}, "tokenizer"),
        ({"stop_strings": [""], "tokenizer": object()}, "stop_strings"),
        ({"num_beams": 2}, "num_beams"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "attention_mask"),
        ({"attention_mask": torch.tensor([[1, 1, 1]])}, "attention_mask"),
        ({"input_ids": torch.tensor([[5, 400]])}, "input_ids"),
        ({"input_ids": torch.ones(9, 2, dtype=torch.int64)}, "input_ids"),
        ({"input_ids": torch.ones(0, 2, dtype=torch.int64)}, "input_ids"),
        ({"input_ids": [[1, 2]]}, "input_ids"),
    ],
)
def test_arguments_are_checked(front, options, named):
    given = {"input_ids": torch.tensor([[5, 6]]), "max_new_tokens": 3, **options}
    with pytest.raises(InvalidInput, match=named):
        front.generate_fast(**given)


def test_a_sequence_beyond_the_limit_is_refused(model):
    front = load(model, plan=SPLITS, check=False, capture=True, context=20)
    try:
        with pytest.raises(InvalidInput, match="20"):
            front.generate_fast(torch.ones(1, 15, dtype=torch.int64), max_new_tokens=6)
        assert front.generate_fast(torch.ones(1, 15, dtype=torch.int64), max_new_tokens=5).shape == (1, 20)
    finally:
        front.unload()


@pytest.mark.parametrize("vocabulary", [1, 7, 64, 128, 997, 1536, 128256])
def test_the_largest_is_the_first_of_equals(vocabulary):
    for _ in range(5):
        # Few values, so that the largest is there often.
        scores = torch.randint(-3, 3, (3, vocabulary)).float()
        scores[1] = float("-inf")
        assert largest(scores).tolist() == scores.argmax(-1).tolist()


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
def test_what_nobody_said_is_as_generate_has_it(model, front):
    for length in (5, 25):
        ids = torch.randint(3, 90, (1, length))
        assert torch.equal(
            front.generate_fast(ids, pad_token_id=0), model.generate(ids, pad_token_id=0, do_sample=False)
        )
    # Nearly all tokens are as likely, and only the 50 most likely are chosen from.
    ids = torch.randint(3, 90, (1, 5))
    with torch.inference_mode():
        likely = model(ids).logits[0, -1].topk(50).indices.tolist()
    options = {"do_sample": True, "temperature": 50.0, "max_new_tokens": 1, "pad_token_id": 0}
    drawn = {int(front.generate_fast(ids, seed=seed, **options)[0, -1]) for seed in range(40)}
    assert len(drawn) > 5
    assert drawn <= set(likely)


@pytest.mark.parametrize(
    "changes",
    [
        {"no_repeat_ngram_size": 1},
        {"forced_eos_token_id": 1},
        {"forced_eos_token_id": 0},
        {"num_beams": 2},
        {"return_dict_in_generate": True},
        {"temperature": 0.0, "top_p": 0.0},
        {"num_beams": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_defaults_of_the_model_that_the_loop_does_not_know(model, inputs, changes, capture):
    front = load(model, plan=SPLITS, check=False, capture=capture)
    before = copy.deepcopy(model.generation_config)
    try:
        for each in (model, front):
            for name, value in changes.items():
                setattr(each.generation_config, name, value)
        expected = model.generate(**inputs, do_sample=False)
        expected = getattr(expected, "sequences", expected)
        assert torch.equal(front.generate_fast(**inputs), expected)
    finally:
        model.generation_config = before
        front.unload()


def test_stop_strings_of_the_model_count(model, front, inputs, tokenizer):
    plain = front.generate_fast(**inputs)
    text = tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :][2:4])
    front.generation_config.stop_strings = [text]
    try:
        expected = model.generate(**inputs, do_sample=False, stop_strings=[text], tokenizer=tokenizer)
        assert torch.equal(front.generate_fast(**inputs, tokenizer=tokenizer), expected)
    finally:
        front.generation_config.stop_strings = None


class Streamer:
    def put(self, value):
        pass

    def end(self):
        pass


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": "a"}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [61.5]}, "eos_token_id"),
        ({"eos_token_id": [None]}, "eos_token_id"),
        ({"eos_token_id": [[61]]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": 2**70}, "eos_token_id"),
        ({"pad_token_id": "a"}, "pad_token_id"),
        ({"pad_token_id": 0.5}, "pad_token_id"),
        ({"pad_token_id": 97, "eos_token_id": 5}, "pad_token_id"),
        ({"pad_token_id": -1, "eos_token_id": 5}, "pad_token_id"),
        ({"attention_mask": [[1, 1]]}, "attention_mask"),
        ({"attention_mask": torch.ones(2, 2, device="meta")}, "attention_mask"),
        ({"input_ids": torch.ones(2, 2)}, "input_ids"),
        ({"input_ids": torch.ones(2, 2, dtype=torch.bool)}, "input_ids"),
        ({"input_ids": torch.ones(2, 2, dtype=torch.long, device="meta")}, "input_ids"),
        ({"do_sample": True, "temperature": 10**400}, "temperature"),
        ({"do_sample": True, "temperature": 1e-50}, "temperature"),
        ({"do_sample": "False"}, "do_sample"),
        ({"stop_strings": 5, "tokenizer": "any"}, "stop_strings"),
        ({"streamer": 5}, "streamer"),
        ({"stopped": 5}, "stopped"),
        ({"max_new_tokens": 2.0}, "max_new_tokens"),
    ],
    ids=str,
)
@pytest.mark.parametrize("capture", [True, False])
def test_arguments_that_cannot_be_used_are_named(front, options, named, capture, monkeypatch):
    monkeypatch.setattr(front.tp_rs_runner.capture, "wanted", capture)
    given = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "max_new_tokens": 3, "pad_token_id": 0, **options}
    with pytest.raises(InvalidInput, match=f"{named}: got"):
        front.generate_fast(**given)


@pytest.mark.parametrize("capture", [True, False])
def test_numbers_of_any_type(model, front, capture, monkeypatch):
    monkeypatch.setattr(front.tp_rs_runner.capture, "wanted", capture)
    ids = torch.randint(3, 90, (2, 6))
    end = int(model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0)[0, 8])
    expected = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=end)
    for ends in (end, [end], np.int64(end), torch.tensor(end), torch.tensor([end]), (end,)):
        options = {"eos_token_id": ends, "max_new_tokens": np.int64(6), "pad_token_id": np.int32(0)}
        assert torch.equal(front.generate_fast(ids, **options), expected), ends
    sampled = {"do_sample": True, "repetition_penalty": 2, "temperature": 1, "max_new_tokens": 6}
    one = front.generate_fast(ids, seed=np.int64(3), pad_token_id=0, **sampled)
    assert torch.equal(front.generate_fast(ids, seed=torch.tensor(3), pad_token_id=0, **sampled), one)


class Undecodable:
    """A tokenizer that cannot decode what it is given."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *args, **options):
        return self.tokenizer(*args, **options)

    def decode(self, *_args, **_options):
        raise TypeError("expected str instance, NoneType found")

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("options", [{}, {"min_p": 0.1, "do_sample": True}], ids=str)
def test_a_stream_whose_tokenizer_fails_ends(front, tokenizer, options):
    with pytest.raises(TypeError, match="expected str instance"):
        list(front.stream("abc", tokenizer=Undecodable(tokenizer), max_new_tokens=5, **options))


def test_streams_take_what_generate_takes(model, front, tokenizer):
    options = {"max_new_tokens": 6, "do_sample": True, "min_p": 0.05, "pad_token_id": 0}
    torch.manual_seed(11)
    ids = tokenizer("abc", return_tensors="pt").input_ids
    wanted = model.generate(ids, **options)[0, ids.shape[1] :]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    pieces = front.stream("abc", tokenizer=tokenizer, seed=11, stopping_criteria=None, **options)
    assert "".join(pieces) == tokenizer.decode(wanted, skip_special_tokens=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(InvalidInput, match="streamer"):
        list(front.stream("abc", tokenizer=tokenizer, streamer=Streamer()))
