"""Fits to the published decode rows: what they predict of a model they have not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlgov.calibration.decode_power import fit_power
from rlgov.calibration.decode_time import fit_time
from rlgov.calibration.published import read_ml_energy


@pytest.mark.parametrize(
    ("gpu", "time_error", "power_error"), [("H100", 0.09, 0.10), ("B200", 0.13, 0.14)], ids=["H100", "B200"]
)
def test_dense_models_are_predicted_unseen(
    shared_dir: Path, gpu: str, time_error: float, power_error: float
) -> None:
    frame = read_ml_energy(shared_dir / "data")
    (card,) = [name for name in frame["gpu"].unique() if name.startswith(gpu)]
    assert np.abs(fit_time(frame, card, "dense").errors.outside).mean() < time_error
    assert np.abs(fit_power(frame, card, "dense").errors.outside).mean() < power_error
