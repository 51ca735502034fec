"""Arguments that cannot be used are named before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tp_rs
from contexts import SMALL, make
from tp_rs import BROADCAST_KV, Communicator, TPContext

PLAN = tp_rs.plan(SMALL, [0.1, 0.1], devices=["cpu", "cpu"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"plan": PLAN, "gpu_split": [5, 5]}, "gpu_split"),
        ({"plan": PLAN, "context": 5}, "context"),
        ({"plan": PLAN, "expect_cache_tokens": 5}, "expect_cache_tokens"),
        ({"plan": PLAN, "batch": 5}, "batch"),
        ({"plan": "x"}, "plan: got a str"),
        ({"plan": PLAN.to_dict()}, "plan: got a dict"),
        ({"gpu_split": [0.1, 0.1], "expect_cache_base": "x"}, "expect_cache_base"),
    ],
    ids=str,
)
def test_contexts(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(tp_rs.InvalidInput, match=named):
        TPContext(SMALL, **arguments)


def test_a_plan_as_the_model_takes_nothing_beside_it() -> None:
    with pytest.raises(tp_rs.InvalidInput, match="typo: got it beside a plan"):
        TPContext(PLAN, typo=3)
    assert TPContext(PLAN, timeout=3.0).plan is PLAN


@pytest.mark.parametrize(
    "call",
    [
        lambda ctx: ctx.get_pinned(0, 1, 1, 4, dtype="float16"),
        lambda ctx: ctx.get_scratch_slice_tp(2, None, BROADCAST_KV),
        lambda ctx: ctx.get_scratch_slice_tp_bc(2, "x", BROADCAST_KV),
        lambda ctx: ctx.get_sin_cos(torch.int8),
        lambda ctx: ctx.get_sin_cos("float32"),
        lambda ctx: ctx.copy_pinned(0, torch.eye(3).to_sparse()),
    ],
)
def test_calls_of_a_context(call: Callable[[Any], Any]) -> None:
    with make("3") as ctx:
        with pytest.raises(tp_rs.InvalidInput, match="wanted"):
            call(ctx)
        assert ctx.get_sin_cos(torch.bfloat16)[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize("number", [2, -1, 2**70, 1.0, "0", True, None])
def test_ranks_that_are_none(number: Any) -> None:
    comm = Communicator(["cpu", "cpu"], timeout=20.0)
    with pytest.raises(tp_rs.InvalidInput, match=r"rank: got .*wanted 0 to 1"):
        comm.rank(number)
    view = comm.rank(0)
    with pytest.raises(tp_rs.InvalidInput, match="root: got"):
        view.broadcast(torch.zeros(3), root=number)
    with pytest.raises(tp_rs.InvalidInput, match="root: got"):
        view.gather(torch.zeros(3), [(0, 0, 3)], torch.zeros(3), root=number)
    # Waiting for the other rank would have stopped it.
    comm.check()
    tensors = [torch.ones(3), torch.ones(3)]
    comm.all_reduce(tensors)
    assert tensors[0].tolist() == [2.0] * 3


def test_planning() -> None:
    with pytest.raises(tp_rs.InvalidInput, match="duplicate_kv: got 'x', wanted True or False"):
        tp_rs.plan(SMALL, [0.1], devices=["cpu"], duplicate_kv="x")  # type: ignore[arg-type]
    with pytest.raises(tp_rs.InvalidInput, match="gpu_split: got tensor"):
        tp_rs.plan(SMALL, torch.tensor(1.0), devices=["cpu"])


class Writes:
    """Every call that writes a tensor, given one that requires grad."""

    @staticmethod
    def list_calls(comm: Communicator, tensor: torch.Tensor) -> list[Callable[[], None]]:
        other, split = torch.ones(4), [(0, 0, 2), (1, 2, 4)]
        halves = [torch.ones(2), torch.ones(2)]
        return [
            lambda: comm.all_reduce([other, tensor]),
            lambda: comm.broadcast(other, [tensor, other.clone()]),
            lambda: comm.gather(halves, split, tensor),
            lambda: comm.all_gather(halves, split, [other, tensor]),
            lambda: comm.reduce_scatter([other, other.clone()], [halves[0], tensor[:2]], split),
            lambda: comm.add_residual([tensor[:2], halves[0]], [other, other.clone()], split),
        ]

    @staticmethod
    def rank_calls(comm: Communicator, tensor: torch.Tensor) -> list[Callable[[], None]]:
        view, other, split = comm.rank(0), torch.ones(4), [(0, 0, 2), (1, 2, 4)]
        return [
            lambda: view.all_reduce(tensor),
            lambda: view.receive_sum(tensor),
            lambda: view.broadcast(tensor, root=1),
            lambda: view.gather(torch.ones(2), split, tensor, root=0),
            lambda: view.all_gather(torch.ones(2), split, tensor),
            lambda: view.reduce_scatter(other, tensor[:2], split),
            lambda: view.add_residual(tensor[:2], other, split),
        ]


@pytest.mark.parametrize("leaf", [True, False])
def test_tensors_whose_gradients_are_recorded_are_not_written(*, leaf: bool) -> None:
    comm = Communicator(["cpu", "cpu"], timeout=20.0)
    given = torch.ones(4, requires_grad=True)
    tensor = given if leaf else given.exp()
    before = tensor.detach().clone()
    for call in [*Writes.list_calls(comm, tensor), *Writes.rank_calls(comm, tensor)]:
        with pytest.raises(tp_rs.InvalidInput, match="requires grad"):
            call()
    assert torch.equal(tensor.detach(), before)
    comm.check()
    # What is only read may be recorded, and without recording all may be written.
    read = [torch.zeros(4), torch.zeros(4)]
    comm.broadcast(tensor, read)
    assert torch.equal(read[1], before)
    with torch.no_grad():
        for call in Writes.list_calls(comm, tensor):
            call()
