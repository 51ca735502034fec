"""A plan's splits under the names of ExLlamaV2's context, and tensors of the widths that they give."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tp_rs.checks import invalid, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from tp_rs._native import Plan

__all__ = ["Split", "Splits", "total"]

Split = list[tuple[int, int, int]]

_NAMES = ("BROADCAST_KV", "BROADCAST_ID", "BROADCAST_VC", "BROADCAST_RS", "BROADCAST_Q")


def total(split: Split) -> int:
    """Units of all ranks."""
    return split[-1][2] if split else 0


class Splits:
    """The splits of a plan; `TPContext` tells what each attribute is."""

    plan: Plan
    devices: list[str]
    device: int
    num_devices: int
    kv_split: Split
    id_split: Split
    vc_split: Split
    rs_split: Split
    q_split: Split
    kv_split_devs: list[int]
    id_split_devs: list[int]
    vc_split_devs: list[int]
    rs_split_devs: list[int]
    q_split_devs: list[int]
    all_devs: list[int]

    def _divide(self, plan: Plan, devices: Sequence[object]) -> None:
        self.plan = plan
        self.devices = [str(device) for device in devices]
        for name in ("kv", "id", "vc", "rs", "q"):
            split = list(getattr(plan, f"{name}_split"))
            setattr(self, f"{name}_split", split)
            setattr(self, f"{name}_split_devs", [rank for rank, _, _ in split])
        self._splits = (self.kv_split, self.id_split, self.vc_split, self.rs_split, self.q_split)
        self.all_devs = self.all_devices()
        self.device = self.all_devs[0]
        self.num_devices = self.all_devs[-1] + 1

    def all_devices(self) -> list[int]:
        """Ranks that hold a part of any split, ascending."""
        ranks = sorted({rank for split in self._splits for rank, _, _ in split})
        if not ranks:
            raise invalid("plan", "no rank with a part of the model", "at least one")
        return ranks

    def get_split(self, broadcast_type: int) -> Split:
        """The split of one of the `BROADCAST_*` constants."""
        # A bool is an int to Python, and negative numbers would index from the end.
        if type(broadcast_type) is not int or not 0 <= broadcast_type < len(_NAMES):
            wanted = ", ".join(f"{name} ({number})" for number, name in enumerate(_NAMES))
            raise invalid("broadcast_type", repr(broadcast_type), f"one of {wanted}")
        return self._splits[broadcast_type]

    def get_devs(self, broadcast_type: int) -> list[int]:
        """The ranks of a split."""
        return [rank for rank, _, _ in self.get_split(broadcast_type)]

    def get_temp_tensors(
        self, rows: int, dtype: torch.dtype, broadcast_type: int, dim: int = 1
    ) -> list[torch.Tensor]:
        """New tensors for each rank's own columns of the split."""
        whole("rows", rows)
        widths = self._widths(broadcast_type, dim)
        return [self._empty(rank, (rows, width), dtype) for rank, width in widths]

    def get_temp_tensors_bc(
        self, rows: int, dtype: torch.dtype, broadcast_type: int, dim: int = 1
    ) -> list[torch.Tensor]:
        """New tensors for the columns of all ranks, on each rank of the split."""
        whole("rows", rows)
        widths = self._full_widths(broadcast_type, dim)
        return [self._empty(rank, (rows, width), dtype) for rank, width in widths]

    def get_temp_tensors_s(self, rows: int, esize: int, broadcast_type: int, dim: int = 1) -> list[int]:
        """Bytes of `get_temp_tensors`, one entry a rank; `esize` is in bytes."""
        return self._sizes(rows, esize, self._widths(broadcast_type, dim))

    def get_temp_tensors_bc_s(self, rows: int, esize: int, broadcast_type: int, dim: int = 1) -> list[int]:
        """Bytes of `get_temp_tensors_bc`, one entry a rank; `esize` is in bytes."""
        return self._sizes(rows, esize, self._full_widths(broadcast_type, dim))

    def _widths(self, broadcast_type: int, dim: int) -> list[tuple[int, int]]:
        whole("dim", dim)
        return [(rank, (end - start) * dim) for rank, start, end in self.get_split(broadcast_type)]

    def _full_widths(self, broadcast_type: int, dim: int) -> list[tuple[int, int]]:
        whole("dim", dim)
        split = self.get_split(broadcast_type)
        return [(rank, total(split) * dim) for rank, _, _ in split]

    def _sizes(self, rows: int, esize: int, widths: list[tuple[int, int]]) -> list[int]:
        whole("rows", rows)
        whole("esize", esize)
        sizes = [0] * self.num_devices
        for rank, width in widths:
            sizes[rank] = rows * width * esize
        return sizes

    def _empty(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch  # noqa: PLC0415

        return torch.empty(shape, dtype=dtype, device=self.devices[rank])
