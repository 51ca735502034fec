"""Collectives over random splits, shapes and types, each against numpy in float64 or on bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tp_rs
from contexts import SMALL
from tensors import FLOATS, MOVED, in_threads, raw, values
from tp_rs import BROADCAST_ID, BROADCAST_KV, BROADCAST_Q, BROADCAST_RS, BROADCAST_VC, TPContext

many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
Split = list[tuple[int, int, int]]
SHAPES = st.tuples(st.integers(1, 5), st.integers(0, 4))
SEEDS = st.integers(0, 2**32)
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
    torch.float8_e4m3fn: 0.13,
    torch.float8_e5m2: 0.26,
}


@st.composite
def splits(draw: st.DrawFn) -> tuple[Split, int]:
    """Adjacent intervals in the order of ranks, those without columns sometimes left out, and the ranks."""
    widths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
    ends = np.cumsum(widths).tolist()
    split = [(rank, end - width, end) for rank, (width, end) in enumerate(zip(widths, ends, strict=True))]
    named = [share for share in split if share[1] < share[2] or draw(st.booleans())]
    return named, len(widths)


def columns(split: Split, dim: int, whole: Any) -> list[Any]:
    """Each interval's columns of a tensor, rows apart as in a fused projection's output."""
    return [whole[..., a * dim : b * dim] for _, a, b in split]


def exact(tensor: Any) -> Any:
    return tensor.double().numpy()


def close(got: Any, wanted: Any, parts: list[Any]) -> None:
    scale = sum(np.abs(exact(part)) for part in parts) + 1e-6
    # One rounding to the type; what is below the type's smallest step vanishes.
    assert np.all(np.abs(exact(got) - wanted) <= ROUNDING[got.dtype] * scale + torch.finfo(got.dtype).tiny)


@many
@given(splits(), SHAPES, st.sampled_from(FLOATS + MOVED), st.booleans(), SEEDS)
def test_gathers_are_concatenations(
    drawn: tuple[Split, int], shape: tuple[int, int], dtype: Any, threads: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    dim, rows = shape
    split, ranks = drawn
    comm = tp_rs.Communicator(["cpu"] * ranks, timeout=20)
    whole = values((rows, split[-1][2] * dim), dtype)
    parts = columns(split, dim, whole)
    targets = [torch.empty_like(whole) for _ in range(ranks)]
    if threads:
        mine = {rank: part for (rank, _, _), part in zip(split, parts, strict=True)}
        in_threads(
            comm,
            ranks,
            lambda view: view.all_gather(mine.get(view.rank), split, targets[view.rank], dim=dim),
        )
    else:
        comm.all_gather(parts, split, targets, dim=dim)
        target = torch.empty_like(whole)
        comm.gather(parts, split, target, dim=dim)
        targets.append(target)
    concatenated = np.concatenate([raw(part).numpy() for part in parts], axis=-1)
    assert all(np.array_equal(raw(target).numpy(), concatenated) for target in targets)


@many
@given(splits(), SHAPES, st.sampled_from(FLOATS), st.booleans(), SEEDS)
def test_sums_are_sums(
    drawn: tuple[Split, int], shape: tuple[int, int], dtype: Any, threads: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    dim, rows = shape
    split, ranks = drawn
    comm = tp_rs.Communicator(["cpu"] * ranks, timeout=20)
    inputs = [values((rows, split[-1][2] * dim), dtype) for _ in range(ranks)]
    wanted = np.sum([exact(part) for part in inputs], axis=0)
    outputs = [torch.empty((rows, (b - a) * dim), dtype=dtype) for _, a, b in split]
    sums = [part.clone() for part in inputs]
    if threads:
        mine = {rank: output for (rank, _, _), output in zip(split, outputs, strict=True)}

        def work(view: Any) -> None:
            view.reduce_scatter(inputs[view.rank], mine.get(view.rank), split, dim=dim)
            view.all_reduce(sums[view.rank])

        in_threads(comm, ranks, work)
    else:
        comm.reduce_scatter(inputs, outputs, split, dim=dim)
        comm.all_reduce(sums)
    assert all(torch.equal(raw(each), raw(sums[0])) for each in sums)
    close(sums[0], wanted, inputs)
    for output, share in zip(outputs, columns(split, dim, sums[0]), strict=True):
        assert torch.equal(raw(output), raw(share))


@many
@given(splits(), st.integers(1, 3), st.integers(1, 3), st.data())
def test_wrong_widths_are_refused_and_nothing_is_written(
    drawn: tuple[Split, int], dim: int, rows: int, data: st.DataObject
) -> None:
    split, ranks = drawn
    comm = tp_rs.Communicator(["cpu"] * ranks, timeout=20)
    total = split[-1][2] * dim
    parts = [torch.ones(rows, (b - a) * dim) for _, a, b in split]
    # An interval without columns takes any tensor without elements, so the wrong one has some.
    index = data.draw(st.integers(0, len(parts) - 1))
    parts[index] = torch.ones(rows, parts[index].shape[1] + data.draw(st.integers(1, 3)))
    target = torch.zeros(rows, total)
    calls: tuple[Callable[[], None], ...] = (
        lambda: comm.gather(parts, split, target, dim=dim),
        lambda: comm.all_gather(parts, split, [target.clone() for _ in range(ranks)], dim=dim),
        lambda: comm.reduce_scatter([torch.ones(rows, total) for _ in range(ranks)], parts, split, dim=dim),
        lambda: comm.add_residual(parts, [torch.ones(rows, total) for _ in split], split, dim=dim),
    )
    for call in calls:
        try:
            call()
        except tp_rs.InvalidInput as error:
            assert "wanted" in str(error)  # noqa: PT017 - which of the calls it is does not matter
        else:
            raise AssertionError(split, dim, index)
    assert not target.any()
    assert all(bool((part == 1).all()) for part in parts)


def shares(draw: st.DrawFn, total: int, ranks: int, least: list[int] | None = None) -> list[int]:
    least = least or [0] * ranks
    cuts = sorted(draw(st.integers(0, total - sum(least))) for _ in range(ranks - 1))
    widths = np.diff([0, *cuts, total - sum(least)]).tolist()
    return [width + more for width, more in zip(widths, least, strict=True)]


@st.composite
def contexts(draw: st.DrawFn) -> TPContext:
    """The small model over 1 to 8 ranks, all splits at random."""
    ranks = draw(st.integers(1, 8))
    columns = shares(draw, SMALL["intermediate_size"], ranks)
    # Ranks with a part of the MLP have one of the residual stream.
    residual = shares(draw, SMALL["hidden_size"], ranks, [int(width > 0) for width in columns])
    split = {
        "kv": shares(draw, SMALL["num_key_value_heads"], ranks),
        "id": columns,
        "vc": shares(draw, SMALL["vocab_size"], ranks),
        "rs": residual,
    }
    return TPContext(SMALL, [0.1] * ranks, splits=split, timeout=20)


@many
@given(contexts(), st.sampled_from([BROADCAST_KV, BROADCAST_ID, BROADCAST_VC, BROADCAST_RS, BROADCAST_Q]))
def test_contexts_over_random_splits(context: TPContext, kind: int) -> None:
    totals = {
        BROADCAST_KV: 3,
        BROADCAST_ID: SMALL["intermediate_size"],
        BROADCAST_VC: SMALL["vocab_size"],
        BROADCAST_RS: SMALL["hidden_size"],
        BROADCAST_Q: 6,
    }
    with context as ctx:
        split = ctx.get_split(kind)
        assert [start for _, start, _ in split] == [0, *(end for _, _, end in split[:-1])]
        assert split[-1][2] == totals[kind]
        whole = torch.randn(3, totals[kind] * 2)
        parts = columns(split, 2, whole)
        assert torch.equal(ctx.gather(0, parts, kind, 2), whole)
        for target in totals:
            copies = ctx.allgather(1, parts, kind, target, 2)
            assert len(copies) == len(ctx.get_devs(target))
            assert all(torch.equal(copy, whole) for copy in copies)
        inputs = [torch.randn(3, totals[kind] * 2) for _ in ctx.devices]
        wanted = np.sum([exact(part) for part in inputs], axis=0)
        for share, (_, a, b) in zip(ctx.reduce_scatter(inputs, kind, 2), split, strict=True):
            np.testing.assert_allclose(exact(share), wanted[:, a * 2 : b * 2], rtol=1e-4, atol=1e-4)
