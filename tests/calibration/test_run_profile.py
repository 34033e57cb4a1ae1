"""Known deployments, characterised and calibrated from another profile: held-out settings are predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rlgov.calibration.run_profile import Calibrated, calibrate_profile
from rlgov.calibration.runs import read_observations
from rlgov.calibration.table import read_points
from rlgov.envs.registration import make_simulated
from rlgov.simulation.physics import draw_parameters
from rlgov.simulation.profile import Profile, load_profile, parse_profile

Campaign = Callable[..., Path]
Perturb = Callable[[Profile, int], Profile]


@dataclass(frozen=True)
class Case:
    """A truth, what it was calibrated from, and what came out."""

    truth: Profile
    base: Profile
    found: Calibrated


@pytest.fixture(scope="module")
def dense_case(dense: Profile, perturbed: Perturb, characterised: Campaign) -> Case:
    truth = perturbed(dense, 31)
    observed = read_observations([characterised(truth)], dense)
    return Case(truth, dense, calibrate_profile(dense, observed, "calibrated"))


@pytest.fixture(scope="module")
def mixture_case(mixture: Profile, perturbed: Perturb, characterised: Campaign) -> Case:
    truth = perturbed(mixture, 32)
    observed = read_observations([characterised(truth)], mixture)
    return Case(truth, mixture, calibrate_profile(mixture, observed, "calibrated"))


@pytest.fixture(scope="module")
def measured_case(dense: Profile, perturbed: Perturb, characterised: Campaign) -> Case:
    """The truth has decode that physics alone does not explain: measured rows."""
    truth = perturbed(load_profile("h100-qwen3-32b"), 33)
    observed = read_observations([characterised(truth, tp=(4, 2, 1))], dense)
    return Case(truth, dense, calibrate_profile(dense, observed, "calibrated"))


def held_out(case: Case, characterised: Campaign) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Relative errors of iteration time and power at settings that no fit saw, the TP degree 1 among them."""
    clocks = case.truth.deployment.sm_clocks_mhz
    shape = case.found.profile.deployment.model_copy(update={"sm_clocks_mhz": clocks})
    model = case.found.profile.model_copy(update={"deployment": shape})
    tables = [
        read_points(
            characterised(
                profile,
                clocks=(clocks[2], clocks[7]),
                caps=(64, 16),
                tp=(4, 2, 1),
                classes=("medium-in/medium-out",),
                iterations=False,
            )
        )
        for profile in (case.truth, model)
    ]
    truth, said = (
        {name: table[name].to_numpy(np.float64) for name in ("busy_s", "iterations", "power_w_per_gpu")}
        for table in tables
    )
    time = (said["busy_s"] / said["iterations"]) / (truth["busy_s"] / truth["iterations"]) - 1.0
    power = said["power_w_per_gpu"] / truth["power_w_per_gpu"] - 1.0
    return np.abs(time), np.abs(power)


@pytest.mark.parametrize("name", ["dense_case", "mixture_case"])
def test_other_clocks_caps_and_degrees_are_predicted(
    name: str, request: pytest.FixtureRequest, characterised: Campaign
) -> None:
    time, power = held_out(request.getfixturevalue(name), characterised)
    assert len(time) == 12
    assert np.mean(time) < 0.01
    assert np.mean(power) < 0.01
    # A point is a few hundred iterations: one that ends at the edge of the span is seen in it.
    assert np.max(time) < 0.04
    assert np.max(power) < 0.03


def test_decode_beyond_physics_is_predicted_between_its_batches(
    measured_case: Case, characterised: Campaign
) -> None:
    """Worse than where physics holds: what happens between two measured batch sizes is not measured."""
    assert measured_case.found.profile.decode_rows
    time, power = held_out(measured_case, characterised)
    assert np.mean(time) < 0.02
    assert np.mean(power) < 0.03
    assert np.max(time) < 0.08


@pytest.mark.parametrize("name", ["dense_case", "mixture_case"])
def test_ranges_contain_the_truth(name: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(name)
    identified = [t for t in case.found.told if t.identified and hasattr(case.truth.parameters, t.name)]
    assert len(identified) >= 15
    inside = [t.low <= getattr(case.truth.parameters, t.name).value <= t.high for t in identified]
    assert sum(inside) >= len(inside) - 3  # nine of ten are promised


def test_errors_are_reported_of_points_that_no_fit_saw(dense_case: Case) -> None:
    found = dense_case.found
    assert found.seen.time < 0.01
    assert found.seen.power < 0.01
    what = [errors.what for errors in found.unseen]
    assert what == ["every fifth point", "each clock", "each cap", "each TP degree"]
    for errors in found.unseen:
        assert errors.points == 72
        assert np.isfinite(errors.time)
        assert np.isfinite(errors.power)
    assert found.unseen[0].time < 0.01


def test_unidentified_parameters_keep_their_prior_and_say_so(dense_case: Case) -> None:
    found, base = dense_case.found, dense_case.base
    assert {"host_floor_s", "wake_s", "clock_delay_s"} <= set(found.unidentified)
    for name, why in found.unidentified.items():
        mine, prior = (getattr(p.parameters, name) for p in (found.profile, base))
        assert (mine.value, mine.low, mine.high) == (prior.value, prior.low, prior.high)
        assert mine.kind == "prior"
        assert f"[kept: {why}]" in mine.source


def test_the_profile_is_read_back_and_says_how_well_it_holds(dense_case: Case) -> None:
    profile = parse_profile(dense_case.found.profile.to_yaml(), origin="test")
    assert profile == dense_case.found.profile
    known = profile.parameters.prefill_mfu
    assert known.kind == "fitted"
    assert "90%" in known.source
    assert known.error is not None
    assert "left out: every fifth point" in known.error


def test_training_draws_within_the_calibrated_ranges(dense_case: Case) -> None:
    profile = dense_case.found.profile
    drawn = [draw_parameters(profile, np.random.default_rng(seed)).values for seed in range(30)]
    for told in dense_case.found.told:
        if told.identified and hasattr(profile.parameters, told.name):
            values = [draw[told.name] for draw in drawn]
            assert told.low <= min(values) < max(values) <= told.high


def test_the_profile_can_be_trained_on(dense_case: Case, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dense_case.found.profile.to_yaml(), encoding="utf-8")
    env = make_simulated(profile=str(path), episode_s=20.0)
    try:
        env.reset(seed=1)
        rewards = []
        ended = False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            rewards.append(float(reward))
            ended = terminated or truncated
        assert len(rewards) == 20
        assert np.isfinite(rewards).all()
    finally:
        env.close()


def test_one_clock_and_one_degree_give_a_profile_that_says_what_it_lacks(
    dense: Profile, characterised: Campaign
) -> None:
    run = characterised(dense, clocks=(1980,), tp=(2,))
    found = calibrate_profile(dense, read_observations([run], dense), "narrow")
    for name in ("voltage_knee", "voltage_at_max", "layer_overhead_clock_share", "memory_knee"):
        assert "1980 MHz" in found.unidentified[name]
    assert "TP 2" in found.unidentified["all_reduce_latency_s"]
    told = {t.name: t for t in found.told}
    assert told["prefill_mfu"].identified
    assert [errors.what for errors in found.unseen] == ["each point", "each cap"]
