"""Models over ranks of one GPU or all: what the whole model says, and what becomes of memory and errors."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from gpu_common import synchronize  # noqa: E402
from models_common import (  # noqa: E402  torch and transformers may be missing
    DEVICE,
    TOLERANCE,
    TYPES,
    above,
    limited,
    made,
    off,
    over_ranks,
    prompt,
    settled,
    uneven,
    whole,
)

import tp_rs  # noqa: E402
from tp_rs.integrations.transformers import load  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

PLACED = [
    ([3], "together"),
    ([2, 1], "together"),
    ([1, 1, 1], "together"),
    ([2, 1, 0], "together"),
    ([2, 1], "spread"),
    ([0, 2, 1], "spread"),
]
"""KV heads of every rank, and where ranks are. In the last case the leading one is not on the first GPU."""


@pytest.fixture(autouse=True)
def _exact():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("kv", "place"), PLACED, ids=str, indirect=["place"])
@pytest.mark.parametrize("architecture", TYPES)
def test_says_what_the_whole_model_says(architecture, kv, place):
    model = made(architecture)
    reference, front = whole(model), over_ranks(model, kv, place)
    given = prompt(model)
    options = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    with torch.no_grad():
        assert off(front(**given).logits, reference(**given).logits) <= TOLERANCE
    for more in ({}, {"num_beams": 3}, {"use_cache": False}):
        ours, theirs = (
            front.generate(**given, **options, **more),
            reference.generate(**given, **options, **more),
        )
        assert torch.equal(ours, theirs), more
        assert ours.device == DEVICE
    assert [str(each.device) for each in front.tp_rs_runner.models] == place.devices(len(kv))
    front.unload()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_static_caches_and_sampling(architecture, place):
    model = made(architecture)
    reference, front = whole(model), over_ranks(model, [2, 1], place)
    given = {**prompt(model), "max_new_tokens": 12, "pad_token_id": 0}
    # Without compiling, which takes minutes.
    theirs = reference.generate(**given, cache_implementation="static", disable_compile=True)
    assert torch.equal(front.generate(**given, cache_implementation="static"), theirs)
    torch.manual_seed(3)
    theirs = reference.generate(**given, do_sample=True, top_k=20, temperature=0.8)
    torch.manual_seed(3)
    assert torch.equal(front.generate(**given, do_sample=True, top_k=20, temperature=0.8), theirs)
    front.unload()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral"])
def test_a_long_prompt_goes_in_chunks(architecture, place):
    model = made(architecture)
    reference, front = whole(model), over_ranks(model, [2, 1], place)
    front.tp_rs_runner.chunk = 10
    given = prompt(model, tokens=43)
    with torch.no_grad():
        cache = transformers_cache(model)
        ours = front(**given, past_key_values=cache, use_cache=True).logits
        theirs = reference(**given).logits
    assert ours.shape == theirs.shape
    assert off(ours, theirs) <= TOLERANCE
    options = {"max_new_tokens": 9, "pad_token_id": 0, "do_sample": False}
    assert torch.equal(front.generate(**given, **options), reference.generate(**given, **options))
    front.unload()


def transformers_cache(model: Any) -> Any:
    from transformers import DynamicCache  # noqa: PLC0415

    return DynamicCache(config=model.config.get_text_config())


def test_takes_its_place_in_the_callers_stream(place):
    model = made("llama")
    reference, front = whole(model), over_ranks(model, [2, 1], place)
    given = prompt(model)
    ids = given["input_ids"]
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
    caller = torch.cuda.Stream(DEVICE)
    synchronize()
    for _ in range(5):
        with torch.cuda.stream(caller):
            late = torch.zeros_like(ids)
            torch.cuda._sleep(50_000_000)  # noqa: SLF001  no public way to keep a stream busy
            late.copy_(ids)
            logits = front(input_ids=late).logits
            # Read on the caller's stream at once, and the memory handed out again.
            copied = logits * 1
            del logits
            late.zero_()
            assert torch.cuda.current_stream(DEVICE) == caller
        other = torch.full_like(expected, 7.0)
        caller.synchronize()
        assert off(copied, expected) <= TOLERANCE
        del other
    assert torch.cuda.current_device() == DEVICE.index
    assert torch.cuda.current_stream(DEVICE) == torch.cuda.default_stream(DEVICE)
    front.unload()


def test_two_models_and_two_callers_at_once(place):
    models = [made("llama"), made("phi3")]
    pairs = [(whole(model), over_ranks(model, [2, 1], place)) for model in models]
    given = [prompt(model) for model in models]
    options = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False}
    expected = [pair[0].generate(**own, **options) for pair, own in zip(pairs, given, strict=True)]
    got: list[Any] = [None] * 4

    def call(caller):
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            got[caller] = pairs[caller % 2][1].generate(**given[caller % 2], **options)
            torch.cuda.current_stream().synchronize()

    synchronize()
    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[caller], expected[caller % 2]) for caller in range(4))
    for _, front in pairs:
        front.unload()


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_a_step_leaves_a_usable_model(place, kind, rank):
    model = made("llama")
    reference, front = whole(model), over_ranks(model, [2, 1], place)
    given = prompt(model)
    expected = reference.generate(**given, max_new_tokens=8, pad_token_id=0)
    layer = front.tp_rs_runner.models[rank].model.layers[1]
    calls = iter(range(100))

    def fail(*_):
        if next(calls) == 2:
            raise kind("planted")

    hook = layer.register_forward_pre_hook(fail)
    for _ in range(2):
        calls = iter(range(100))
        with pytest.raises(kind, match="planted"):
            front.generate(**given, max_new_tokens=8, pad_token_id=0)
    hook.remove()
    assert torch.equal(front.generate(**given, max_new_tokens=8, pad_token_id=0), expected)
    front.unload()


def test_unloads_after_an_error_that_is_still_looked_at(tmp_path, place):
    model = made("llama")
    model.save_pretrained(tmp_path)
    splits = uneven(model, [2, 1])
    given = prompt(model)
    before, _ = settled(place)
    front = load(tmp_path, plan=splits, devices=place.devices(2), check=False)

    def fail(*_):
        raise RuntimeError("planted")

    front.tp_rs_runner.models[1].model.layers[1].register_forward_pre_hook(fail)
    try:
        front.generate(**given, max_new_tokens=8, pad_token_id=0)
    except RuntimeError:
        # Its frames hold modules and caches; of what they computed with, little is left.
        front.unload()
        after, _ = settled(place)
        assert above(after, before) < 1 << 20
    with pytest.raises(tp_rs.TPError, match="unloaded"):
        front(**given)


def test_unloading_gives_everything_back(tmp_path, place):
    model = made("llama", hidden_size=384, intermediate_size=1024, vocab_size=32000)
    model.save_pretrained(tmp_path)
    given = prompt(model)
    budgets = [2.0, 2.0]
    seen = []
    for _ in range(20):
        front = tp_rs.load(tmp_path, budgets, devices=place.devices(2), context=64)
        front.generate(**given, max_new_tokens=4, pad_token_id=0)
        front.unload()
        del front
        gc.collect()
        seen.append(settled(place))
    # The first has the driver load kernels and torch make its libraries' handles.
    assert all(allocated == seen[0][0] for allocated, _ in seen[1:])
    assert all(above(seen[1][1], free) <= 0 for _, free in seen[2:])


@pytest.mark.parametrize(
    ("stored", "dtype", "place"),
    [
        *itertools.product(
            [torch.float32, torch.bfloat16], [torch.float32, torch.bfloat16, torch.float16], ["together"]
        ),
        (torch.bfloat16, torch.float16, "spread"),
    ],
    indirect=["place"],
)
def test_ranks_hold_what_ranks_on_the_cpu_hold(tmp_path, stored, dtype, place):
    for architecture in ("llama", "mixtral", "phi3", "gemma3_text"):
        folder = tmp_path / architecture
        model = made(architecture).to(stored)
        model.save_pretrained(folder)
        splits = uneven(model, [2, 1])
        same_parameters(folder, splits, dtype, place)


def test_quantised_and_pickled_checkpoints(tmp_path, place):
    packing = pytest.importorskip("packing")
    model = made("llama", hidden_size=192, intermediate_size=256, head_dim=32)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    packed, _ = packing.write(tmp_path / "gptq", model, settings, packing.gptq, torch.seed() % 1000)
    same_parameters(packed, uneven(model, [2, 1]), torch.float32, place)
    model.save_pretrained(tmp_path / "pickled")
    state = model.state_dict()
    for file in (tmp_path / "pickled").glob("*.safetensors"):
        file.unlink()
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    same_parameters(tmp_path / "pickled", uneven(model, [2, 1]), torch.float32, place)


def same_parameters(folder, splits, dtype, place):
    read: dict[int, int] = {}
    devices = place.devices(2)
    ours = load(folder, plan=splits, devices=devices, dtype=dtype, check=False, progress=read.__setitem__)
    theirs = load(folder, plan=splits, devices=["cpu"] * 2, dtype=dtype, check=False)
    for rank in range(2):
        pairs = zip(
            ours.tp_rs_runner.models[rank].named_parameters(),
            theirs.tp_rs_runner.models[rank].named_parameters(),
            strict=True,
        )
        for (name, here), (_, there) in pairs:
            assert str(here.device) == devices[rank]
            assert here.dtype == there.dtype
            assert torch.equal(here.cpu(), there), (folder.name, rank, name)
    assert set(read) == {0, 1}
    assert all(count > 0 for count in read.values())
    ours.unload()
    theirs.unload()


LEFT_LOADED = """
import sys
import torch
from models_common import made, over_ranks
front = over_ranks(made("llama"), [2, 1], capture=sys.argv[1] == "captured")
ids = torch.randint(3, 90, (1, 12), device="cuda:0")
front.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
print("done")
"""


@pytest.mark.parametrize("way", ["eager", "captured"])
def test_a_process_ends_well_with_a_model_that_nobody_unloaded(way):
    done = subprocess.run(
        [sys.executable, "-c", LEFT_LOADED, way],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "terminate called" not in done.stderr


def test_refusals(tmp_path):
    model = made("llama")
    model.save_pretrained(tmp_path)
    splits = uneven(model, [2, 1])
    with pytest.raises(tp_rs.InvalidInput, match="all ranks on the CPU or all on CUDA"):
        load(model, plan=splits, devices=["cpu", "cuda:0"], check=False)
    with pytest.raises(tp_rs.InvalidInput, match="torch sees"):
        load(model, plan=splits, devices=["cuda:0", "cuda:99"], check=False)
    with pytest.raises(tp_rs.DoesNotFit):
        tp_rs.load(tmp_path, [0.001, 0.001], devices=["cuda:0"] * 2)
    held = torch.empty(1, device=DEVICE)
    front = over_ranks(model, [2, 1])
    graph = torch.cuda.CUDAGraph()
    given = prompt(model)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        held.add_(1)
        with pytest.raises(tp_rs.InvalidInput, match="graph is captured"):
            front(**given)
    front.unload()


def test_a_device_that_is_full_is_told(tmp_path, place):
    model = made("llama", hidden_size=384, intermediate_size=4096, vocab_size=32000)
    model.save_pretrained(tmp_path)
    devices = place.devices(2)
    before, _ = settled(place)
    # Of several GPUs the last one, when the first has its rank already.
    full = pytest.raises(tp_rs.DoesNotFit, match=f"{devices[1]} ran out of memory while loading")
    with limited({devices[1]: 16 << 20}), full:
        load(tmp_path, plan=uneven(model, [2, 1]), devices=devices, check=False)
    assert above(settled(place)[0], before) <= 1 << 20
    front = load(tmp_path, plan=uneven(model, [2, 1]), devices=devices, check=False)
    front.unload()
