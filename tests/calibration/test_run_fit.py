"""Parameters from measurements of a known truth: found where they can be, left alone and named where not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.calibration.predict import ALL_REDUCE, Knots, Work, tables_of
from rlgov.calibration.run_fit import LEVEL, RunFit, fit_run
from rlgov.calibration.run_profile import assemble, calibrate_profile
from rlgov.calibration.run_reasons import CLOCK_POWER, CLOCK_TIME, POWER
from rlgov.calibration.runs import Mean, Observations, without_power
from rlgov.errors import CalibrationError
from rlgov.simulation.physics import build_tables, iteration_energy_j, iteration_time_s
from rlgov.simulation.profile import Profile, load_profile
from rlgov.simulation.tables import PhysicsTables

PROFILE = load_profile("h100-qwen3-32b").model_copy(update={"decode_rows": ()})
TABLES = build_tables(PROFILE)
GRID = TABLES.grid_clocks_mhz
Perturb = Callable[[Profile, int], Profile]


def grid(
    *,
    clocks: tuple[float, ...] = (1980.0, 1530.0, 1080.0, 600.0),
    degrees: tuple[int, ...] = (0, 1),
    prefills: tuple[float, ...] = (0.0, 40.0, 700.0),
) -> Mean:
    """Mean iterations over everything that can be varied; times are still to be filled in."""
    rows = [
        (j, clock, float(batch), batch * context, prefill, prefill * 400.0)
        for j in degrees
        for clock in clocks
        for batch in (4, 16, 60, 120)
        for context in (150.0, 1500.0)
        for prefill in prefills
    ]
    columns = np.array(rows, dtype=np.float64).T
    n = len(rows)
    return Mean(
        point=np.arange(n, dtype=np.int64), tp=columns[0].astype(np.int64), clock_mhz=columns[1],
        decodes=columns[2], context_tokens=columns[3], prefill_tokens=columns[4], pairs=columns[5],
        prompts=(columns[4] > 0).astype(np.float64),
        step_s=np.ones(n), error=np.zeros(n),
    )  # fmt: skip


def measured(
    truth: Profile, cells: Mean, noise: float = 0.0, seed: int = 0, values: Mapping[str, float] | None = None
) -> Observations:
    """What a meter and a stopwatch would say of these iterations on that deployment."""
    rng = np.random.default_rng(seed)
    tables = tables_of(truth, values or {}, float(cells.decodes.max()))
    step_s = Work(cells).step_s(tables)
    cells = replace(
        cells, point=np.arange(len(cells)), step_s=step_s * np.exp(rng.normal(0.0, noise, len(cells)))
    )
    plain = without_power(cells, settings={"clock": cells.clock_mhz})
    gpus = tables.tp_degrees[cells.tp].astype(np.float64)
    busy = rng.uniform(0.3, 1.0, len(cells))
    plain = replace(plain, measured_gpus=gpus, busy_share=busy)
    watts = Work(replace(cells, step_s=step_s)).power_w(tables, plain)
    return replace(plain, power_w=watts * np.exp(rng.normal(0.0, noise, len(cells))))


def true_value(truth: Profile, name: str) -> float:
    return 1.0 if name == ALL_REDUCE else float(getattr(truth.parameters, name).value)


def inside(fit: RunFit, truth: Profile) -> list[bool]:
    return [abs(v - true_value(truth, n)) <= fit.spread[n] for n, v in fit.values.items()]


@settings(max_examples=40, deadline=None)
@given(
    j=st.integers(0, len(TABLES.tp_degrees) - 1),
    k=st.integers(0, len(GRID) - 1),
    decodes=st.integers(0, 255),
    context=st.integers(0, 100_000),
    prefill=st.integers(0, 1024),
)
def test_prediction_is_the_simulators_own_iteration(
    j: int, k: int, decodes: int, context: int, prefill: int
) -> None:
    pairs = prefill * 500
    one = np.ones(1)
    cell = Mean(
        point=np.zeros(1, dtype=np.int64), tp=np.array([j]), clock_mhz=one * GRID[k], decodes=one * decodes,
        context_tokens=one * context, prefill_tokens=one * prefill, pairs=one * pairs, step_s=one,
        prompts=one * (prefill > 0),
        error=0 * one,
    )  # fmt: skip
    step_s = iteration_time_s(TABLES, j, k, decodes, context, prefill, pairs)
    assert Work(cell).step_s(TABLES)[0] == pytest.approx(step_s)
    cell = replace(cell, step_s=one * step_s)
    observed = replace(without_power(cell), measured_gpus=one * TABLES.tp_degrees[j])
    watts = iteration_energy_j(TABLES, j, k, decodes, context, prefill, pairs) / step_s
    limit = TABLES.tdp_w * TABLES.tp_degrees[j]
    assert Work(cell).power_w(TABLES, observed)[0] == pytest.approx(min(watts, limit))


def test_idle_time_and_idle_gpus_are_counted_as_idle() -> None:
    cell = grid(clocks=(1980.0,), degrees=(1,), prefills=(0.0,)).take(np.array([0]))
    observed = replace(without_power(cell), measured_gpus=np.array([4.0]), busy_share=np.array([0.0]))
    idle_w = PROFILE.parameters.idle_high_w.value
    assert Work(cell).power_w(TABLES, observed)[0] == pytest.approx(4 * idle_w)


def test_exact_measurements_give_the_truth(dense: Profile, perturbed: Perturb) -> None:
    truth = perturbed(dense, 1)
    fit = fit_run(dense, measured(truth, grid()))
    assert len(fit.values) >= 20
    assert all(inside(fit, truth))
    for name in ("weight_efficiency", "prefill_mfu", "memory_knee", "voltage_at_max", "flop_j", "constant_w"):
        assert fit.values[name] == pytest.approx(true_value(truth, name), rel=0.03)


def test_ranges_hold_what_they_promise(dense: Profile, perturbed: Perturb) -> None:
    """At 90 %, over truths and noise: too few hits are overconfidence."""
    hits: list[bool] = []
    for seed in range(8):
        truth = perturbed(dense, seed)
        hits += inside(fit_run(dense, measured(truth, grid(), noise=0.01, seed=seed)), truth)
    assert len(hits) > 100
    assert LEVEL == 0.9
    assert np.mean(hits) > 0.8


def test_more_noise_gives_wider_ranges(dense: Profile, perturbed: Perturb) -> None:
    truth = perturbed(dense, 3)
    quiet, loud = (fit_run(dense, measured(truth, grid(), noise=n, seed=3)) for n in (0.003, 0.03))
    for name in ("prefill_mfu", "constant_w", "memory_knee"):
        assert quiet.spread[name] < loud.spread[name]
    assert quiet.noise["time"] < loud.noise["time"]


def test_one_clock_keeps_every_clock_parameter(dense: Profile, perturbed: Perturb) -> None:
    truth = perturbed(dense, 2)
    fit = fit_run(dense, measured(truth, grid(clocks=(1980.0,))))
    for name in (*CLOCK_TIME, *CLOCK_POWER):
        assert "every point" in fit.kept[name]
        assert "1980 MHz" in fit.kept[name]
        assert fit.value(name) == getattr(dense.parameters, name).value
    assert "prefill_mfu" in fit.values


def test_throttling_makes_no_sweep(dense: Profile) -> None:
    """Clocks that differ only because a limit of power held them back are one setting."""
    cells = grid()
    observed = measured(dense, cells)
    fit = fit_run(dense, replace(observed, settings={"clock": np.full(len(cells), 1980.0)}))
    assert set(CLOCK_TIME) <= set(fit.kept)


def test_one_degree_keeps_communication(dense: Profile, perturbed: Perturb) -> None:
    fit = fit_run(dense, measured(perturbed(dense, 4), grid(degrees=(1,))))
    assert "TP 2" in fit.kept["all_reduce_latency_s"]
    assert "TP 2" in fit.kept[ALL_REDUCE]


def test_links_of_another_speed_are_seen(dense: Profile) -> None:
    observed = measured(dense, grid(degrees=(0, 2)), values={ALL_REDUCE: 0.6})
    fit = fit_run(dense, observed)
    assert fit.values[ALL_REDUCE] == pytest.approx(0.6, rel=0.05)
    profile = assemble(dense, fit, 1, "x")
    ratio = profile.all_reduce[0].bytes_per_s / dense.all_reduce[0].bytes_per_s
    assert ratio == pytest.approx(fit.values[ALL_REDUCE])


def test_no_meter_keeps_all_power(dense: Profile, perturbed: Perturb) -> None:
    cells = measured(perturbed(dense, 5), grid()).means
    fit = fit_run(dense, without_power(cells))
    assert all("no meter" in fit.kept[name] for name in POWER)
    assert "prefill_mfu" in fit.values


def test_no_prompt_keeps_prefill(dense: Profile) -> None:
    fit = fit_run(dense, measured(dense, grid(prefills=(0.0,))))
    assert fit.kept["prefill_mfu"] == "no point prefilled a prompt"


def test_what_is_told_only_together_says_with_what(dense: Profile) -> None:
    """One batch size at one clock: what an iteration is made of cannot be told."""
    cells = grid(clocks=(1980.0,), degrees=(1,), prefills=(0.0, 300.0))
    fit = fit_run(dense, measured(dense, cells.take(cells.decodes == 16.0)))
    assert {"weight_efficiency", "layer_overhead_s", "gemm_mfu", "sequence_overhead_s"} & set(fit.kept)
    reasons = [fit.kept[n] for n in ("weight_efficiency", "layer_overhead_s") if n in fit.kept]
    assert any("cannot be told from" in why for why in reasons)


def test_measured_and_assumed_parameters_stay(dense: Profile, perturbed: Perturb) -> None:
    known = dense.parameters
    zero = known.host_floor_s.model_copy(update={"value": 0.0, "low": 0.0, "high": 0.0})
    sure = known.prefill_mfu.model_copy(update={"kind": "measured"})
    base = dense.model_copy(
        update={"parameters": known.model_copy(update={"host_floor_s": zero, "prefill_mfu": sure})}
    )
    fit = fit_run(base, measured(perturbed(dense, 6), grid()))
    assert fit.kept["host_floor_s"] == "zero by assumption"
    assert fit.kept["prefill_mfu"] == "measured otherwise"
    assert "clock_delay_s" in fit.kept


def crooked(tables: PhysicsTables, cells: Mean, factor: float) -> np.ndarray:
    """Times of an engine whose decode is off physics at large batches."""
    shares = np.clip((np.log(cells.decodes) - np.log(16.0)) / np.log(8.0), 0.0, 1.0)
    return Work(cells).step_s(tables, 1.0 + (factor - 1.0) * shares)


def test_decode_that_physics_cannot_explain_becomes_rows(dense: Profile) -> None:
    cells = grid()
    observed = measured(dense, cells)
    step_s = crooked(tables_of(dense, {}, 130.0), cells, 1.4)
    bent = replace(cells, step_s=step_s)
    fit = fit_run(dense, replace(observed, means=bent, details=bent, power_w=observed.power_w * np.nan))
    profile = assemble(dense, fit, len(cells), "x")
    assert len(profile.decode_rows) >= 6
    assert {row.tp_degree for row in profile.decode_rows} == {4, 2}
    again = Work(bent).step_s(tables_of(profile, {}, 130.0))
    assert np.mean(np.abs(again / step_s - 1.0)) < 0.01


def test_physics_that_holds_gets_no_rows(dense: Profile, perturbed: Perturb) -> None:
    """Noise is no reason either: rows would follow it."""
    truth = perturbed(dense, 7)
    fit = fit_run(dense, measured(truth, grid(), noise=0.03, seed=7))
    assert not assemble(dense, fit, 1, "x").decode_rows


def test_outliers_do_not_decide(dense: Profile, perturbed: Perturb) -> None:
    truth = perturbed(dense, 8)
    observed = measured(truth, grid(), noise=0.003, seed=8)
    cells = observed.details
    step_s = cells.step_s.copy()
    step_s[::20] *= 3.0
    spoilt = replace(cells, step_s=step_s)
    clean, dirty = (fit_run(truth, replace(observed, details=d)) for d in (cells, spoilt))
    for name in ("prefill_mfu", "memory_knee", "sequence_overhead_s"):
        assert dirty.values[name] == pytest.approx(clean.values[name], rel=0.03)


def test_a_number_that_is_none_is_refused(dense: Profile) -> None:
    observed = measured(dense, grid())
    spoilt = replace(observed.details, step_s=np.full(len(observed.details), np.nan))
    with pytest.raises(CalibrationError, match="no finite residual"):
        fit_run(dense, replace(observed, details=spoilt))


def test_few_points_are_fitted_and_left_out_one_by_one(dense: Profile, perturbed: Perturb) -> None:
    truth = perturbed(dense, 9)
    observed = measured(truth, grid().take(np.arange(0, 192, 20)))
    found = calibrate_profile(dense, observed, "few")
    assert found.unseen[0].what == "each point"
    assert found.unseen[0].points == len(observed.means)
    assert found.unidentified
    for told in found.told:
        assert told.low <= told.value <= told.high


def test_corrections_come_from_the_nearest_degree_with_knots() -> None:
    knots = Knots(np.array([0, 0, 2]), np.array([8.0, 64.0, 16.0]))
    degrees = np.array([4, 2, 1], dtype=np.int64)
    cells = grid(clocks=(1980.0,), degrees=(0, 1, 2), prefills=(0.0,))
    shares = knots.shares(cells, degrees)
    assert np.allclose(shares.sum(axis=1), 1.0)
    assert np.all(shares[cells.tp == 0][:, 2] == 0.0)
    assert np.all(shares[cells.tp == 1][:, 2] == 1.0)  # TP 1 is nearer to 2 than TP 4 is
    at_60 = (cells.tp == 0) & (cells.decodes == 60.0)
    assert np.all(shares[at_60][:, 1] > 0.9)


@pytest.mark.skipif("prompt_overhead_s" not in dict(PROFILE.parameters.items()), reason="no such parameter")
def test_what_any_prompt_adds_is_told_from_its_length(dense: Profile) -> None:
    def with_overhead(value: float) -> Profile:
        known = dense.parameters.weight_efficiency.model_copy(
            update={"value": value, "low": 0.0, "high": 0.02, "kind": "prior"}
        )
        changes = {"prompt_overhead_s": known}
        return dense.model_copy(update={"parameters": dense.parameters.model_copy(update=changes)})

    truth = with_overhead(0.006)
    fit = fit_run(with_overhead(0.001), measured(truth, grid()))
    assert fit.values["prompt_overhead_s"] == pytest.approx(0.006, rel=0.05)
