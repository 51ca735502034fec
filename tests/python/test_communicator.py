"""The communicator through Python: values against float64 sums, tensors it must refuse, threads, waits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import tp_rs
from tensors import FLOATS, MOVED, assert_sum, in_threads, raw, split_of, values, widths_for

RANKS = list(range(1, 9))


@pytest.fixture(params=RANKS)
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def comm(ranks: int) -> Any:
    return tp_rs.Communicator(["cpu"] * ranks, timeout=20)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_reduce_sums_in_place(comm: Any, ranks: int, dtype: Any) -> None:
    shape = (random.randint(1, 4), random.randint(1, 33))
    tensors = [values(shape, dtype) for _ in range(ranks)]
    parts = [tensor.clone() for tensor in tensors]
    threaded = [tensor.clone() for tensor in tensors]
    comm.all_reduce(tensors)
    for tensor in tensors:
        assert_sum(tensor, parts)
    in_threads(comm, ranks, lambda view: view.all_reduce(threaded[view.rank]))
    assert all(torch.equal(raw(one), raw(other)) for one, other in zip(tensors, threaded, strict=True))


@pytest.mark.parametrize("dtype", FLOATS + MOVED, ids=str)
def test_broadcast_copies(comm: Any, ranks: int, dtype: Any) -> None:
    source = values((2, 3, 7), dtype)
    targets = [torch.empty_like(source) for _ in range(ranks)]
    comm.broadcast(source, targets)
    assert all(torch.equal(raw(target), raw(source)) for target in targets)
    root = random.randrange(ranks)
    theirs = [source.clone() if rank == root else torch.empty_like(source) for rank in range(ranks)]
    in_threads(comm, ranks, lambda view: view.broadcast(theirs[view.rank], root))
    assert all(torch.equal(raw(target), raw(source)) for target in theirs)


@pytest.mark.parametrize("dtype", FLOATS + MOVED, ids=str)
def test_gathers_put_columns_in_their_place(comm: Any, ranks: int, dtype: Any) -> None:
    widths, dim, rows = widths_for(ranks), random.randint(1, 4), random.randint(1, 3)
    split = split_of(widths)
    whole = values((rows, sum(widths) * dim), dtype)
    # Columns of a larger tensor: rows are apart, as in a model's fused outputs.
    parts = [whole[:, a * dim : b * dim] for _, a, b in split]
    target = torch.empty_like(whole)
    comm.gather(parts, split, target, dim=dim)
    assert torch.equal(raw(target), raw(whole))

    targets = [torch.empty_like(whole) for _ in range(ranks)]
    comm.all_gather(parts, split, targets, dim=dim)
    assert all(torch.equal(raw(one), raw(whole)) for one in targets)

    mine = dict(zip([rank for rank, _, _ in split], parts, strict=True))
    last = torch.empty_like(whole)
    for one in targets:
        one.view(torch.uint8).zero_()
    in_threads(
        comm, ranks, lambda view: view.all_gather(mine.get(view.rank), split, targets[view.rank], dim=dim)
    )
    assert all(torch.equal(raw(one), raw(whole)) for one in targets)
    root = ranks - 1
    in_threads(
        comm,
        ranks,
        lambda view: view.gather(
            mine.get(view.rank), split, last if view.rank == root else None, root=root, dim=dim
        ),
    )
    assert torch.equal(raw(last), raw(whole))


def test_only_the_root_of_a_gather_may_have_a_target(comm: Any, ranks: int) -> None:
    split = split_of([2] * ranks)
    refused = []

    def call(view: Any) -> None:
        try:
            view.gather(torch.ones(2), split, torch.empty(2 * ranks), root=0)
        except tp_rs.InvalidInput as error:
            refused.append(str(error))

    in_threads(comm, ranks, call)
    assert len(refused) == (ranks if ranks > 1 else 0)
    wanted = "nothing: rank 0 is the root, which alone gets anything"
    assert all("output of rank 1" in each and wanted in each for each in refused), refused
    whole = torch.empty(2 * ranks)
    in_threads(comm, ranks, lambda view: view.gather(torch.ones(2), split, None if view.rank else whole))
    assert whole.tolist() == [1.0] * (2 * ranks)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reduce_scatter_and_add_residual(comm: Any, ranks: int, dtype: Any) -> None:
    widths, dim, rows = widths_for(ranks), random.randint(1, 4), random.randint(1, 3)
    split = split_of(widths)
    inputs = [values((rows, sum(widths) * dim), dtype) for _ in range(ranks)]
    outputs = [torch.empty((rows, (b - a) * dim), dtype=dtype) for _, a, b in split]
    comm.reduce_scatter(inputs, outputs, split, dim=dim)
    for output, (_, a, b) in zip(outputs, split, strict=True):
        assert_sum(output, [part[:, a * dim : b * dim] for part in inputs])
    again = {rank: torch.empty_like(output) for (rank, _, _), output in zip(split, outputs, strict=True)}
    in_threads(
        comm,
        ranks,
        lambda view: view.reduce_scatter(inputs[view.rank], again.get(view.rank), split, dim=dim),
    )
    for output, other in zip(outputs, again.values(), strict=True):
        assert torch.equal(raw(output), raw(other))

    sources = [inputs[rank] for rank, _, _ in split]
    before = [output.clone() for output in outputs]
    comm.add_residual(outputs, sources, split, dim=dim)
    for rank, target in again.items():
        comm.rank(rank).add_residual(target, inputs[rank], split, dim=dim)
    for output, old, source, (rank, a, b) in zip(outputs, before, sources, split, strict=True):
        assert_sum(output, [old, source[:, a * dim : b * dim]])
        assert torch.equal(raw(output), raw(again[rank]))


def test_ranks_without_a_part_take_none() -> None:
    comm = tp_rs.Communicator(["cpu"] * 3)
    left, right = torch.ones(5), torch.full((5,), 2.0)
    comm.all_reduce([left, None, right])
    assert left.tolist() == right.tolist() == [3.0] * 5
    got = torch.full((5,), float("nan"))
    given = [left, right]

    def work(view: Any) -> None:
        if view.rank == 2:
            view.receive_sum(got)
        else:
            view.all_reduce(given[view.rank])
        view.barrier()

    in_threads(comm, 3, work)
    assert got.tolist() == left.tolist() == [6.0] * 5
    # Nobody has anything: nothing to do. Somebody wants a sum of nothing: refused on every rank.
    comm.all_reduce([torch.empty(0, 4), torch.empty(3, 0), None])

    def receive(view: Any) -> None:
        with pytest.raises(tp_rs.InvalidInput, match="no rank that gives"):
            view.receive_sum(torch.empty(2))

    in_threads(comm, 3, receive)


class Subclass(torch.Tensor):
    pass


class Foreign:
    """A tensor of a type that has no exchange API: it is read by its attributes."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


@pytest.mark.parametrize("wrap", [torch.nn.Parameter, lambda it: it.as_subclass(Subclass), Foreign])
def test_other_kinds_of_tensors(wrap: Any) -> None:
    comm = tp_rs.Communicator(["cpu"] * 2)
    parts = [torch.randn(3, 4), torch.randn(3, 4)]
    wrapped = [wrap(part.clone()) for part in parts]
    with torch.no_grad():
        comm.all_reduce(wrapped)
    assert torch.equal(wrapped[1].data, parts[0] + parts[1])
    whole = torch.randn(2, 3, 8)
    # Three dimensions, rows apart from each other.
    views = [torch.zeros(2, 3, 20)[..., 4:12] for _ in range(2)]
    with torch.no_grad():
        comm.broadcast(whole, [wrap(view) for view in views])
    assert torch.equal(views[1], whole)


def fake() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415 - loads much

    with FakeTensorMode():
        return torch.zeros(2, 2)


REFUSED: dict[str, Any] = {
    "meta": lambda: torch.empty(2, 2, device="meta"),
    "fake": fake,
    "complex": lambda: torch.zeros(2, 2, dtype=torch.complex64),
    "negative": lambda: torch.zeros(1, dtype=torch.complex64).conj().imag,
    "negative column": lambda: torch.zeros(3, dtype=torch.complex64).conj().imag[:, None],
    "sparse": lambda: torch.zeros(2, 2).to_sparse(),
    "transposed": lambda: torch.zeros(2, 3).t(),
    "uneven rows": lambda: torch.zeros(4, 3, 2).transpose(0, 1),
    "int16": lambda: torch.zeros(2, 2, dtype=torch.int16),
    "number": lambda: 3,
    "string": lambda: "cpu",
    "list": lambda: [1.0],
}


@pytest.mark.parametrize("foreign", [False, True], ids=["exchange", "attributes"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused(name: str, foreign: bool) -> None:
    bad = REFUSED[name]()
    comm = tp_rs.Communicator(["cpu"] * 2)
    with pytest.raises(tp_rs.InvalidInput, match=r"tensors\[1\]: got .*wanted") as caught:
        comm.all_reduce([torch.zeros(2, 2), Foreign(bad) if foreign else bad])
    assert "C++" not in str(caught.value)
    assert len(str(caught.value)) < 400
    good = [torch.ones(2), torch.ones(2)]
    comm.all_reduce(good)
    assert good[0].tolist() == [2.0, 2.0]


def test_tensors_that_do_not_fit_together_change_nothing() -> None:
    comm = tp_rs.Communicator(["cpu"] * 2)
    one = torch.ones(4)
    shared = torch.zeros(6)
    for bad in (torch.ones(5), torch.ones(4, dtype=torch.float16), torch.ones(4, dtype=torch.int8), one):
        with pytest.raises(tp_rs.InvalidInput, match="all_reduce"):
            comm.all_reduce([one, bad])
    with pytest.raises(tp_rs.InvalidInput, match="memory"):
        comm.all_reduce([shared[:4], shared[2:]])
    for dtype in MOVED:
        with pytest.raises(tp_rs.InvalidInput, match="float type"):
            comm.all_reduce([torch.ones(4, dtype=dtype), torch.ones(4, dtype=dtype)])
    with pytest.raises(tp_rs.InvalidInput):
        comm.gather([one, one], [(0, 0, 4), (1, 4, 9)], torch.empty(9))
    with pytest.raises(tp_rs.InvalidInput, match="split"):
        comm.gather([one, one], "everything", torch.empty(8))  # type: ignore[arg-type]
    with pytest.raises(tp_rs.InvalidInput, match="dim"):
        comm.gather([one, one], [(0, 0, 4), (1, 4, 8)], torch.empty(8), dim=-1)
    assert one.tolist() == [1.0] * 4
    assert shared.tolist() == [0.0] * 6


@pytest.mark.parametrize(
    "arguments",
    [
        ([],),
        ("cpu",),
        (3,),
        (["cpu", "tpu"],),
        (["cuda:0"],),
        (["cpu"], 0),
        (["cpu"], -1),
        (["cpu"], float("nan")),
    ],
)
def test_what_makes_no_communicator(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(tp_rs.InvalidInput, match="wanted"):
        tp_rs.Communicator(*arguments)
    with pytest.raises(tp_rs.InvalidInput, match="threads"):
        tp_rs.Communicator(["cpu"], threads=0)


def test_devices_may_be_torchs() -> None:
    comm = tp_rs.Communicator([torch.device("cpu"), "cpu"], timeout=1.5)
    assert comm.devices == ["cpu", "cpu"]
    assert comm.timeout == 1.5
    assert (comm.rank(1).rank, comm.rank(1).device) == (1, "cpu")
    for rank in (2, -1):
        with pytest.raises(tp_rs.InvalidInput, match="0 to 1"):
            comm.rank(rank)
