from __future__ import annotations

import sys
import types

import pytest

import tp_rs
from tp_rs import _native, devices

GIB = 1 << 30


class TestDevices:
    """Against a machine that the test makes up: devices are the one thing that CI's machine does not have."""

    @pytest.fixture
    def gpus(self, monkeypatch: pytest.MonkeyPatch) -> list[types.SimpleNamespace]:
        found = [
            types.SimpleNamespace(index=0, free_bytes=20 * GIB, total_bytes=24 * GIB, bandwidth_gb_s=936.0),
            types.SimpleNamespace(index=1, free_bytes=10 * GIB, total_bytes=12 * GIB, bandwidth_gb_s=504.0),
        ]
        monkeypatch.setattr(_native, "cuda_devices", lambda: found)
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        return found

    @pytest.fixture
    def no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_native, "cuda_devices", list)
        monkeypatch.delitem(sys.modules, "torch", raising=False)

    @pytest.mark.usefixtures("gpus")
    def test_left_out_every_gpu_gives_what_is_free_and_its_bandwidth(self) -> None:
        assert devices.resolve() == [("cuda:0", 20.0, 936.0), ("cuda:1", 10.0, 504.0)]

    @pytest.mark.usefixtures("gpus")
    def test_ranks_that_share_a_device_share_its_memory(self) -> None:
        got = devices.resolve(devices=["cuda:1", "cuda", 1])
        assert got == [("cuda:1", 5.0, 252.0), ("cuda:0", 20.0, 936.0), ("cuda:1", 5.0, 252.0)]

    @pytest.mark.usefixtures("gpus")
    def test_budgets_and_speeds_that_are_given_stand(self) -> None:
        assert devices.resolve([8, 4], speeds=[2, 1]) == [("cuda:0", 8.0, 2.0), ("cuda:1", 4.0, 1.0)]
        assert devices.resolve([8]) == [("cuda:0", 8.0, 936.0)]

    @pytest.mark.usefixtures("gpus")
    def test_more_budgets_than_gpus_and_unknown_gpus_are_refused(self) -> None:
        with pytest.raises(tp_rs.InvalidInput, match="gpu_split: got 3 entries, wanted at most 2"):
            devices.resolve([1, 1, 1])
        with pytest.raises(tp_rs.InvalidInput, match=r"devices\[1\]: got 'cuda:2'"):
            devices.resolve(devices=["cuda:0", "cuda:2"])
        with pytest.raises(tp_rs.InvalidInput, match=r"devices\[0\]: got 'cuda:2'"):
            devices.resolve([1], devices=["cuda:2"])

    @pytest.mark.usefixtures("no_gpu")
    def test_without_a_gpu_one_rank_takes_the_hosts_memory(self) -> None:
        (rank,) = devices.resolve()
        assert rank.device == "cpu"
        assert rank.speed is None
        assert 0 < rank.gib * GIB <= 1 << 50

    @pytest.mark.usefixtures("no_gpu")
    def test_without_a_gpu_budgets_plan_for_another_machine(self) -> None:
        assert devices.resolve([24, 12]) == [("cuda:0", 24.0, None), ("cuda:1", 12.0, None)]
        with pytest.raises(tp_rs.InvalidInput, match=r"devices\[0\]"):
            devices.resolve(devices=["cuda:0"])

    @pytest.mark.usefixtures("gpus")
    def test_torch_is_asked_where_the_program_uses_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []

        def free(index: int) -> tuple[int, int]:
            asked.append(index)
            return (3 + index) * GIB, 24 * GIB

        cuda = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, mem_get_info=free)
        monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
        assert devices.resolve() == [("cuda:0", 3.0, 936.0), ("cuda:1", 4.0, 504.0)]
        # Each answer costs a context, so nobody is asked without need.
        asked.clear()
        assert devices.resolve(devices=["cuda:1", "cpu"])[0] == ("cuda:1", 4.0, None)
        assert asked == [1]
        assert devices.resolve([2.0, 1.0]) == [("cuda:0", 2.0, 936.0), ("cuda:1", 1.0, 504.0)]
        assert asked == [1]

    def test_a_driver_that_fails_matters_only_where_it_is_needed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail() -> list[object]:
            message = "cuInit failed"
            raise tp_rs.CudaError(message, "cuInit", 999)

        monkeypatch.setattr(_native, "cuda_devices", fail)
        assert [rank.device for rank in devices.resolve([2, 1])] == ["cuda:0", "cuda:1"]
        assert [rank.device for rank in devices.resolve(devices=["cpu"])] == ["cpu"]
        with pytest.raises(tp_rs.CudaError):
            devices.resolve()
