"""Host buffers and scratch memory of a context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tp_rs.checks import checked_dtype, described, invalid, whole
from tp_rs.errors import TPError
from tp_rs.splits import Splits

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from tp_rs import _native
    from tp_rs.scratch import Scratch

__all__ = ["Buffers"]


class Buffers(Splits):
    """What `TPContext` gives out of memory that is its own."""

    pinned_temp: list[torch.Tensor] | None
    _scratch: list[Scratch]

    if TYPE_CHECKING:

        def _live(self, call: str, buffer: int = 0) -> _native.Communicator: ...

    def get_pinned(
        self, buffer: int, batch_size: int, q_len: int, dim: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A view `[batch_size, q_len, dim]` of a host buffer's start, float16 unless said otherwise."""
        self._live("get_pinned", buffer)
        import torch  # noqa: PLC0415

        dtype = torch.float16 if dtype is None else checked_dtype("dtype", dtype)
        return self._pinned("get_pinned", buffer, (batch_size, q_len, dim), dtype)

    def copy_pinned(self, buffer: int, inputs: torch.Tensor) -> torch.Tensor:
        """Copy a tensor into a host buffer, and return the view of it there, of the same shape and dtype."""
        self._live("copy_pinned", buffer)
        import torch  # noqa: PLC0415

        shape, dtype = described("inputs", inputs)
        if inputs.device.type == "meta":
            raise invalid("inputs", "a tensor on meta", "a tensor that has memory")
        if inputs.layout is not torch.strided or inputs.is_nested:
            raise invalid(
                "inputs", f"a tensor of layout {inputs.layout}", "a strided one: call to_dense() on it"
            )
        target = self._pinned("copy_pinned", buffer, shape, dtype)
        target.copy_(inputs.detach())
        return target

    def begin_scratch_alloc_tp(self) -> None:
        """Start over with every rank's scratch memory; slices given out before may be overwritten."""
        self._live("begin_scratch_alloc_tp")
        for scratch in self._scratch:
            scratch.begin()

    def get_scratch_slice_tp(
        self, rows: int, dtype: torch.dtype, broadcast_type: int, dim: int = 1
    ) -> list[torch.Tensor]:
        """Scratch for each rank's own columns of the split."""
        return self._slices("get_scratch_slice_tp", rows, dtype, self._widths(broadcast_type, dim))

    def get_scratch_slice_tp_bc(
        self, rows: int, dtype: torch.dtype, broadcast_type: int, dim: int = 1
    ) -> list[torch.Tensor]:
        """Scratch for the columns of all ranks, on each rank of the split."""
        return self._slices("get_scratch_slice_tp_bc", rows, dtype, self._full_widths(broadcast_type, dim))

    def reserve_scratch(self, scratch: Sequence[int]) -> None:
        """Leave out that many bytes of each rank's scratch, one entry a rank."""
        self._live("reserve_scratch")
        if len(scratch) > self.num_devices:
            raise invalid("scratch", f"{len(scratch)} entries", f"at most {self.num_devices}, one a rank")
        for index, size in enumerate(scratch):
            whole(f"scratch[{index}]", size)
        for place, size in zip(self._scratch, scratch, strict=False):
            place.take(size)

    def _slices(
        self, call: str, rows: int, dtype: torch.dtype, widths: list[tuple[int, int]]
    ) -> list[torch.Tensor]:
        # Before the look at the context: another thread may unload it meanwhile.
        scratch = self._scratch
        self._live(call)
        whole("rows", rows)
        dtype = checked_dtype("dtype", dtype)
        taken = [(scratch[rank].take(rows * width * dtype.itemsize), width) for rank, width in widths]
        return [memory.view(dtype).view(rows, width) for memory, width in taken]

    def _pinned(self, call: str, buffer: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch  # noqa: PLC0415

        size = dtype.itemsize
        for count in shape:
            whole(f"{call}: shape", count)
            size *= count
        memory = self._buffers()[buffer].view(torch.uint8)
        if size > len(memory):
            wanted = f"at most {len(memory)}; pass pinned_bytes={size} to TPContext for larger buffers"
            raise invalid(f"{call}: buffer {buffer}", f"{size} bytes for {list(shape)} of {dtype}", wanted)
        return memory[:size].view(dtype).view(shape)

    def _buffers(self) -> list[torch.Tensor]:
        # Another thread may unload meanwhile.
        buffers = self.pinned_temp
        if buffers is None:
            raise TPError("pinned_temp: the context is not finalized, or was unloaded; call finalize() first")
        return buffers
