from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from rlgov.envs.reward import TERM_NAMES, Reference, RewardSettings, reward
from rlgov.errors import ConfigError, DeploymentError
from rlgov.records import Column, Limits, Window

SETTINGS = RewardSettings()
REFERENCE = Reference(energy_j_per_window=1200.0, arrivals_per_window=4.0)
STAY = np.zeros((1, 3), dtype=np.int64)


def paid(window: Window, moved: tuple[int, int, int] = (0, 0, 0), weight: float = 5.0) -> dict[str, float]:
    total, terms = reward(window.to_row()[None, :], STAY, np.array([moved]), REFERENCE, SETTINGS, weight)
    return {"total": float(total[0])} | {name: float(term[0]) for name, term in terms.items()}


def test_the_fastest_setting_without_misses_earns_minus_one(calm: Window) -> None:
    assert paid(calm)["total"] == pytest.approx(-1.0)


def test_less_energy_earns_more_and_a_miss_earns_less(calm: Window) -> None:
    assert paid(replace(calm, energy_j=600.0))["total"] == pytest.approx(-0.5)
    missed = paid(replace(calm, misses=1.0))
    assert missed["miss"] == pytest.approx(-5.0 / 4.0)
    assert missed["total"] == pytest.approx(-1.0 - 5.0 / 4.0)


def test_switching_costs_by_axis(calm: Window) -> None:
    assert paid(calm, (0, 0, 1))["switch"] == -SETTINGS.switch_cost
    assert paid(calm, (3, 0, 0))["switch"] == -SETTINGS.clock_change_cost
    assert paid(calm, (0, 2, 0))["switch"] == 0.0


def test_misses_are_bounded_and_so_is_the_sum(calm: Window) -> None:
    flood = paid(replace(calm, misses=1e6), weight=1000.0)
    assert flood["miss"] == -1000.0 * SETTINGS.miss_bound
    assert flood["total"] == -SETTINGS.bound
    assert flood["clip"] > 0


def test_a_blind_window_says_nothing_about_energy_or_misses() -> None:
    row = np.full(len(Column), np.nan)
    row[Column.BLIND] = 1.0
    total, terms = reward(row[None, :], STAY, STAY, REFERENCE, SETTINGS, 5.0)
    assert total[0] == 0.0
    assert all(term[0] == 0.0 for term in terms.values())


def test_energy_that_nobody_metered_is_an_error_with_its_remedy(calm: Window) -> None:
    unmetered = replace(calm, energy_j=None)
    with pytest.raises(DeploymentError, match="no meter; install"):
        paid(unmetered)
    assert paid(replace(unmetered, blind=1.0))["total"] == 0.0


@given(
    hnp.arrays(np.float64, (3, 2), elements=st.floats(0, 1e6)),
    hnp.arrays(np.int64, (2, 3, 3), elements=st.integers(0, 2)),
)
def test_the_terms_add_up_within_the_bound(
    calm: Window, numbers: NDArray[np.float64], indices: NDArray[np.int64]
) -> None:
    rows = np.stack([replace(calm, energy_j=e, misses=m).to_row() for e, m in numbers.tolist()])
    total, terms = reward(rows, indices[0], indices[1], REFERENCE, SETTINGS, 7.0)
    assert tuple(terms) == TERM_NAMES
    assert np.allclose(sum(terms.values()), total)
    assert (np.abs(total) <= SETTINGS.bound).all()


def test_every_row_has_its_own_reference(calm: Window) -> None:
    rows = np.repeat(calm.to_row()[None, :], 2, axis=0)
    reference = Reference(np.array([1200.0, 2400.0]), np.array([4.0, 8.0]))
    two = np.zeros((2, 3), dtype=np.int64)
    assert reward(rows, two, two, reference, SETTINGS, 5.0)[0].tolist() == [-1.0, -0.5]


def test_the_rows_are_not_written(calm: Window) -> None:
    rows = replace(calm, misses=2.0).to_row()[None, :]
    before = rows.copy()
    reward(rows, STAY, STAY, REFERENCE, SETTINGS, 5.0)
    assert np.array_equal(rows, before)


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)])
def test_a_reference_must_be_positive(values: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Reference(*values)


def test_the_nominal_reference_scales_with_the_deployment(limits: Limits) -> None:
    assert Reference.nominal(limits).energy_j_per_window == 0.5 * 4 * 700.0
