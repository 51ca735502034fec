"""Ways to ask for a generation that are rarely taken: as transformers answers them, or a clear error."""

import threading

import pytest
import torch
from architectures import small
from transformers import DynamicCache, GenerationConfig, StaticCache

import tp_rs
from tp_rs.errors import InvalidInput, TPError
from tp_rs.integrations.transformers import Splits, load
from tp_rs.integrations.transformers.twin import make_twin

SPLITS = Splits.of(kv=[2, 1, 0], intermediate=[24, 16, 24], vocabulary=[60, 0, 37], groups=2)
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}


@pytest.fixture(scope="module", params=[True, False], ids=["captured", "eager"])
def pair(request):
    """A model, and the same over ranks."""
    model = make_twin(small("llama"), seed=torch.seed() % 1000)
    front = load(model, plan=SPLITS, check=False, capture=request.param)
    yield model, front
    front.unload()


def prompt(rows=1, tokens=7):
    return torch.randint(3, 90, (rows, tokens))


def assert_same(model, front, *args, **options):
    expected = model.generate(*args, **options)
    assert torch.equal(front.generate(*args, **options), expected)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("batch", [5, 8])
def test_prompts_of_windows_one_token_at_a_time(architecture, batch):
    model = make_twin(small(architecture), seed=torch.seed() % 1000)
    plan = tp_rs.plan(
        model.config, [1.0, 0.5], devices=["cpu"] * 2, weights=torch.float32, cache="fp32", chunk=8, batch=8
    )
    front = load(model, plan=plan, check=False, capture=True)
    try:
        ids = prompt(batch, 4)
        assert_same(model, front, ids, **GREEDY)
        assert torch.equal(
            front.generate_fast(ids, pad_token_id=0, max_new_tokens=8), model.generate(ids, **GREEDY)
        )
    finally:
        front.unload()


@pytest.mark.parametrize("piece", [1, 3, 6])
@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": [1, 1, 1, 0, 1, 1, 1]},
        {"attention_mask": [1, 1, 1, 1, 1, 1, 0]},
        {"attention_mask": [1, 1, 1, 1, 1, 0, 1]},
        {"attention_mask": [0, 0, 1, 1, 1, 1, 1]},
        {"position_ids": [0, 1, 2, 3, 4, 5, 9]},
        {"position_ids": [3, 4, 5, 6, 7, 8, 9]},
    ],
    ids=str,
)
def test_masks_and_positions_of_prompts_in_pieces(pair, given, piece):
    tensors = {name: torch.tensor([values]) for name, values in given.items()}
    assert_same(*pair, prompt(), **tensors, prefill_chunk_size=piece, **GREEDY)


def test_one_mask_for_all_sequences(pair):
    ids = prompt().repeat(2, 1)
    assert_same(*pair, ids, attention_mask=torch.ones(1, 7, dtype=torch.long), **GREEDY)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_the_callers_goes_on(pair, kind):
    model, front = pair
    ids, more = prompt(), prompt(1, 3)

    def cache():
        config = model.config
        return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=64)

    def chat(one):
        past = cache()
        first = one.generate(ids, past_key_values=past, **{**GREEDY, "max_new_tokens": 5})
        assert past.get_seq_length() == first.shape[1] - 1
        new = torch.cat([first[:, -1:], more], 1)
        mask = torch.ones(1, first.shape[1] + 3, dtype=torch.long)
        return one.generate(new, attention_mask=mask, past_key_values=past, **GREEDY)

    assert torch.equal(chat(front), chat(model))

    def call_by_call(one):
        past = cache()
        with torch.inference_mode():
            one(ids, past_key_values=past)
            return one(more, past_key_values=past).logits

    torch.testing.assert_close(call_by_call(front), call_by_call(model), rtol=0, atol=1e-4)


def test_static_caches_that_were_made_ahead(pair):
    assert_same(*pair, prompt(), cache_implementation="static", prefill_chunk_size=3, **GREEDY)


def test_prompt_lookup_of_windows_in_pieces():
    model = make_twin(small("mistral"), seed=torch.seed() % 1000)
    plan = tp_rs.plan(
        model.config, [1.0, 0.5], devices=["cpu"] * 2, weights=torch.float32, cache="fp32", chunk=32
    )
    front = load(model, plan=plan, check=False, capture=True)
    try:
        assert_same(model, front, prompt(1, 60), prompt_lookup_num_tokens=3, **GREEDY)
        assert_same(model, front, prompt(1, 60), assistant_model=model, **GREEDY)
    finally:
        front.unload()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"assistant_early_exit": 1}, "assistant_early_exit: it takes layers"),
        ({"generation_config": GenerationConfig(assistant_early_exit=2)}, "assistant_early_exit"),
        ({"cache_implementation": "paged"}, "got 'paged'"),
    ],
    ids=str,
)
def test_kinds_that_look_into_the_model_are_refused(pair, options, reason):
    model, front = pair
    ids = prompt()
    with pytest.raises(InvalidInput, match=reason):
        front.generate(ids, **options, **GREEDY)
    with pytest.raises(InvalidInput, match="continuous batches"):
        front.generate_batch([[5, 6]])
    assert_same(model, front, ids, **GREEDY)


def test_parts_of_the_model_do_not_wait_for_ranks_that_do_not_come(pair):
    model, front = pair
    ids = prompt()
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(ids)
        torch.testing.assert_close(front.get_input_embeddings()(ids), embedded)
        torch.testing.assert_close(
            front(inputs_embeds=front.get_input_embeddings()(ids)).logits,
            model(ids).logits,
            rtol=0,
            atol=1e-4,
        )
    with pytest.raises(InvalidInput, match="wanted 0 to"):
        front.get_input_embeddings()(torch.tensor([[500]]))
    for call in (lambda: front.model(ids), lambda: front.get_output_embeddings()(embedded)):
        with torch.inference_mode(), pytest.raises(TPError, match="called by itself"):
            call()
    results = []
    thread = threading.Thread(target=lambda: results.append(front.generate(ids, **GREEDY)))
    thread.start()
    thread.join(60)
    assert torch.equal(results[0], model.generate(ids, **GREEDY))


def test_more_tokens_than_memory_has_room_for(pair):
    model, front = pair
    ids = prompt()
    # The sequence ends long before.
    first = int(model.generate(ids, **GREEDY)[0, 9])
    options = {**GREEDY, "max_new_tokens": 10**13, "eos_token_id": first}
    assert_same(model, front, ids, **options)
    del options["do_sample"]
    assert torch.equal(front.generate_fast(ids, **options), model.generate(ids, **options))
    assert_same(model, front, ids, **GREEDY)
