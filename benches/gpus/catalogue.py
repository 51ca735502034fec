"""What is measured: operations, who does them and how, and in which table each figure stands."""

from __future__ import annotations

from typing import NamedTuple

COLUMNS = 8192
ROWS = (1, 8, 64, 128, 512, 2048)
# Where the time of a call no longer counts.
MORE_ROWS = (*ROWS, 8192)

OURS = "tp_rs"
OURS_APART = "tp_rs, a stream a rank"
OURS_TOGETHER = "tp_rs, one graph for all ranks"
ONE = "one process"
RANKS = "a process a rank"
RANKS_OFF = "a process a rank, peer access off"

GRAPH = "in a graph"
EAGER = "eager"
HOST = "host time"

PEERS = "peer access"
STAGED = "peer access off"

ALL_REDUCE = "all_reduce"
BROADCAST = "broadcast"
ALL_GATHER = "all_gather"
REDUCE_SCATTER = "reduce_scatter"
GATHER_GPU = "gather to a GPU"
GATHER_HOST = "gather to pinned host memory"
GATHER_ONE = "gather to pinned host memory, from one GPU"
CALL = "call from Python"

ONE_SHOT = "symmetric memory, one-shot (bf16)"
TWO_SHOT = "symmetric memory, two-shot (bf16)"
TORCH_NCCL = "torch.cuda.nccl"
TORCH_COMM = "torch.cuda.comm"
REDUCE_ADD = "torch.cuda.comm.reduce_add (one GPU gets it)"
SCATTER = "torch.cuda.comm.scatter (a part each)"
TORCH_ADD = "one torch operation on each GPU"
COPIES = "torch copies"
LIMIT = "plain copies to pinned memory"
BOTH_WAYS = "plain copies to pinned memory and back at once (no sum)"
NCCL = "NCCL"


class Candidate(NamedTuple):
    """Someone who does an operation."""

    operation: str
    mode: str
    access: str
    name: str
    group: str = ONE
    # Distinct GPUs, one for every rank.
    apart: bool = False
    # Several ranks of one GPU only.
    together: bool = False

    def table(self) -> tuple[str, str, str]:
        """Figures of one table are compared with each other."""
        return (self.operation, self.mode, self.access)


def _collective(operation: str, torch_names: tuple[str, ...]) -> list[Candidate]:
    """Ours and NCCL with and without peer access, in a graph and eager, and what torch has in one process."""
    found = [
        Candidate(operation, GRAPH, PEERS, OURS),
        Candidate(operation, GRAPH, PEERS, NCCL, RANKS, apart=True),
        Candidate(operation, EAGER, PEERS, OURS),
        Candidate(operation, EAGER, PEERS, NCCL, RANKS, apart=True),
    ]
    found += [Candidate(operation, EAGER, PEERS, name, apart=name != COPIES) for name in torch_names]
    found += [
        Candidate(operation, GRAPH, STAGED, OURS),
        Candidate(operation, GRAPH, STAGED, NCCL, RANKS_OFF, apart=True),
        Candidate(operation, EAGER, STAGED, OURS),
        Candidate(operation, EAGER, STAGED, NCCL, RANKS_OFF, apart=True),
    ]
    return found


CANDIDATES: tuple[Candidate, ...] = (
    *_collective(ALL_REDUCE, (TORCH_NCCL, TORCH_COMM, REDUCE_ADD)),
    Candidate(ALL_REDUCE, GRAPH, PEERS, ONE_SHOT, RANKS, apart=True),
    Candidate(ALL_REDUCE, GRAPH, PEERS, TWO_SHOT, RANKS, apart=True),
    Candidate(ALL_REDUCE, GRAPH, PEERS, OURS_TOGETHER, together=True),
    Candidate(ALL_REDUCE, EAGER, STAGED, BOTH_WAYS),
    Candidate(CALL, HOST, PEERS, OURS),
    Candidate(CALL, HOST, PEERS, OURS_APART),
    Candidate(CALL, HOST, PEERS, TORCH_ADD),
    Candidate(CALL, HOST, PEERS, TORCH_NCCL, apart=True),
    Candidate(CALL, HOST, STAGED, OURS),
    Candidate(GATHER_HOST, EAGER, PEERS, OURS),
    Candidate(GATHER_HOST, EAGER, PEERS, LIMIT),
    Candidate(GATHER_ONE, EAGER, PEERS, OURS),
    Candidate(GATHER_ONE, EAGER, PEERS, LIMIT),
    Candidate(GATHER_GPU, EAGER, PEERS, OURS),
    Candidate(GATHER_GPU, EAGER, PEERS, TORCH_COMM, apart=True),
    *_collective(BROADCAST, (TORCH_NCCL, TORCH_COMM, SCATTER, COPIES)),
    *_collective(ALL_GATHER, (TORCH_NCCL, COPIES)),
    *_collective(REDUCE_SCATTER, (TORCH_NCCL,)),
)
OPERATIONS = tuple(dict.fromkeys(candidate.operation for candidate in CANDIDATES))


def rows_of(operation: str) -> tuple[int, ...]:
    """The sizes at which an operation is measured."""
    if operation == CALL:
        return (1,)
    return MORE_ROWS if operation in {GATHER_HOST, GATHER_ONE} else ROWS


def why_not(candidate: Candidate, devices: list[str]) -> str | None:
    """Why a candidate cannot take part with ranks on these devices, or None."""
    apart = len(set(devices)) == len(devices)
    if candidate.apart and not apart:
        return "needs a GPU for every rank"
    if candidate.apart and len(devices) < 2:  # noqa: PLR2004  one rank has no peer
        return "needs two ranks"
    if candidate.together and len(set(devices)) != 1:
        return "only where all ranks are on one GPU"
    return None
