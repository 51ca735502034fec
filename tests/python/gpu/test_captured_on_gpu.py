"""Captured steps: kernels against float64; models over ranks of one GPU or all against the whole."""

import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("triton")

from models_common import (  # noqa: E402  they may be missing
    DEVICE,
    above,
    assert_captured,
    made,
    settled,
    uneven,
    whole,
)

from tp_rs.integrations.transformers import load, selfcheck  # noqa: E402
from tp_rs.integrations.transformers import static_kernels as kernels  # noqa: E402
from tp_rs.integrations.transformers.capture import Capture  # noqa: E402
from tp_rs.integrations.transformers.sampling import Chooser, Sampling  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TYPES = ["llama", "mistral", "gemma2", "gpt_oss", "phi3", "olmo2", "deepseek_v2"]
"""Plain, a window, windows with soft caps, sinks with experts, fused projections, wide norms, latents."""

EXPERTS = {"gpt_oss", "deepseek_v2"}
"""Their prompts are not recorded in float32: products in groups ask the device for sizes there."""

PLACED = [
    ([3], "together"),
    ([2, 1], "together"),
    ([2, 0, 1], "together"),
    ([2, 1], "spread"),
    ([0, 2, 1], "spread"),
]
"""KV heads of every rank, and where ranks are. In the last case the leading one is not on the first GPU."""


def attention(query, key, value, lengths, scaling, *, softcap, sinks):
    """What one token of every sequence attends to, in float64."""
    groups = query.shape[1] // key.shape[1]
    rows = []
    for place, length in enumerate(lengths.tolist()):
        own = key[place, :, :length].double().repeat_interleave(groups, 0)
        scores = torch.einsum("hqd,hnd->hqn", query[place].double(), own) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None]], dim=-1)
        weights = scores.softmax(-1)[..., :length]
        values = value[place, :, :length].double().repeat_interleave(groups, 0)
        rows.append(torch.einsum("hqn,hnd->qhd", weights, values))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "stored", "size", "value_size"),
    [(32, 8, 128, 128), (6, 3, 80, 96), (5, 5, 16, 16), (16, 1, 256, 256), (9, 3, 64, 64), (71, 1, 64, 64)],
)
def test_decoding_attends_as_in_float64(dtype, heads, stored, size, value_size):
    batch, columns = random.randint(1, 8), random.randint(1, 3000)
    query = torch.randn(batch, heads, 1, size, device=DEVICE, dtype=dtype)
    # What is not attended to may be anything.
    key = torch.full((batch, stored, columns, size), float("nan"), device=DEVICE, dtype=dtype)
    value = torch.full((batch, stored, columns, value_size), float("nan"), device=DEVICE, dtype=dtype)
    lengths = torch.randint(1, columns + 1, (batch,), device=DEVICE, dtype=torch.int32)
    for place, length in enumerate(lengths.tolist()):
        key[place, :, :length].normal_()
        value[place, :, :length].normal_()
    sinks = torch.randn(heads, device=DEVICE, dtype=dtype)
    allowed = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for softcap, beside in ((None, None), (4.0, None), (None, sinks), (4.0, sinks)):
        own = kernels.decode(query, key, value, lengths, size**-0.5, softcap, beside)
        exact = attention(query, key, value, lengths, size**-0.5, softcap=softcap, sinks=beside)
        assert (own - exact).abs().max() <= allowed, (batch, columns, softcap, beside is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tokens_are_stored_where_they_belong(dtype):
    """As torch's own gather and scatter do it, and nothing beside them is written."""
    for _ in range(12):
        batch, heads, new = random.randint(1, 4), random.randint(1, 5), random.choice([1, 2, 16, 33, 128])
        sizes = random.randint(1, 96), random.randint(1, 96)
        room = new + random.randint(0, 50)
        count = torch.randint(1, new + 1, (batch,), device=DEVICE)
        start = torch.stack([torch.randint(0, room - int(each) + 1, ()) for each in count]).to(DEVICE)
        # As a step has it: what is padding repeats the last token.
        places = torch.minimum(torch.arange(new, device=DEVICE)[None], count[:, None] - 1)
        positions = start[:, None] + places
        # The model's heads lie behind its tokens.
        fresh = [torch.randn(batch, new, heads, size, device=DEVICE, dtype=dtype) for size in sizes]
        fresh = [each.transpose(1, 2) for each in fresh]
        kept = [torch.randn(batch, heads, room, size, device=DEVICE, dtype=dtype) for size in sizes]
        wanted = []
        for own, added in zip(kept, fresh, strict=True):
            result = own.clone()
            for row in range(batch):
                end = int(start[row] + count[row])
                result[row, :, int(start[row]) : end] = added[row, :, : int(count[row])]
            wanted.append(result)
        kernels.store(*kept, *fresh, positions, places if new > 1 else None)
        for own, expected in zip(kept, wanted, strict=True):
            assert torch.equal(own, expected), (batch, heads, new, sizes)


@pytest.mark.parametrize("architecture", TYPES)
@pytest.mark.parametrize(("kv", "place"), PLACED, ids=str, indirect=["place"])
def test_tokens_are_those_of_the_whole_model(architecture, kv, place):
    model = made(architecture)
    unsharded = whole(model)
    ids, mask = (tensor.to(DEVICE) for tensor in selfcheck.prompt(model))
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = unsharded.generate(ids, **options)
    front = load(model, plan=uneven(model, kv), devices=place.devices(len(kv)), check=False)
    try:
        # Twice: recorded in the first one, replayed in the second.
        for _ in range(2):
            assert torch.equal(front.generate(ids, **options), expected)
            assert torch.equal(front.generate_fast(ids, **options), expected)
        assert_captured(front, {False} if architecture in EXPERTS else ())
    finally:
        front.unload()


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_prompts_in_several_steps(architecture, place):
    model = made(architecture)
    unsharded = whole(model)
    front = load(model, plan=uneven(model, [2, 1]), devices=place.devices(2), check=False)
    room = front.tp_rs_runner.capture.room
    front.tp_rs_runner.capture.room = type(room)(tokens=room.tokens, chunk=64)
    try:
        for _ in range(4):
            batch, length = random.randint(1, 8), random.randint(1, 150)
            ids = torch.randint(3, 90, (batch, length), device=DEVICE)
            mask = torch.ones_like(ids)
            for row in mask:
                row[: random.randint(0, length - 1)] = 0
            options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            expected = unsharded.generate(ids, **options)
            assert torch.equal(front.generate_fast(ids, **options), expected), (batch, mask.sum(1))
        assert_captured(front)
    finally:
        front.unload()


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 9}, {"top_p": 0.8}, {"top_k": 300, "repetition_penalty": 1.2}], ids=str
)
def test_a_seed_gives_the_same_tokens_again(options):
    model = made("llama")
    front = load(model, plan=uneven(model, [2, 1]), devices=[DEVICE] * 2, check=False)
    ids, mask = (tensor.to(DEVICE) for tensor in selfcheck.prompt(model))
    given = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": True, "pad_token_id": 0}
    given |= {**options, "temperature": 30.0}
    try:
        first = front.generate_fast(ids, **given, seed=11)
        assert torch.equal(front.generate_fast(ids, **given, seed=11), first)
        assert not torch.equal(front.generate_fast(ids, **given, seed=12), first)
    finally:
        front.unload()


def test_replayed_draws_are_as_likely_as_they_should_be():
    sampling = Sampling(do_sample=True, top_k=12, top_p=0.9)
    draws, vocabulary = 4000, 320
    logits = (2 * torch.randn(1, vocabulary, device=DEVICE)).expand(draws, -1).contiguous()
    chooser = Chooser(draws, vocabulary, DEVICE)
    ids = torch.zeros(draws, 1, dtype=torch.int64)
    chooser.begin(sampling, 5, (), 0, ids)
    chooser.choose(logits, sampling.kind)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(chooser.generator)
    with torch.cuda.graph(graph):
        chooser.choose(logits, sampling.kind)
    counts = torch.zeros(vocabulary, dtype=torch.float64, device=DEVICE)
    replays = 5
    seen = []
    for _ in range(replays):
        graph.replay()
        seen.append(chooser.token.clone())
        counts += torch.bincount(chooser.token, minlength=vocabulary)
    assert not torch.equal(seen[0], seen[1])
    kept = logits[0].double().topk(12)
    likely = kept.values.softmax(-1)
    likely = torch.where(likely.cumsum(-1) - likely < 0.9, likely, 0.0)
    expected = torch.zeros_like(counts).scatter_(0, kept.indices, likely / likely.sum()) * draws * replays
    assert not counts[expected == 0].any()
    spread = (expected * (1 - expected / (draws * replays))).sqrt()
    assert ((counts - expected).abs() <= 6 * spread + 1).all()


def test_a_failed_call_voids_what_was_captured(monkeypatch, place):
    model = made("llama")
    front = load(model, plan=uneven(model, [2, 1]), devices=place.devices(2), check=False)
    ids, mask = (tensor.to(DEVICE) for tensor in selfcheck.prompt(model))
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    try:
        expected = front.generate_fast(ids, **options)
        broken = front.tp_rs_runner.models[1].get_submodule("model.layers.1.mlp")

        def fails(*_args):
            message = "on purpose"
            raise ValueError(message)

        with monkeypatch.context() as patch:
            patch.setattr(broken, "forward", fails)
            with pytest.raises(ValueError, match="on purpose"):
                front(input_ids=ids, attention_mask=mask)
        assert torch.equal(front.generate_fast(ids, **options), expected)
        assert_captured(front)
    finally:
        front.unload()


def test_what_cannot_be_captured_runs_all_the_same(monkeypatch, caplog):
    model = made("llama")
    expected = whole(model).generate(
        torch.ones(1, 5, dtype=torch.int64, device=DEVICE), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    front = load(model, plan=uneven(model, [3]), devices=[DEVICE], check=False)
    part = front.tp_rs_runner.models[0].get_submodule("model.norm")
    forward = part.forward

    def asks(hidden):
        # A number from the device is what no capture allows.
        float(hidden.sum())
        return forward(hidden)

    monkeypatch.setattr(part, "forward", asks)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = torch.ones(1, 5, dtype=torch.int64, device=DEVICE)
    try:
        for _ in range(2):
            assert torch.equal(front.generate(ids, **options), expected)
        assert isinstance(front.tp_rs_runner.capture, Capture)
        assert any("captured" in record.message for record in caplog.records)
        # torch leaves its generators in a capture that fails.
        assert torch.rand(64, device=DEVICE).unique().numel() > 1
    finally:
        front.unload()


def test_unloading_gives_back_the_graphs(place):
    model = made("llama")

    def cycle():
        front = load(model, plan=uneven(model, [2, 1]), devices=place.devices(2), check=False)
        front.generate_fast(
            torch.ones(2, 40, dtype=torch.int64, device=DEVICE), max_new_tokens=40, pad_token_id=0
        )
        front.unload()
        del front
        return settled(place)[1]

    cycle()
    before = cycle()
    for _ in range(4):
        after = cycle()
    assert above(before, after) <= 1 << 20
