"""The fits behind the shipped profiles, run again on the published measurements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from rlgov.simulation import fit
from rlgov.simulation.physics import Physics
from rlgov.simulation.profile import load_profile


@pytest.fixture(scope="module")
def calibration(shared_dir: Path) -> fit.Calibration:
    return fit.calibrate(shared_dir / "data")


def _same(a: object, b: object, where: str = "profile") -> None:
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            _same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _same(x, y, f"{where}[{i}]")
    elif isinstance(a, float) and isinstance(b, float):
        assert a == pytest.approx(b, rel=2e-3), where
    elif not where.endswith(".error"):  # a sentence with the same numbers
        assert a == b, where


@pytest.mark.parametrize("offer", fit.OFFERS, ids=lambda offer: offer.name)
def test_the_shipped_profiles_come_from_the_data(calibration: fit.Calibration, offer: fit.Offer) -> None:
    fresh = yaml.safe_load(fit.fit_profile(calibration, offer).to_yaml())
    shipped = yaml.safe_load(load_profile(offer.name).to_yaml())
    _same(fresh, shipped)


def test_errors_are_no_worse_than_the_calibration_asks(calibration: fit.Calibration) -> None:
    report = calibration.report
    assert report.kernel_error < 0.06
    assert report.time_error < 0.077  # calibration: in-sample 7.7 %, leave-model-out 11 %
    assert np.mean(list(report.time_error_left_out.values())) < 0.06
    assert max(report.time_error_left_out.values()) < 0.11
    assert report.power_error < 0.07
    assert np.mean(list(report.power_error_left_out.values())) < 0.08  # calibration: 14 %
    assert report.sweep_error < 0.08


def test_left_out_batch_sizes_are_interpolated_well(calibration: fit.Calibration) -> None:
    # Calibration, best closed form: 3.4 % of time (median), 2.0 % of power.
    assert max(calibration.report.batch_error_left_out_s.values()) < 0.034
    assert max(calibration.report.batch_error_left_out_w.values()) < 0.03


def test_no_fitted_parameter_is_degenerate(calibration: fit.Calibration) -> None:
    for fitted in (calibration.time, calibration.power):
        assert all(value > 0 for value in fitted.best.values())
        assert all(fitted.low[n] <= v <= fitted.high[n] for n, v in fitted.best.items())


def test_power_of_decodes_and_its_inverse_agree(calibration: fit.Calibration) -> None:
    # Taking the prefills out of a predicted mean power gives back the decode power it was made of.
    p, all_reduce = calibration.parameters, calibration.all_reduce
    for rows in calibration.rows:
        mean_w = fit.mean_power_w(rows, p, all_reduce)
        again = fit.Rows(
            rows.model, rows.tp, rows.task, rows.batch, rows.context_tokens, rows.decode_s, rows.mean_s,
            rows.prefills, mean_w,
        )  # fmt: skip
        decode_w = fit.decode_power_w(again, p, all_reduce)
        physics = Physics(fit.H100, rows.model, p, all_reduce)
        work_j = physics.decode(rows.tp, rows.batch).total_j + physics.kv_j() * rows.contexts
        expected_w = physics.busy_w(1, np.ones(1)) + work_j / rows.decode_s / rows.tp
        np.testing.assert_allclose(decode_w, expected_w, rtol=1e-9)


def test_the_command_writes_the_profiles(shared_dir: Path, tmp_path: Path) -> None:
    fit.main(data=shared_dir / "data", out=tmp_path)
    for offer in fit.OFFERS:
        assert load_profile(tmp_path / f"{offer.name}.yaml").name == offer.name
