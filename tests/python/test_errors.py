from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

import tp_rs


def test_each_class_is_also_the_builtin_that_callers_would_expect() -> None:
    assert issubclass(tp_rs.InvalidInput, ValueError)
    assert issubclass(tp_rs.DoesNotFit, tp_rs.InvalidInput)
    assert issubclass(tp_rs.CudaError, RuntimeError)
    assert issubclass(tp_rs.CollectiveTimeout, TimeoutError)
    for error in (tp_rs.InvalidInput, tp_rs.ModelError, tp_rs.CudaError, tp_rs.CollectiveTimeout):
        assert issubclass(error, tp_rs.TPError)


def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    for given in (path, str(path)):
        with pytest.raises(FileNotFoundError) as caught:
            tp_rs.plan(given, gpu_split=[1.0])
        assert caught.value.errno == errno.ENOENT
        assert os.fspath(caught.value.filename) == str(path)


def test_a_folder_without_a_model_and_a_broken_config_are_model_errors(tmp_path: Path) -> None:
    with pytest.raises(tp_rs.ModelError, match=str(tmp_path)):
        tp_rs.plan(tmp_path, gpu_split=[1.0])
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(tp_rs.ModelError, match=r"config\.json"):
        tp_rs.plan(tmp_path, gpu_split=[1.0])


def test_what_does_not_fit_carries_its_shortfall_through_a_pickle(config: dict[str, Any]) -> None:
    plan = tp_rs.plan(config, gpu_split=[0.01, 0.01], devices=["cpu", "cpu"])
    assert not plan.fits
    with pytest.raises(tp_rs.DoesNotFit) as caught:
        plan.require_fit()
    shortfall = caught.value.shortfall
    assert shortfall is not None
    assert shortfall == plan.shortfall
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, tp_rs.DoesNotFit)
    assert again.shortfall == shortfall
    assert str(again) == str(caught.value)


def test_cuda_errors_carry_call_and_code_through_a_pickle() -> None:
    error = tp_rs.CudaError("cuInit failed", "cuInit", 999)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.call, again.code) == ("cuInit failed", "cuInit", 999)
