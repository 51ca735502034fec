"""`TPContext`'s host buffers, temporaries and scratch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import tp_rs
from contexts import DTYPES, SMALL, SPLITS, TYPES, make, pieces, randn
from tp_rs import BROADCAST_ID, BROADCAST_Q, BROADCAST_RS, BROADCAST_VC, TPContext


@pytest.fixture(params=SPLITS)
def ctx(request: pytest.FixtureRequest) -> Any:
    with make(request.param, timeout=20) as context:
        yield context


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


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ({}, {"chunk": 32}, 32 * 192 * 4),
        ({"torch_dtype": "bfloat16"}, {"chunk": 32}, 32 * 192 * 2),
        # Attention wider than the residual stream, and logits larger than both.
        ({"head_dim": 64}, {"chunk": 32}, 32 * 6 * 64 * 4),
        ({"vocab_size": 5000}, {"chunk": 4, "batch": 3}, 3 * 5024 * 4),
    ],
)
def test_the_plan_says_how_large_the_buffers_are(
    change: dict[str, Any], options: dict[str, Any], expected: int
) -> None:
    for ranks in (1, 3):
        with TPContext({**SMALL, **change}, [0.1] * ranks, **options) as ctx:
            assert ctx.plan.buffer_bytes == expected
            assert [buffer.nbytes for buffer in ctx.pinned_temp or []] == [expected] * 2
            # What ranks meet through comes on top: for three of them 4 MiB of slots and two inboxes of 2 MiB,
            # with flags, in steps of 2 MiB. One rank alone needs no pinned memory.
            assert ctx.plan.pinned_bytes == (0 if ranks == 1 else 2 * expected + ranks * (10 << 20))


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
