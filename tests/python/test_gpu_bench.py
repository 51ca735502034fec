"""The benchmark of GPUs, as far as it goes without one: tables, checks of results, processes that fail."""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from gpus import catalogue as names  # noqa: E402
from gpus import links, report, tune, workers  # noqa: E402
from gpus.data import WrongResultError  # noqa: E402
from gpus.one_process import Work  # noqa: E402

import tp_rs  # noqa: E402

COPIES = {names.COPIES, names.LIMIT, names.BOTH_WAYS}


def result(name: str, rows: int, rounds: list[float], operation: str = names.ALL_REDUCE) -> report.Result:
    mode = names.GRAPH if operation == names.ALL_REDUCE else names.EAGER
    made = report.Result(names.Candidate(operation, mode, names.PEERS, name), rows)
    made.rounds = rounds
    return made


def test_a_table_has_medians_and_ratios_to_ours() -> None:
    failed = result(names.NCCL, 64, [])
    failed.missing = "failed at 64 rows: a reason"
    results = [
        result(names.OURS, 1, [4.0, 3.0, 400.0]),
        result(names.OURS, 64, [6.5]),
        result(names.NCCL, 1, [12.0]),
        failed,
    ]
    (table,) = report.tables(results)
    lines = table.text().splitlines()
    assert lines[0] == "all_reduce, in a graph, peer access, us"
    assert lines[1].split() == ["1", "(16", "KiB)", "64", "(1", "MiB)"]
    assert lines[2].split() == ["tp_rs", "4.00", "6.50"]
    assert lines[3].split() == ["NCCL", "12.0", "(3.00x)", "-"]
    assert lines[4].strip() == "NCCL: not measured: failed at 64 rows: a reason"
    assert "| NCCL | 12.0 (3.00x) | - |" in table.markdown().splitlines()


def test_bandwidths_and_launches() -> None:
    gather = [result(names.OURS, 2048, [1000.0], names.GATHER_HOST)]
    table = report.bandwidths(gather)
    # 32 MiB in a millisecond.
    assert table is not None
    assert table.lines == [["tp_rs, from all ranks", "33.6"]]
    assert report.bandwidths([]) is None
    call = report.Result(names.Candidate(names.CALL, names.HOST, names.PEERS, names.OURS), 1)
    call.rounds = [10.0]
    launches = report.launches([call], {"two_bare_launches_us": 8.0})
    assert launches is not None
    assert launches.lines == [["two bare launches", "8.00", "1.25x"]]
    assert report.launches([call], {}) is None


def test_who_can_take_part() -> None:
    nccl = names.Candidate(names.ALL_REDUCE, names.GRAPH, names.PEERS, names.NCCL, names.RANKS, apart=True)
    assert names.why_not(nccl, ["cuda:0", "cuda:1"]) is None
    assert names.why_not(nccl, ["cuda:0", "cuda:0"]) == "needs a GPU for every rank"
    assert len(set(names.CANDIDATES)) == len(names.CANDIDATES)
    for candidate in names.CANDIDATES:
        assert any(
            other.table() == candidate.table() and other.name == names.OURS for other in names.CANDIDATES
        ), candidate


@pytest.mark.parametrize("operation", names.OPERATIONS)
def test_results_are_right_on_the_host_and_wrong_ones_are_noticed(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(_: object) -> None:
        return None

    monkeypatch.setattr("gpus.timing.synchronize", nothing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    work = Work(operation, 3, ["cpu", "cpu", "cpu"], 5)
    comm: Any = tp_rs.Communicator(["cpu"] * 3)
    work.check(names.OURS, work.ours(comm))
    for candidate in names.CANDIDATES:
        if candidate.operation == operation and candidate.name in COPIES:
            work.check(candidate.name, work.theirs(candidate.name))
    if operation in {names.ALL_REDUCE, names.BROADCAST, names.ALL_GATHER, names.REDUCE_SCATTER}:

        def by_rank() -> None:
            threads = [threading.Thread(target=call) for call in work.ours_by_rank(comm)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        work.check(names.OURS, by_rank)
    if operation != names.CALL:
        with pytest.raises(WrongResultError, match="relative error"):
            work.check("nobody", lambda: None)


def test_a_process_that_fails_is_told_and_not_started_for_ever(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine whose torch finds no GPU")
    group = workers.Group(names.ONE, ["cuda:0", "cuda:0"], tmp_path)
    group.starts = workers.STARTS - 1
    with pytest.raises(workers.FailedError, match="Error"):
        group.measure({})
    assert group.workers == []
    with pytest.raises(workers.FailedError, match="given up"):
        group.measure({})
    group.end()


def test_a_process_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    group = workers.Group(names.RANKS, ["cuda:0", "cuda:1"], tmp_path)
    group.workers = [Sleeper(), Sleeper()]
    processes = [worker.process for worker in group.workers]
    with pytest.raises(workers.FailedError, match=r"no answer in 0 s from process 0, 1"):
        group._answers(0.2)  # noqa: SLF001
    assert all(process.poll() is not None for process in processes)
    group.end()


class Sleeper(workers.Worker):
    def __init__(self) -> None:
        with Path("/dev/null").open("ab") as log:
            super().__init__({}, {}, log, [sys.executable, "-c", "import time; time.sleep(600)"])


def test_the_tuner_finds_where_algorithms_cross_and_the_best_value() -> None:
    pushed = {1: 3.0, 8: 4.0, 64: 8.0, 128: 16.0}
    divided = {1: 9.0, 8: 9.0, 64: 9.0, 128: 12.0}
    assert tune.crossing(pushed, divided) == 64 * names.COLUMNS * 2
    assert tune.crossing(divided, pushed) == 0
    assert tune.best({1 << 20: pushed, 0: divided}) == 1 << 20
    text = tune.table(tune.KNOBS[0], "proved", {None: pushed, 0: divided}).text()
    assert "as chosen" in text
    assert tune.knob_of("pushed_below=0,4096").values == (None, 0, 4096)
    for wrong in ("pushed_below", "=1", "a b=1", "pushed_below=x"):
        with pytest.raises(argparse.ArgumentTypeError, match="wanted NAME=NUMBER"):
            tune.knob_of(wrong)


def test_a_table_of_links() -> None:
    found = {8: {"copy engines": {"us": 31.25}}, 32: {"copy engines": {"us": 104.0}}}
    assert links.table(found).lines == [["copy engines", "31.2", "104"]]
    assert links.parse([]).mib == [8, 32]
    for wrong in ("0", "-1", "eight", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="wanted a whole number from 1 on"):
            links.positive(wrong)
