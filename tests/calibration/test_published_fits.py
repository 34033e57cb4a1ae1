"""Fits to the published decode rows: what they predict of a model they have not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rlgov.calibration.decode_power import PowerFit, fit_power
from rlgov.calibration.decode_time import TimeFit, fit_time
from rlgov.calibration.published import read_ml_energy
from rlgov.calibration.work import Work, read_work
from rlgov.errors import CalibrationError


@pytest.fixture(scope="module")
def frame(shared_dir: Path) -> pd.DataFrame:
    return read_ml_energy(shared_dir / "data")


@pytest.mark.parametrize(
    ("gpu", "time_error", "power_error"), [("H100", 0.09, 0.10), ("B200", 0.13, 0.14)], ids=["H100", "B200"]
)
def test_dense_models_are_predicted_unseen(
    frame: pd.DataFrame, gpu: str, time_error: float, power_error: float
) -> None:
    time, power = fit_time(frame, gpu, "dense"), fit_power(frame, gpu, "dense")
    for errors in (time.errors, time.by_shape):
        assert errors.over_rows < time_error
    for errors in (power.errors, power.by_shape):
        assert errors.over_rows < power_error


def _time(frame: pd.DataFrame, gpu: str) -> TimeFit:
    return fit_time(frame, gpu, "experts", fit_time(frame, gpu, "dense").parameters)


def test_mixtures_of_experts_are_predicted_unseen(frame: pd.DataFrame) -> None:
    # Also where no other precision or finetune of the architecture was seen.
    fit = _time(frame, "H100")
    assert fit.errors.over_rows < 0.20
    assert fit.by_shape.over_rows < 0.20
    assert _time(frame, "B200").errors.over_rows < 0.25  # calibration: 36 %


@pytest.mark.parametrize(
    ("gpu", "kind", "error"), [("H100", "experts", 0.10), ("H100", "all", 0.10), ("B200", "all", 0.14)]
)
def test_power_of_all_models_is_predicted_unseen(
    frame: pd.DataFrame, gpu: str, kind: str, error: float
) -> None:
    fit: PowerFit = fit_power(frame, gpu, kind)
    assert fit.errors.over_rows < error
    assert not fit.errors.best.at_bound


def test_a_left_out_model_is_not_seen(frame: pd.DataFrame) -> None:
    # Doubling the measured times of one model changes what is said of it by the fit to all rows only.
    name = "Qwen/Qwen3-14B"
    fit = fit_time(frame, "H100", "dense")
    slower = frame.assign(median_itl_ms=frame["median_itl_ms"] * np.where(frame["model"] == name, 2.0, 1.0))
    again = fit_time(slower, "H100", "dense")
    assert again.errors.fits[name].values == fit.errors.fits[name].values  # noqa: PD011  # no frame's
    assert again.errors.best.values != fit.errors.best.values  # noqa: PD011  # no frame's


def _rows(frame: pd.DataFrame, model: str, gpus: int) -> Work:
    work = read_work(frame, "H100", "experts")
    return work.take((work.model == model) & (work.gpus == gpus))


def test_a_gpu_reads_more_experts_with_each_token_until_it_has_read_all(frame: pd.DataFrame) -> None:
    work = _rows(frame, "openai/gpt-oss-20b", 1)
    for evenness in (0.3, 2.0, np.inf):
        mean, busiest = work.expert_bytes(evenness)
        np.testing.assert_allclose(mean, busiest)  # one GPU holds all
        assert (np.diff(mean) >= 0).all()
        assert (mean <= work.one_expert_bytes * work.held_experts).all()
    uneven, even = work.expert_bytes(0.5)[0], work.expert_bytes(np.inf)[0]
    assert (uneven < even)[work.batch < 100].all()


def test_iterations_wait_for_the_busiest_of_several_gpus(frame: pd.DataFrame) -> None:
    mean, busiest = _rows(frame, "Qwen/Qwen3-235B-A22B-Instruct-2507", 8).expert_bytes(np.inf)
    assert (busiest >= mean).all()
    assert busiest[0] > 1.3 * mean[0]


def test_attention_is_split_unless_the_table_says_that_it_is_copied(frame: pd.DataFrame) -> None:
    model = "Qwen/Qwen3-235B-A22B-Instruct-2507"
    mine = frame[(frame["model"] == model) & (frame["gpu"] == "H100")]
    split, copied = (read_work(mine.assign(dp=dp), "H100", "experts") for dp in (1, 8))
    assert (copied.dense_bytes > 4.0 * split.dense_bytes).all()
    assert (copied.kv_bytes < split.kv_bytes).all()  # 4 heads on 8 GPUs are there twice


def test_rows_that_nothing_can_be_fitted_to_are_refused(frame: pd.DataFrame) -> None:
    with pytest.raises(CalibrationError, match="no datasheet of the GPU 'A10'; known are H100, B200"):
        read_work(frame, "A10")
    with pytest.raises(CalibrationError, match="known models: Qwen/Qwen3-8B"):
        read_work(frame.assign(model="unknown/model"), "H100")
    holes = frame.assign(output_tok_s=np.where(frame["model"] == "Qwen/Qwen3-14B", np.nan, 1.0))
    with pytest.raises(CalibrationError, match="no number in column output_tok_s"):
        read_work(holes, "H100")
    one = frame[frame["model"] == "Qwen/Qwen3-14B"]
    with pytest.raises(CalibrationError, match="leaving one group out needs two or more"):
        fit_time(one, "H100", "dense")
