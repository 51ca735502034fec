"""Prompts in chunks and caches with room give the same as prompts in one go and transformers' own caches."""

import random

import pytest
import torch
from architectures import small
from test_architectures import ranked
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tp_rs.integrations.transformers import selfcheck
from tp_rs.integrations.transformers.roomy import RoomyLayer, RoomySlidingLayer, give_room
from tp_rs.integrations.transformers.twin import make_twin

CHUNK = 10


@pytest.fixture(params=["llama", "gemma3_text", "mixtral", "olmo2", "deepseek_v2", "gpt_neox", "llama4_text"])
def pair(request):
    model = make_twin(small(request.param), seed=torch.seed() % 1000)
    front = ranked(model, [2, 1])
    front.tp_rs_runner.chunk = CHUNK
    yield model, front
    front.unload()


def lengths(front):
    """The tokens of every call of a rank from now on."""
    seen = []
    rank = front.tp_rs_runner.models[front.tp_rs_runner.lead]
    embedding = rank.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    return seen


def prompt(model, rows, tokens):
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[0, : tokens // 4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def cache_of(model):
    return DynamicCache(config=model.config.get_text_config())


def test_chunks_say_what_one_call_says(pair):
    model, front = pair
    rows, tokens = random.choice([(1, 37), (2, 29), (3, 31)])
    given = prompt(model, rows, tokens)
    seen = lengths(front)
    with torch.no_grad():
        theirs = model(**given).logits
    for keep in (0, 1, 13, tokens + 5):
        cache = cache_of(model)
        ours = front(**given, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        expected = theirs[:, -keep:] if keep else theirs
        assert ours.logits.shape == expected.shape
        assert (ours.logits - expected).abs().max() / theirs.std() <= selfcheck.TOLERANCE
        assert ours.past_key_values.get_seq_length() == tokens
    assert max(batch * count for batch, count in seen) <= CHUNK
    assert sum(count for _, count in seen) == 4 * tokens


def test_without_a_cache_one_is_made(pair):
    model, front = pair
    given = prompt(model, 1, 33)
    seen = lengths(front)
    with torch.no_grad():
        theirs = model(**given).logits[:, -1:]
    ours = front(**given, use_cache=True, logits_to_keep=1)
    assert (ours.logits - theirs).abs().max() / theirs.std() <= selfcheck.TOLERANCE
    assert ours.past_key_values.get_seq_length() == 33
    assert max(count for _, count in seen) <= CHUNK
    # Asked to keep nothing, the model computes all at once, as it does whole.
    front(**given, use_cache=False, logits_to_keep=1)
    assert seen[-1] == (1, 33)


def test_generate_in_chunks(pair):
    model, front = pair
    given = prompt(model, 2, 33)
    options = {"max_new_tokens": 9, "pad_token_id": 0, "do_sample": False}
    seen = lengths(front)
    for more in ({}, {"num_beams": 2}):
        assert torch.equal(
            front.generate(**given, **options, **more), model.generate(**given, **options, **more)
        )
    assert max(batch * count for batch, count in seen) <= CHUNK


def test_a_second_turn_goes_in_chunks_behind_the_first(pair):
    model, front = pair
    given = prompt(model, 1, 46)
    with torch.no_grad():
        theirs = model(**given).logits[:, -1]
    first = {name: value[:, :17] for name, value in given.items()}
    cache = front(**first, past_key_values=cache_of(model), use_cache=True).past_key_values
    ours = front(
        input_ids=given["input_ids"][:, 17:],
        attention_mask=given["attention_mask"],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    assert (ours - theirs).abs().max() / theirs.std() <= selfcheck.TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen3_next", {}),
        ("phi3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_what_would_change_in_chunks_stays_whole(architecture, changes):
    config = small(architecture)
    for name, value in changes.items():
        setattr(config, name, value)
    if changes:
        config.max_position_embeddings = 16
    model = make_twin(config, seed=torch.seed() % 1000)
    front = ranked(model, [2, 1])
    front.tp_rs_runner.chunk = CHUNK
    given = prompt(model, 1, 24)
    options = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    seen = lengths(front)
    assert torch.equal(front.generate(**given, **options), model.generate(**given, **options))
    assert seen[0] == (1, 24)
    front.unload()


@pytest.mark.parametrize("window", [None, 2, 5, 9])
def test_layers_with_room_hold_what_transformers_layers_hold(window):
    theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    room = random.randrange(1, 12)
    ours = RoomyLayer(room) if window is None else RoomySlidingLayer(window, room)
    rows, total = random.randrange(1, 4), 0
    for _ in range(30):
        assert ours.get_seq_length() == theirs.get_seq_length() == total
        count = random.choice([1, 1, 1, 2, 6])
        assert ours.get_mask_sizes(count) == theirs.get_mask_sizes(count)
        keys, values = torch.randn(rows, 2, count, 4), torch.randn(rows, 2, count, 3)
        got, wanted = ours.update(keys, values), theirs.update(keys, values)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        total += count
        change = random.choice(["reorder", "crop", "repeat", "select", None, None])
        if change == "crop" and total > 3 and (window is None or total < window):
            both(ours, theirs, lambda layer: layer.crop(-2))
            total -= 2
        elif change == "reorder":
            order = torch.randint(0, rows, (rows,))
            both(ours, theirs, lambda layer, order=order: layer.reorder_cache(order))
        elif change == "repeat" and rows < 4:
            both(ours, theirs, lambda layer: layer.batch_repeat_interleave(2))
            rows *= 2
        elif change == "select" and rows > 1:
            last = torch.tensor([rows - 1])
            both(ours, theirs, lambda layer, last=last: layer.batch_select_indices(last))
            rows = 1
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def both(ours, theirs, change):
    change(ours)
    change(theirs)


def test_a_layer_with_room_stays_where_it_is():
    layer = RoomyLayer(16)
    places = set()
    for _ in range(16):
        keys, values = layer.update(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4))
        layer.reorder_cache(torch.tensor([1, 0]))
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1
    assert keys.untyped_storage().nbytes() == 2 * 3 * 16 * 4 * 4


def test_only_usual_caches_get_room():
    config = small("gemma3_text")
    kinds = {type(layer) for layer in give_room(DynamicCache(config=config), 50).layers}
    assert kinds == {RoomyLayer, RoomySlidingLayer}
    assert {type(layer) for layer in give_room(DynamicCache(config=config), None).layers} == {
        DynamicLayer,
        DynamicSlidingWindowLayer,
    }
    lazy = give_room(DynamicCache(), 7)
    lazy.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    assert type(lazy.layers[0]) is RoomyLayer
