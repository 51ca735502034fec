"""`TPContext`: a model's splits, and the calls that move its tensors between ranks.

Names, order of arguments and meaning are those of the class of the same name in ExLlamaV2 (`tensor_p.py`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from tp_rs import _native
from tp_rs import rope as rotation
from tp_rs.buffers import Buffers
from tp_rs.checks import checked_dtype, described, first, invalid, same_model, whole
from tp_rs.errors import TPError
from tp_rs.plan import plan as make_plan
from tp_rs.scratch import Scratch
from tp_rs.splits import total

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    import torch
    from typing_extensions import Self

__all__ = ["TPContext"]

_log = logging.getLogger("tp_rs")

_BUFFERS = 2
_CACHES = {
    "ExLlamaV2Cache_8bit": "8bit",
    "ExLlamaV2Cache_Q8": "q8",
    "ExLlamaV2Cache_Q6": "q6",
    "ExLlamaV2Cache_Q4": "q4",
}


class TPContext(Buffers):
    """A model divided over ranks of this process.

    Ranks take the place of the reference's device numbers: `all_devs`, `*_split_devs` and the first number of
    every interval name ranks, and `devices` tells where each one is. Lists of tensors that belong to a split
    have one tensor for each of its intervals; `streams`, sizes of scratch and tables have one entry a rank.

    A with-block finalizes on entry and unloads at its end.

    Attributes:
        plan: The plan that the splits come from.
        kv_split: KV heads, as (rank, first, one past the last); likewise `id_split` (intermediate columns),
            `vc_split` (vocabulary rows), `rs_split` (columns of the residual stream) and `q_split`
            (query heads).
        kv_split_devs: The ranks of `kv_split`; likewise for the others.
        all_devs: Ranks that hold something.
        device: The first of them.
        num_devices: One past the last of them.
        devices: The device of every rank.
        pinned_temp: Two float16 buffers in host memory, while finalized.
        streams: The handle of a stream a rank that is the context's own, 0 on host memory, while
            finalized. Work goes there with `streams="own"`.
        ext_tp_context: A number other than 0 while native state lives, else None.
        sin: What `get_sin_cos` made; likewise `cos`.
    """

    def __init__(
        self,
        model: object,
        gpu_split: Iterable[float] | None = None,
        expect_cache_tokens: int = 0,
        expect_cache_base: type | None = None,
        *,
        plan: _native.Plan | None = None,
        devices: Iterable[object] | None = None,
        context: int | Literal["max"] | None = None,
        timeout: float = 30.0,
        pinned_bytes: int | None = None,
        streams: Iterable[object] | Literal["own"] | None = None,
        peers: Literal["proved", "staged"] = "proved",
        rope: Mapping[str, Any] | None = None,
        force: bool = False,
        **options: Any,
    ) -> None:
        """Divide `model`; nothing is allocated before `finalize`.

        Args:
            model: What `tp_rs.plan` takes, or a `Plan`.
            gpu_split: GiB a rank; None for what is free.
            expect_cache_tokens: Tokens of all sequences together that the cache must hold; 0 leaves it to
                `context`, or with `strategy="exllamav2"` to the model's `max_seq_len * max_batch_size`.
            expect_cache_base: ExLlamaV2's cache class; tells how keys and values are stored.
            plan: A plan made before, in place of `gpu_split`, the cache's size, `context` and `options`.
            devices: The device of every rank. Left out, rank i is `cuda:i`, and "cpu" where no GPU is.
            context: Tokens a sequence, as for `tp_rs.plan`.
            timeout: Seconds that a rank waits for the others.
            pinned_bytes: Bytes of each of both host buffers; None for the plan's `buffer_bytes`: a chunk of
                the residual stream or of attention's output in the model's dtype, or one position's logits a
                sequence in float32.
            streams: Where work on GPUs is queued: a stream or handle a rank, "own" for the context's own
                (`streams` then says which), None for the current stream of each rank's device at each call.
            peers: "staged" sends all data between GPUs through host memory, as if no two had peer access.
            rope: Fields of a config.json that say how positions are rotated, where the model lacks them.
            force: Whether to go on with a plan that does not fit.
            options: More for `tp_rs.plan`: `batch`, `chunk`, `cache`, `strategy`, `splits` and so on.

        Raises:
            DoesNotFit: The plan exceeds a rank's budget and `force` is not set.
            InvalidInput: An argument cannot be used, or `plan` is for another model.
        """
        if isinstance(model, _native.Plan):
            if plan is not None:
                raise invalid("plan", "a plan beside a model that is one", "only one of them")
            plan = model
        elif plan is not None:
            same_model(plan, model)
        if plan is not None:
            beside = {
                "gpu_split": gpu_split,
                "expect_cache_tokens": expect_cache_tokens or None,
                "expect_cache_base": expect_cache_base,
                "context": context,
                **options,
            }
            given = [name for name, value in beside.items() if value is not None]
            if given:
                raise invalid(given[0], "it beside a plan", "one of them: the plan was made with its own")
        self.model = model
        self.sin: list[torch.Tensor] | None = None
        self.cos: list[torch.Tensor] | None = None
        self.pinned_temp: list[torch.Tensor] | None = None
        self.streams: list[int] | None = None
        self.ext_tp_context: int | None = None
        self._devices = None if devices is None else list(devices)
        self._context = context
        self._timeout = timeout
        self._pinned_bytes = pinned_bytes
        self._streams = streams
        self._peers: Literal["proved", "staged"] = peers
        self._rope = rotation.checked(rope)
        self._force = force
        self._options = options
        self._communicator: _native.Communicator | None = None
        self._scratch: list[Scratch] = []
        self._unloaded = False
        if plan is None:
            self.define_split(gpu_split, expect_cache_tokens, expect_cache_base)
        else:
            self._use(plan)

    def define_split(
        self,
        gpu_split: Iterable[float] | None,
        expect_cache_tokens: int = 0,
        expect_cache_base: type | None = None,
    ) -> None:
        """Plan anew; arguments as for the class."""
        if self.ext_tp_context is not None:
            raise TPError("define_split: the context is finalized; call unload() first")
        if isinstance(self.model, _native.Plan):
            raise invalid("model", "a plan", "a model: a plan's splits stay as they are")
        budgets = None if gpu_split is None else list(gpu_split)
        options = dict(self._options)
        if expect_cache_base is not None:
            if not isinstance(expect_cache_base, type):
                raise invalid("expect_cache_base", repr(expect_cache_base), "a class of ExLlamaV2's caches")
            options.setdefault("cache", _CACHES.get(expect_cache_base.__name__, "fp16"))
        context = self._context
        config = getattr(self.model, "config", self.model)
        if (
            not expect_cache_tokens
            and options.get("strategy") == "exllamav2"
            and hasattr(config, "max_seq_len")
        ):
            # What the reference takes for granted.
            expect_cache_tokens = config.max_seq_len * getattr(config, "max_batch_size", 1)
        if context is None and expect_cache_tokens:
            context = -(-expect_cache_tokens // max(1, options.get("batch", 1)))
        devices = self._devices
        if devices is None and budgets is not None and not _native.cuda_devices():
            devices = ["cpu"] * len(budgets)
        self._use(make_plan(self.model, budgets, devices=devices, context=context, **options))

    def _use(self, plan: _native.Plan) -> None:
        if not self._force:
            plan.require_fit()
        devices = [rank.device for rank in plan.ranks] if self._devices is None else self._devices
        if len(devices) != len(plan.ranks):
            raise invalid("devices", f"{len(devices)} entries", f"{len(plan.ranks)}, one a rank of the plan")
        if (
            self._devices is None
            and any(device != "cpu" for device in devices)
            and not _native.cuda_devices()
        ):
            _log.info("no GPU here: putting the plan's ranks on host memory instead of %s", devices)
            devices = ["cpu"] * len(devices)
        self._divide(plan, devices)

    def finalize(self) -> None:
        """Make the communicator and the host buffers. Does nothing if that is done."""
        if self.ext_tp_context is not None:
            return
        import torch  # noqa: PLC0415 - the package works without torch until tensors are wanted

        communicator = _native.Communicator(
            self.devices, self._timeout, streams=self._streams, peers=self._peers
        )
        pinned = any(device != "cpu" for device in self.devices)
        elements = -(-self._buffer_bytes() // torch.float16.itemsize)
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.pinned_temp = [
                torch.empty(elements, dtype=torch.float16, pin_memory=pinned) for _ in range(_BUFFERS)
            ]
        _log.info("%d host buffers of %d bytes each", _BUFFERS, elements * torch.float16.itemsize)
        self._scratch = [Scratch(device) for device in self.devices[: self.num_devices]]
        self.streams = communicator.streams[: self.num_devices]
        self._communicator = communicator
        self.ext_tp_context = id(communicator)
        self._unloaded = False

    def unload(self) -> None:
        """Give everything back; ranks that wait are woken with an error. May be called again.

        What devices use for more than a tenth of a second yet is given back when they are done.
        """
        communicator = self._communicator
        # First: a call in another thread that finds no communicator says why.
        self._unloaded |= communicator is not None
        self._communicator = self.ext_tp_context = None
        if communicator is not None:
            communicator.abort("the context was unloaded")
        self.pinned_temp = self.streams = self.sin = self.cos = None
        self._scratch = []

    def __enter__(self) -> Self:
        self.finalize()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unload()

    def __repr__(self) -> str:
        state = "finalized" if self.ext_tp_context is not None else "not finalized"
        return f"TPContext({self.plan.model.name!r}, devices={self.devices}, {state})"

    @property
    def communicator(self) -> _native.Communicator:
        """The communicator, while finalized."""
        return self._live("communicator")

    def rank(self, rank: int) -> _native.RankView:
        """The communicator from the point of view of one rank, for a thread of its own."""
        return self._live("rank").rank(rank)

    def broadcast(
        self, buffer: int, input_tensor: torch.Tensor, broadcast_type: int, dim: int = 1
    ) -> list[torch.Tensor]:
        """A copy of the whole of `input_tensor` for each rank of the split, whatever `dim` is."""
        del dim
        communicator = self._live("broadcast", buffer)
        shape, dtype = described("input_tensor", input_tensor)
        outputs = [self._empty(rank, shape, dtype) for rank in self.get_devs(broadcast_type)]
        communicator.broadcast(input_tensor, outputs)
        return outputs

    def gather(
        self,
        buffer: int,
        inputs: Sequence[torch.Tensor],
        broadcast_type: int,
        dim: int = 1,
        *,
        non_blocking: bool = False,
    ) -> torch.Tensor:
        """The parts side by side, in host memory: complete on return, or after `wait_streams`.

        The result is a view of `pinned_temp[buffer]`: the next call with that buffer overwrites it.
        """
        communicator = self._live("gather", buffer)
        split = self.get_split(broadcast_type)
        shape, dtype = first("inputs", inputs)
        target = self._pinned("gather", buffer, (*shape[:-1], total(split) * whole("dim", dim)), dtype)
        communicator.gather(inputs, split, target, dim=dim, non_blocking=non_blocking)
        return target

    def allgather(
        self,
        buffer: int,
        inputs: Sequence[torch.Tensor],
        broadcast_type_g: int,
        broadcast_type_b: int,
        dim: int = 1,
    ) -> list[torch.Tensor]:
        """The parts of the first split side by side, for each rank of the second."""
        communicator = self._live("allgather", buffer)
        split, target_split = self.get_split(broadcast_type_g), self.get_split(broadcast_type_b)
        shape, dtype = first("inputs", inputs)
        shape = (*shape[:-1], total(split) * whole("dim", dim))
        outputs = [self._empty(rank, shape, dtype) for rank, _, _ in target_split]
        communicator.all_gather(inputs, split, outputs, target_split, dim=dim)
        return outputs

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Turn every tensor into the sum of all, in place, and return them."""
        self._live("all_reduce").all_reduce(tensors)
        return tensors

    def reduce_scatter(
        self, inputs: Sequence[torch.Tensor], broadcast_type: int, dim: int = 1
    ) -> list[torch.Tensor]:
        """The sum of all inputs, of which each rank of the split gets its own columns."""
        communicator = self._live("reduce_scatter")
        split = self.get_split(broadcast_type)
        shape, dtype = first("inputs", inputs)
        outputs = [
            self._empty(rank, (*shape[:-1], (b - a) * whole("dim", dim)), dtype) for rank, a, b in split
        ]
        communicator.reduce_scatter(inputs, outputs, split, dim=dim)
        return outputs

    def add_residual(
        self,
        target: Sequence[torch.Tensor],
        source: Sequence[torch.Tensor],
        broadcast_type: int,
        dim: int = 1,
    ) -> None:
        """Add to every target its interval's columns of the source of the same rank."""
        split = self.get_split(broadcast_type)
        self._live("add_residual").add_residual(target, source, split, dim=dim)

    def wait_streams(self) -> None:
        """Wait for all work of all ranks. Work on host memory is done when its call returns.

        Raises:
            CollectiveTimeout: A rank did not come to an operation before.
            CudaError: A device failed.
        """
        self._live("wait_streams").wait()

    def check(self) -> None:
        """Raise what went wrong in operations so far, without waiting for those that run."""
        self._live("check").check()

    def reset(self) -> None:
        """Go on after a failed operation, once no rank is in a call; see `Communicator.reset`."""
        self._live("reset").reset()

    @property
    def torch_streams(self) -> list[torch.cuda.Stream | None]:
        """The context's own streams as torch's, None for ranks on host memory, while finalized."""
        self._live("torch_streams")
        import torch  # noqa: PLC0415

        return [
            torch.cuda.ExternalStream(handle, device=device)  # type: ignore[no-untyped-call]
            if device != "cpu"
            else None
            for handle, device in zip(self.streams or [], self.devices, strict=False)
        ]

    def get_sin_cos(self, dtype: torch.dtype | None = None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tables of the rotary embedding, `[sets, 1, tokens, columns]` a rank, float16 unless said otherwise.

        They come from the model's device contexts where it has them, else from its rotary parameters (in the
        configuration, the GGUF header or the plan) with `rope=` over them. A rank without a part of the model
        gets an empty meta tensor. Ranks on one device share one table.

        Raises:
            InvalidInput: The parameters are nowhere, or not usable.
        """
        self._live("get_sin_cos")
        import torch  # noqa: PLC0415

        dtype = torch.float16 if dtype is None else checked_dtype("dtype", dtype)
        if not dtype.is_floating_point:
            raise invalid("dtype", str(dtype), "a floating one: the tables hold numbers from -1 to 1")
        if self.sin is not None and self.cos is not None and self.sin[self.device].dtype == dtype:
            return self.sin, self.cos
        none = torch.empty(0, device="meta")
        sin, cos = [none] * self.num_devices, [none] * self.num_devices
        contexts = getattr(self.model, "get_device_context", None)
        if callable(contexts):
            for rank in self.all_devs:
                held = contexts(rank)
                sin[rank], cos[rank] = (torch.cat(part, 0).to(dtype) for part in (held.sin, held.cos))
        else:
            settings = rotation.merged(rotation.settings_of(self.model, self.plan), self._rope)
            made = rotation.tables(settings, self.plan.context)
            shared: dict[str, list[torch.Tensor]] = {}
            for rank in self.all_devs:
                device = self.devices[rank]
                if device not in shared:
                    shared[device] = [table.to(device=device, dtype=dtype) for table in made]
                sin[rank], cos[rank] = shared[device]
        self.sin, self.cos = sin, cos
        return sin, cos

    def _buffer_bytes(self) -> int:
        if self._pinned_bytes is not None:
            return whole("pinned_bytes", self._pinned_bytes)
        return self.plan.buffer_bytes

    def _live(self, call: str, buffer: int = 0) -> _native.Communicator:
        # Another thread may unload meanwhile.
        communicator = self._communicator
        if communicator is None:
            state = "was unloaded; call finalize() to use it again"
            raise TPError(f"{call}: the context {state if self._unloaded else 'needs finalize() first'}")
        if type(buffer) is not int or not 0 <= buffer < _BUFFERS:
            raise invalid("buffer", repr(buffer), f"0 to {_BUFFERS - 1}")
        return communicator
