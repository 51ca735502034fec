"""`TPContext` on host memory: every method against slices, concatenations and float64 sums made here."""

from __future__ import annotations

import json
import random
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tp_rs
from tp_rs import (
    BROADCAST_ID,
    BROADCAST_KV,
    BROADCAST_Q,
    BROADCAST_RS,
    BROADCAST_VC,
    Plan,
    TPContext,
    rope,
)

torch: Any = pytest.importorskip("torch")

TYPES = [BROADCAST_KV, BROADCAST_ID, BROADCAST_VC, BROADCAST_RS, BROADCAST_Q]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
# One rank, KV heads 2+1, a rank without KV heads, and one without anything in front.
SPLITS: dict[str, dict[str, list[int]]] = {
    "1": {"kv": [3]},
    "2": {"kv": [2, 1]},
    "3": {"kv": [2, 1, 0], "id": [0, 96, 160]},
    "4": {"kv": [0, 2, 0, 1], "id": [0, 100, 56, 100], "vc": [0, 50, 0, 50], "rs": [0, 64, 64, 64]},
}


def make(name: str = "3", **more: Any) -> TPContext:
    splits = SPLITS[name]
    return TPContext(SMALL, [0.1] * len(splits["kv"]), splits=splits, **more)


@pytest.fixture(params=SPLITS)
def ctx(request: pytest.FixtureRequest) -> Any:
    with make(request.param, timeout=20) as context:
        yield context


def randn(shape: tuple[int, ...], dtype: Any) -> Any:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def pieces(
    context: TPContext, kind: int, dim: int, dtype: Any, rows: tuple[int, ...]
) -> tuple[Any, list[Any]]:
    split = context.get_split(kind)
    whole = randn((*rows, split[-1][2] * dim), dtype)
    return whole, [whole[..., a * dim : b * dim].contiguous() for _, a, b in split]


def test_splits_are_the_plans(ctx: TPContext) -> None:
    plan = ctx.plan
    expected = [plan.kv_split, plan.id_split, plan.vc_split, plan.rs_split, plan.q_split]
    assert [ctx.get_split(kind) for kind in TYPES] == expected
    assert [ctx.kv_split, ctx.id_split, ctx.vc_split, ctx.rs_split, ctx.q_split] == expected
    devs = [ctx.kv_split_devs, ctx.id_split_devs, ctx.vc_split_devs, ctx.rs_split_devs, ctx.q_split_devs]
    assert devs == [ctx.get_devs(kind) for kind in TYPES] == [[r for r, _, _ in s] for s in expected]
    ranks = sorted({rank for split in expected for rank, _, _ in split})
    assert ctx.all_devs == ctx.all_devices() == ranks
    assert (ctx.device, ctx.num_devices) == (ranks[0], ranks[-1] + 1)
    assert ctx.streams == [0] * ctx.num_devices
    assert ctx.devices == ["cpu"] * len(plan.ranks)
    assert bool(ctx)


@pytest.mark.parametrize("kind", [-1, 5, True, None, "kv"])
def test_unknown_splits_are_refused(kind: Any) -> None:
    for call in (make().get_split, make().get_devs):
        with pytest.raises(tp_rs.InvalidInput, match="BROADCAST_KV"):
            call(kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_broadcast_gather_allgather(ctx: TPContext, kind: int, dtype: Any) -> None:
    dim, rows = random.randint(1, 4), random.choice([(3,), (2, 2)])
    whole, parts = pieces(ctx, kind, dim, dtype, rows)
    copies = ctx.broadcast(0, whole, kind, dim)
    assert len(copies) == len(parts)
    assert all(torch.equal(copy, whole) and copy.data_ptr() != whole.data_ptr() for copy in copies)

    gathered = ctx.gather(1, parts, kind, dim)
    assert gathered.dtype == dtype
    assert torch.equal(gathered, whole)
    assert gathered.data_ptr() == ctx.pinned_temp[1].data_ptr()  # type: ignore[index]

    for target in TYPES:
        results = ctx.allgather(0, parts, kind, target, dim)
        assert len(results) == len(ctx.get_split(target))
        assert all(torch.equal(result, whole) for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_sums(ctx: TPContext, kind: int, dtype: Any) -> None:
    dim, split = random.randint(1, 4), ctx.get_split(kind)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2}.get(dtype, 6e-2)
    inputs = [randn((3, split[-1][2] * dim), dtype) for _ in ctx.devices]
    exact = sum(part.double() for part in inputs)

    scattered = ctx.reduce_scatter(inputs, kind, dim)
    for part, (_, a, b) in zip(scattered, split, strict=True):
        torch.testing.assert_close(part.double(), exact[:, a * dim : b * dim], rtol=tolerance, atol=tolerance)
    sources, targets = [inputs[rank] for rank, _, _ in split], [part.clone() for part in scattered]
    assert ctx.add_residual(targets, sources, kind, dim) is None  # type: ignore[func-returns-value]
    for target, part, source, (_, a, b) in zip(targets, scattered, sources, split, strict=True):
        assert torch.equal(target, part + source[:, a * dim : b * dim])

    sums = [part.clone() for part in inputs]
    assert ctx.all_reduce(sums) is sums
    torch.testing.assert_close(sums[0].double(), exact, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(one, sums[0]) for one in sums)


def test_ranks_in_threads() -> None:
    with make("3", timeout=20) as ctx:
        tensors = [torch.randn(4, 5) for _ in range(3)]
        expected = tensors[0] + tensors[1] + tensors[2]

        def work(rank: int) -> None:
            view = ctx.rank(rank)
            for _ in range(20):
                time.sleep(random.random() * 0.002)
                mine = tensors[rank].clone()
                view.all_reduce(mine)
                assert torch.equal(mine, expected)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, range(3)))


def test_what_does_not_fit_the_split_is_refused() -> None:
    with make("3") as ctx:
        _, parts = pieces(ctx, BROADCAST_ID, 1, torch.float32, (2,))
        bad: list[list[Any]] = [
            [],
            parts[:1],
            [*parts, parts[0]],
            [parts[0][:, 1:], parts[1]],
            [parts[0].half(), parts[1]],
            [parts[0], parts[1][:1]],
            [parts[0], parts[1].to("meta")],
            [parts[0], parts[1].t().contiguous().t()],
            [parts[0], parts[1].to(torch.complex64)],
            [parts[0], "part"],
            ["part", parts[1]],
        ]
        for inputs in bad:
            with pytest.raises(tp_rs.InvalidInput, match="wanted"):
                ctx.gather(0, inputs, BROADCAST_ID)
            with pytest.raises(tp_rs.InvalidInput, match="wanted"):
                ctx.allgather(0, inputs, BROADCAST_ID, BROADCAST_RS)
        for buffer in (-1, 2, True, "0"):
            with pytest.raises(tp_rs.InvalidInput, match="buffer"):
                ctx.gather(buffer, parts, BROADCAST_ID)  # type: ignore[arg-type]
        for dim in (-1, 1.5, True):
            with pytest.raises(tp_rs.InvalidInput, match="wanted"):
                ctx.allgather(0, parts, BROADCAST_ID, BROADCAST_ID, dim)  # type: ignore[arg-type]
        for source in (
            torch.empty(2, 2, device="meta"),
            torch.tensor(1.0),
            3,
            torch.zeros(2, dtype=torch.long),
        ):
            with pytest.raises(tp_rs.InvalidInput, match="wanted"):
                ctx.broadcast(0, source, BROADCAST_ID)
        # Refused calls leave the context usable.
        assert len(ctx.allgather(0, parts, BROADCAST_ID, BROADCAST_RS)) == len(ctx.rs_split)


def test_pinned_buffers_take_any_dtype_and_keep_their_size() -> None:
    with make("2", pinned_bytes=1000) as ctx:
        assert [(len(buffer), buffer.dtype) for buffer in ctx.pinned_temp or []] == [(500, torch.float16)] * 2
        for dtype in (*DTYPES, torch.uint8, torch.int64):
            given = randn((2, 3, 4), dtype)
            held = ctx.copy_pinned(1, given)
            assert torch.equal(held, given)
            assert held.dtype == dtype
            assert torch.equal(ctx.get_pinned(1, 2, 3, 4, dtype), given)
        assert ctx.get_pinned(0, 5, 10, 10).shape == (5, 10, 10)
        with pytest.raises(tp_rs.InvalidInput, match="pinned_bytes=1002"):
            ctx.get_pinned(0, 1, 1, 501)
        with pytest.raises(tp_rs.InvalidInput, match="pinned_bytes=1200"):
            ctx.copy_pinned(0, torch.zeros(3, 100))
        with pytest.raises(tp_rs.InvalidInput, match="pinned_bytes=2048"):
            ctx.gather(0, [torch.zeros(2, b - a) for _, a, b in ctx.id_split], 1)
        with pytest.raises(tp_rs.InvalidInput, match="memory"):
            ctx.copy_pinned(0, torch.zeros(3, device="meta"))
        ctx.wait_streams()


def test_buffers_hold_what_the_plan_can_need() -> None:
    with make("2", chunk=32) as ctx, torch.inference_mode():
        for kind, dim in ((BROADCAST_RS, 1), (BROADCAST_Q, 32)):
            whole, parts = pieces(ctx, kind, dim, torch.float32, (32,))
            assert torch.equal(ctx.gather(0, parts, kind, dim), whole)
        whole, parts = pieces(ctx, BROADCAST_VC, 1, torch.float32, (1,))
        assert torch.equal(ctx.gather(0, parts, BROADCAST_VC), whole)
        assert sum(buffer.nbytes for buffer in ctx.pinned_temp or []) == 2 * 32 * 192 * 4


def test_inference_mode_leaves_no_mark() -> None:
    ctx = make("2")
    with torch.inference_mode():
        ctx.finalize()
    ctx.copy_pinned(0, torch.ones(3))
    ctx.unload()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_temporaries_and_scratch(ctx: TPContext, kind: int, dtype: Any) -> None:
    split, rows, dim, size = ctx.get_split(kind), random.randint(0, 5), random.randint(1, 8), dtype.itemsize
    own = [(rows, (b - a) * dim) for _, a, b in split]
    full = [(rows, split[-1][2] * dim)] * len(split)
    for _ in range(2):
        ctx.begin_scratch_alloc_tp()
        ctx.reserve_scratch([7] * ctx.num_devices)
        for shapes, make_tensors, cut in (
            (own, ctx.get_temp_tensors, ctx.get_scratch_slice_tp),
            (full, ctx.get_temp_tensors_bc, ctx.get_scratch_slice_tp_bc),
        ):
            made, first, second = (call(rows, dtype, kind, dim) for call in (make_tensors, cut, cut))
            for tensors in (made, first, second):
                assert [tuple(tensor.shape) for tensor in tensors] == shapes
                assert all(tensor.dtype == dtype for tensor in tensors)
            # Slices of one rank do not share memory.
            for tensor in first:
                tensor.fill_(1)
            for tensor in second:
                tensor.fill_(2)
            assert all(bool((tensor == 1).all()) for tensor in first)
    expected = [0] * ctx.num_devices
    for (rank, _, _), (count, width) in zip(split, own, strict=True):
        expected[rank] = count * width * size
    assert ctx.get_temp_tensors_s(rows, size, kind, dim) == expected
    for (rank, _, _), (count, width) in zip(split, full, strict=True):
        expected[rank] = count * width * size
    assert ctx.get_temp_tensors_bc_s(rows, size, kind, dim) == expected


def test_scratch_is_used_again() -> None:
    with make("2") as ctx:
        seen = []
        for _ in range(4):
            ctx.begin_scratch_alloc_tp()
            seen.append(
                [part.data_ptr() for part in ctx.get_scratch_slice_tp(8, torch.float32, BROADCAST_ID)]
            )
        assert seen[2] == seen[3]
        for bad in ([-1], [1.5], [0, 0, 0]):
            with pytest.raises(tp_rs.InvalidInput, match="scratch"):
                ctx.reserve_scratch(bad)  # type: ignore[arg-type]
        with pytest.raises(tp_rs.InvalidInput, match="rows"):
            ctx.get_scratch_slice_tp(-1, torch.float32, BROADCAST_ID)


def state(ctx: TPContext) -> list[Any]:
    return [ctx.ext_tp_context, ctx.pinned_temp, ctx.streams, ctx.sin, ctx.cos]


def uses(ctx: TPContext) -> list[Any]:
    x = torch.zeros(1, 192)
    return [
        lambda: ctx.broadcast(0, x, 0),
        lambda: ctx.gather(0, [x], 0),
        lambda: ctx.allgather(0, [x], 0, 0),
        lambda: ctx.all_reduce([x]),
        lambda: ctx.reduce_scatter([x], 0),
        lambda: ctx.add_residual([x], [x], 0),
        lambda: ctx.get_pinned(0, 1, 1, 1),
        lambda: ctx.copy_pinned(0, x),
        lambda: ctx.rank(0),
        lambda: ctx.communicator,
        ctx.wait_streams,
        ctx.get_sin_cos,
        ctx.begin_scratch_alloc_tp,
        lambda: ctx.get_scratch_slice_tp(1, torch.half, 0),
        lambda: ctx.get_scratch_slice_tp_bc(1, torch.half, 0),
        lambda: ctx.reserve_scratch([1]),
    ]


def test_a_context_lives_from_finalize_to_unload() -> None:
    ctx = make("2")
    assert state(ctx) == [None] * 5
    for use in uses(ctx):
        with pytest.raises(tp_rs.TPError, match=r"finalize\(\)"):
            use()
    ctx.unload()
    ctx.finalize()
    handle, buffers = ctx.ext_tp_context, ctx.pinned_temp
    assert type(handle) is int
    assert handle != 0
    ctx.finalize()
    assert ctx.ext_tp_context == handle
    assert ctx.pinned_temp is buffers
    with pytest.raises(tp_rs.TPError, match="unload"):
        ctx.define_split([0.1, 0.1], 0, None)
    ctx.get_sin_cos()
    for _ in range(2):
        ctx.unload()
        assert state(ctx) == [None] * 5
    for use in uses(ctx):
        with pytest.raises(tp_rs.TPError, match="unloaded"):
            use()
    with ctx as again:
        assert again is ctx
        assert len(ctx.broadcast(0, torch.zeros(2), 0)) == 2
    assert ctx.ext_tp_context is None


def test_unload_wakes_a_waiting_rank_and_errors_leave_the_block() -> None:
    with pytest.raises(ZeroDivisionError), make("2", timeout=60) as ctx:  # noqa: PT012
        view = ctx.rank(0)
        raised: list[BaseException] = []

        def wait() -> None:
            try:
                view.barrier()
            except tp_rs.TPError as error:
                raised.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.1)
        _ = 1 // 0
    waiting.join(10)
    assert "unloaded" in str(raised[0])


def test_models_come_in_many_forms(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    plan = make("2").plan
    exllamav2 = types.SimpleNamespace(
        arch=types.SimpleNamespace(
            arch_string="LlamaForCausalLM", lm=types.SimpleNamespace(supports_tp=True)
        ),
        **{name: value for name, value in SMALL.items() if isinstance(value, int)},
        num_key_value_groups=2,
        max_seq_len=64,
        max_batch_size=1,
        max_input_len=32,
        max_output_len=None,
        rotary_embedding_base=10000.0,
    )
    forms = [
        path,
        tmp_path,
        SMALL,
        tp_rs.ModelShape.from_config(SMALL),
        types.SimpleNamespace(config=exllamav2, modules=[]),
    ]
    for form in forms:
        ctx = TPContext(form, [0.1, 0.1], 64, None, splits=SPLITS["2"])
        assert ctx.kv_split == plan.kv_split
        assert ctx.plan.context == 64
    for ctx in (TPContext(plan), TPContext(SMALL, plan=plan), TPContext(Plan.from_json(plan.to_json()))):
        assert ctx.plan == plan
    with TPContext(forms[-1], [0.1, 0.1], 64) as ctx:
        assert ctx.get_sin_cos()[0][0].shape == (1, 1, 64, 32)


def recorded() -> list[dict[str, Any]]:
    path = Path(__file__).parents[1] / "data" / "reference_splits.jsonl"
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [case for case in cases if case["gpu_split"] is not None and case["exception"] is None]


class ExLlamaV2Attention:
    def __init__(self, footprint: int) -> None:
        self.footprint = footprint

    def weight_footprint(self) -> int:
        return self.footprint


def exllamav2_model(case: dict[str, Any]) -> Any:
    names = ("_size", "_heads", "_groups", "_dim", "_layers", "max_seq_len", "max_batch_size")
    lm = types.SimpleNamespace(supports_tp=case["supports_tp"])
    config = types.SimpleNamespace(
        arch=types.SimpleNamespace(arch_string=case["arch_string"], lm=lm),
        max_input_len=2048,
        max_output_len=None,
        **{name: value for name, value in case.items() if name.endswith(names)},
    )
    footprint = case["attn_footprint_bytes_per_layer"]
    modules = [ExLlamaV2Attention(footprint) for _ in range(case["num_hidden_layers"])]
    return types.SimpleNamespace(config=config, modules=modules)


def test_splits_are_those_that_the_reference_recorded() -> None:
    compared = 0
    for case in random.sample(recorded(), 60):
        kind = case["cache_type"]
        cache = None if kind == "default(None)" else f"ExLlamaV2Cache{'' if kind == 'FP16' else '_' + kind}"
        ctx = TPContext(
            exllamav2_model(case),
            case["gpu_split"],
            case["expect_cache_tokens"],
            None if cache is None else type(cache, (), {}),
            strategy="exllamav2",
            force=True,
        )
        for name in ("kv", "q", "id", "rs", "vc"):
            expected = [tuple(share) for share in case[f"{name}_split"]]
            assert getattr(ctx, f"{name}_split") == expected, case
            assert getattr(ctx, f"{name}_split_devs") == case[f"{name}_split_devs"], case
        # The reference forgets the ranks that have columns of the residual stream only.
        assert ctx.all_devs == sorted({*case["all_devs"], *case["rs_split_devs"]}), case
        assert ctx.device == ctx.all_devs[0]
        assert ctx.num_devices == ctx.all_devs[-1] + 1
        compared += 1
    assert compared == 60


def test_plans_that_cannot_be_used_are_refused() -> None:
    plan = make("2").plan
    with pytest.raises(tp_rs.InvalidInput, match="hidden_size is 384"):
        TPContext({**SMALL, "hidden_size": 384}, plan=plan)
    with pytest.raises(tp_rs.InvalidInput, match="devices"):
        TPContext(plan, devices=["cpu"])
    with pytest.raises(tp_rs.InvalidInput, match="plan"):
        TPContext(plan, plan=plan)
    with pytest.raises(tp_rs.InvalidInput, match="splits stay"):
        TPContext(plan).define_split([1, 1])
    with pytest.raises(tp_rs.DoesNotFit) as caught:
        TPContext(SMALL, [0.0001, 0.0001])
    assert caught.value.shortfall is not None
    with TPContext(SMALL, [0.0001, 0.0001], force=True) as ctx:
        assert not ctx.plan.fits
    with pytest.raises(tp_rs.InvalidInput, match="host memory"):
        TPContext(SMALL, [1.0, 1.0], devices=["cuda:0", "cuda:1"]).finalize()


def test_the_cache_class_tells_how_keys_are_stored() -> None:
    expected = {"ExLlamaV2Cache": "fp16", "ExLlamaV2Cache_8bit": "8bit"}
    expected |= {f"ExLlamaV2Cache_Q{bits}": f"q{bits}" for bits in (4, 6, 8)}
    for name, cache in expected.items():
        ctx = TPContext(SMALL, [0.1, 0.1], 48, type(name, (), {}), batch=2)
        assert (ctx.plan.cache, ctx.plan.context) == (cache, 24)


def test_sin_cos_by_rank() -> None:
    with make("4") as ctx:
        sin, cos = ctx.get_sin_cos()
        assert ctx.sin is sin
        assert ctx.get_sin_cos()[1] is cos
        assert len(sin) == len(cos) == ctx.num_devices
        assert sin[0].device.type == "meta"
        positions = torch.arange(64, dtype=torch.float64)[:, None]
        angles = positions * 10000.0 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
        angles = torch.cat((angles, angles), 1)
        for rank in ctx.all_devs:
            assert sin[rank].dtype == torch.float16
            torch.testing.assert_close(sin[rank][0, 0].double(), angles.sin(), rtol=0, atol=5e-4)
            torch.testing.assert_close(cos[rank][0, 0].double(), angles.cos(), rtol=0, atol=5e-4)
        wide = ctx.get_sin_cos(torch.float32)[0][1]
        torch.testing.assert_close(wide[0, 0].double(), angles.sin(), rtol=0, atol=1e-5)


def test_sin_cos_from_device_contexts() -> None:
    held = types.SimpleNamespace(sin=[torch.rand(1, 1, 8, 4)] * 2, cos=[torch.rand(1, 1, 8, 4)] * 2)
    with make("2") as ctx:
        ctx.model = types.SimpleNamespace(get_device_context=lambda _: held)
        sin, _ = ctx.get_sin_cos()
        assert sin[1].shape == (2, 1, 8, 4)


def test_a_model_without_rotary_parameters_asks_for_them() -> None:
    shape = tp_rs.ModelShape.from_config(SMALL)
    with TPContext(shape, [0.1, 0.1]) as ctx, pytest.raises(tp_rs.InvalidInput, match="rope="):
        ctx.get_sin_cos()
    with TPContext(shape, [0.1, 0.1], rope={"rope_theta": 500.0, "head_dim": 32}) as ctx:
        assert ctx.get_sin_cos()[0][0].shape == (1, 1, 64, 32)


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 5e5,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 1e4,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
}


@pytest.mark.parametrize("kind", ROPES)
def test_tables_are_those_of_transformers(kind: str) -> None:
    pytest.importorskip("transformers", minversion="5")
    from transformers import LlamaConfig  # noqa: PLC0415 - takes seconds
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415

    fields = {name: value for name, value in SMALL.items() if name not in ("rope_theta", "torch_dtype")}
    config = LlamaConfig(**fields, rope_parameters=dict(ROPES[kind]))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(64)[None])
    for settings in (
        config.to_dict(),
        {**fields, "rope_scaling": ROPES[kind], "rope_theta": ROPES[kind]["rope_theta"]},
    ):
        mine = rope.tables(settings, 64)
        torch.testing.assert_close(mine[0][0], sin, rtol=0, atol=2e-6)
        torch.testing.assert_close(mine[1][0], cos, rtol=0, atol=2e-6)


def test_layers_that_rotate_differently_have_sets_of_their_own() -> None:
    config = {
        **SMALL,
        "rope_parameters": {"full_attention": ROPES["linear"], "sliding_attention": {"rope_theta": 100.0}},
    }
    both = rope.tables(config, 16)[0]
    assert both.shape == (2, 1, 16, 32)
    for index, parameters in enumerate((ROPES["linear"], {"rope_theta": 100.0})):
        alone = rope.tables({**SMALL, "rope_parameters": parameters}, 16)[0]
        assert torch.equal(both[index], alone[0])
    old = rope.tables({**SMALL, "rope_local_base_freq": 100.0}, 16)[0]
    assert torch.equal(old[1], both[1])


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 8},
        {"rope_theta": -1.0, "head_dim": 8},
        {"rope_theta": 1e4, "head_dim": 7},
        {"rope_theta": 1e4, "head_dim": 8, "rope_scaling": {"type": "linear"}},
        {"rope_theta": 1e4, "head_dim": 8, "rope_scaling": {"type": "spiral"}},
        {"rope_theta": 1e4, "head_dim": 8, "rope_scaling": "linear"},
    ],
)
def test_broken_rotary_parameters_are_named(config: dict[str, Any]) -> None:
    with pytest.raises(tp_rs.InvalidInput, match="wanted"):
        rope.tables(config, 4)
