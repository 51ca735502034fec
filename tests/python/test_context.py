"""`TPContext` on host memory: every method against slices, concatenations and float64 sums made here."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import tp_rs
from contexts import DTYPES, SPLITS, TYPES, make, pieces, randn
from tp_rs import BROADCAST_ID, BROADCAST_RS, TPContext


@pytest.fixture(params=SPLITS)
def ctx(request: pytest.FixtureRequest) -> Any:
    with make(request.param, timeout=20) as context:
        yield context


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


def test_a_reset_context_goes_on() -> None:
    with make("3", timeout=0.1) as ctx:
        alone = random.randrange(3)
        with pytest.raises(tp_rs.CollectiveTimeout) as caught:
            ctx.rank(alone).all_reduce(torch.ones(5))
        assert set(caught.value.missing) == {0, 1, 2} - {alone}
        with pytest.raises(tp_rs.TPError):
            ctx.check()
        ctx.reset()
        ctx.check()
        tensors = [torch.randn(4, 5) for _ in range(3)]
        expected = tensors[0] + tensors[1] + tensors[2]
        ctx.all_reduce(tensors)
        assert all(torch.equal(tensor, expected) for tensor in tensors)
    with pytest.raises(tp_rs.TPError, match=r"unloaded|finalize"):
        ctx.reset()


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
        sources: list[Any] = [
            torch.empty(2, 2, device="meta"),
            torch.tensor(1.0),
            3,
            torch.zeros(2, dtype=torch.int16),
        ]
        for source in sources:
            with pytest.raises(tp_rs.InvalidInput, match="wanted"):
                ctx.broadcast(0, source, BROADCAST_ID)
        # Refused calls leave the context usable.
        assert len(ctx.allgather(0, parts, BROADCAST_ID, BROADCAST_RS)) == len(ctx.rs_split)


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


def test_unload_during_use_ends_calls_with_an_error_and_nothing_worse() -> None:
    for _ in range(5):
        ctx = make("3", timeout=60)
        ctx.finalize()
        communicator, views = ctx.communicator, [ctx.rank(rank) for rank in range(3)]
        whole, parts = pieces(ctx, BROADCAST_ID, 1, torch.float32, (8,))
        started = threading.Barrier(5)

        def by_rank(view: Any, started: threading.Barrier = started) -> str:
            mine = torch.ones(1000)
            started.wait()
            try:
                while True:
                    view.all_reduce(mine)
            except tp_rs.TPError as error:
                return str(error)

        def by_list(
            ctx: TPContext = ctx,
            parts: list[Any] = parts,
            whole: Any = whole,
            started: threading.Barrier = started,
        ) -> str:
            started.wait()
            try:
                while True:
                    assert torch.equal(ctx.allgather(0, parts, BROADCAST_ID, BROADCAST_RS)[0], whole)
            except tp_rs.TPError as error:
                return str(error)

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(by_rank, view) for view in views] + [pool.submit(by_list)]
            started.wait()
            time.sleep(random.random() * 0.02)
            ctx.unload()
            outcomes = [future.result(timeout=30) for future in running]
        assert all("unloaded" in outcome for outcome in outcomes), outcomes
        with pytest.raises(tp_rs.TPError, match="unloaded"):
            communicator.check()


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
