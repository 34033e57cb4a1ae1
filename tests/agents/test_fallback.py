"""The learned policy where it is at home, EcoFreq elsewhere; and back, but not at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rlgov.agents.baselines import PolicyContext, by_name
from rlgov.agents.bundle import (
    SCHEMA_VERSION,
    Bundle,
    BundlePolicy,
    FeatureRange,
    Layer,
    Manifest,
    NetworkLayout,
    ObservationStatistics,
    Offer,
    write_bundle,
)
from rlgov.agents.fallback import FallbackPolicy, FallbackSettings, Novelty, with_fallback
from rlgov.envs.guard import Guard, GuardSettings
from rlgov.envs.observation import FEATURES, OBSERVATION_SCHEMA, ObservationEncoder
from rlgov.errors import BundleError, ConfigError
from rlgov.records import Column
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.workload.synthesis import SPECS, synthesize

PROFILE = load_profile("h100-qwen3-8b")
LIMITS = PROFILE.limits()
TABLES = build_tables(PROFILE)
SIZE = len(FEATURES)
FIXED = (2, 1, 0)  # what the bundle of these tests always wants


def played(rate_scale: float, policy: Any, windows: int = 240, name: str = "conversation") -> dict[str, Any]:
    """A policy on simulated traffic: its observations, its decisions, its latencies."""
    spec = replace(SPECS[name], rate_per_s=SPECS[name].rate_per_s * rate_scale, duration_s=windows + 10.0)
    trace = synthesize(spec, np.random.default_rng(3))
    batch = SimulationBatch(LIMITS, 1, TABLES, capacity=len(trace))
    batch.load(0, trace, TABLES, LIMITS.service_level, (0, 0, 0))
    guard, encoder = Guard(GuardSettings(), LIMITS, 1), ObservationEncoder(LIMITS, 1)
    level = np.array([[LIMITS.service_level.ttft_s, LIMITS.service_level.tpot_s]])
    policy.start(LIMITS, 1)
    index = np.zeros((1, 3), dtype=np.int64)
    seen: dict[str, Any] = {"observations": [], "fallen": [], "misses": 0.0, "energy_j": 0.0, "index": []}
    for _ in range(windows):
        rows = batch.advance(index)
        observation = encoder.encode(rows, level)
        index, _ = guard.apply(policy.decide(observation, rows, guard.mask(rows)), rows)
        seen["observations"].append(observation[0].copy())
        seen["fallen"].append(bool(getattr(policy, "fallen_back", [False])[0]))
        seen["index"].append(tuple(index[0].tolist()))
        seen["misses"] += rows[0, Column.MISSES]
        seen["energy_j"] += rows[0, Column.ENERGY_J]
    return seen


def bundle_of(observations: NDArray[np.float32]) -> Bundle:
    """A bundle that always wants FIXED, with the statistics of these observations."""
    bias = np.zeros(sum(LIMITS.axis_sizes), dtype=np.float32)
    for offset, index in zip((0, *np.cumsum(LIMITS.axis_sizes)[:2]), FIXED, strict=True):
        bias[offset + index] = 5.0
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name="fixed",
        observation_schema=OBSERVATION_SCHEMA,
        features=tuple(FeatureRange(name=f.name, low=f.low, high=f.high) for f in FEATURES),
        offer=Offer.of(LIMITS),
        network=NetworkLayout(widths=(SIZE, bias.size), activation="tanh", masked=True),
        profile_name=PROFILE.name,
        profile_digest="0" * 64,
        training_digest="1" * 64,
        samples=len(observations),
        versions={},
    )
    layer = Layer(np.zeros((bias.size, SIZE), dtype=np.float32), bias)
    return Bundle(manifest, (layer,), ObservationStatistics.of(observations))


class _Fixed:
    """As the bundle, before there is one."""

    def start(self, limits: Any, n: int) -> None:
        """It keeps nothing."""

    def decide(self, *_: Any) -> NDArray[np.int64]:
        return np.array([FIXED])


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    trained = [played(scale, _Fixed())["observations"] for scale in (0.3, 0.6, 1.0)]
    return bundle_of(np.array([row for rows in trained for row in rows], dtype=np.float32))


def fallback(bundle: Bundle, **changes: Any) -> FallbackPolicy:
    return with_fallback(BundlePolicy(bundle), TABLES, LIMITS, FallbackSettings(**changes))


def test_on_traffic_like_that_of_training_the_learned_policy_decides(bundle: Bundle) -> None:
    seen = played(0.8, fallback(bundle))
    assert not any(seen["fallen"])
    assert seen["index"][-1] == FIXED


def test_at_twice_the_trained_load_the_baseline_decides_and_does_no_worse(bundle: Bundle) -> None:
    policy = fallback(bundle)
    seen = played(2.5, policy)
    assert np.mean(seen["fallen"][60:]) > 0.9
    assert seen["fallen"][-1]
    assert policy.score[0] > 1.0
    alone = played(2.5, BundlePolicy(bundle))
    assert seen["misses"] <= alone["misses"]


def test_probability_is_the_learned_policy_s_and_unknown_elsewhere(bundle: Bundle) -> None:
    policy = fallback(bundle)
    played(0.8, policy, windows=20)
    assert 0.0 < policy.probability[0] <= 1.0
    played(3.0, policy)
    assert np.isnan(policy.probability[0])


def stepped(policy: FallbackPolicy, observation: NDArray[np.float32], count: int, **row: float) -> list[bool]:
    rows = np.zeros((1, len(Column)))
    rows[0, Column.DURATION_S] = 1.0
    rows[0, Column.SM_CLOCK_MHZ] = LIMITS.sm_clocks_mhz[0]
    rows[0, Column.BATCH_CAP], rows[0, Column.TP_DEGREE] = LIMITS.batch_caps[0], LIMITS.tp_degrees[0]
    for name, value in row.items():
        rows[0, Column[name.upper()]] = value
    mask = np.ones((1, sum(LIMITS.axis_sizes)), dtype=np.bool_)
    told = []
    for _ in range(count):
        policy.decide(observation[None], rows, mask)
        told.append(bool(policy.fallen_back[0]))
    return told


def test_it_takes_over_after_some_windows_and_gives_back_after_many(bundle: Bundle) -> None:
    policy = fallback(bundle, enter_windows=4, leave_windows=10, at_once=5.0)
    policy.start(LIMITS, 1)
    home = bundle.statistics.mean.astype(np.float32)
    away = home.copy()
    away[0] += 1.2 * 10.0 * max(float(bundle.statistics.std[0]), 0.05) + float(
        bundle.statistics.high[0] - home[0]
    )
    assert 1.0 < policy.novelty.score(away[None])[0] < 5.0
    assert stepped(policy, away, 3) == [False] * 3
    assert stepped(policy, home, 1) == [False]
    assert stepped(policy, away, 4) == [False] * 3 + [True]
    assert stepped(policy, home, 10) == [True] * 9 + [False]


def test_far_away_it_takes_over_at_once_and_a_blind_window_changes_nothing(bundle: Bundle) -> None:
    policy = fallback(bundle)
    policy.start(LIMITS, 1)
    home = bundle.statistics.mean.astype(np.float32)
    away = home + np.float32(50.0)
    assert stepped(policy, away, 3, blind=1.0) == [False] * 3
    assert stepped(policy, away, 3, energy_j=float("nan")) == [False] * 3
    assert stepped(policy, away, 1) == [True]
    assert stepped(policy, home, 100, blind=1.0) == [True] * 100


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_observation_that_is_not_finite_is_infinitely_far(bundle: Bundle, value: float) -> None:
    novelty = Novelty(bundle.statistics, FallbackSettings())
    observation = np.tile(bundle.statistics.mean.astype(np.float32), (2, 1))
    observation[1, 7] = value
    score = novelty.score(observation)
    assert score[0] < 1.0
    assert score[1] == np.inf
    assert novelty.farthest(observation[1]) == 7


def test_the_feature_that_lies_outside_is_named(bundle: Bundle) -> None:
    novelty = Novelty(bundle.statistics, FallbackSettings())
    observation = bundle.statistics.mean.astype(np.float32)
    observation[12] += 40.0
    assert novelty.farthest(observation) == 12


def test_rows_do_not_depend_on_each_other(bundle: Bundle) -> None:
    novelty = Novelty(bundle.statistics, FallbackSettings())
    observations = np.random.default_rng(0).normal(size=(20, SIZE)).astype(np.float32)
    together = novelty.score(observations)
    alone = np.array([novelty.score(row[None])[0] for row in observations])
    assert together == pytest.approx(alone, rel=1e-12)


def test_the_baseline_leaves_tp_alone() -> None:
    profile = load_profile("h100-qwen3-32b")
    limits, tables = profile.limits(), build_tables(profile)
    observations = np.random.default_rng(0).normal(size=(50, SIZE)).astype(np.float32)
    offer = Offer.of(limits)
    bias = np.zeros(sum(limits.axis_sizes), dtype=np.float32)
    made = bundle_of(observations)
    manifest = made.manifest.model_copy(
        update={
            "offer": offer,
            "network": NetworkLayout(widths=(SIZE, bias.size), activation="tanh", masked=True),
        }
    )
    layer = Layer(np.zeros((bias.size, SIZE), dtype=np.float32), bias)
    policy = with_fallback(BundlePolicy(Bundle(manifest, (layer,), made.statistics)), tables, limits)
    policy.start(limits, 1)
    rows = np.zeros((1, len(Column)))
    rows[0, Column.DURATION_S] = 1.0
    rows[0, Column.TP_DEGREE], rows[0, Column.SM_CLOCK_MHZ], rows[0, Column.BATCH_CAP] = 2, 1980, 256
    mask = np.ones((1, bias.size), dtype=np.bool_)
    asked = policy.decide(np.full((1, SIZE), 100.0, dtype=np.float32), rows, mask)
    assert policy.fallen_back[0]
    assert asked[0, 2] == limits.tp_degrees.index(2)


def test_replay_knows_it_by_name(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    write_bundle(path, bundle.manifest, bundle.layers, bundle.statistics)
    policy = by_name(f"fallback:{path}", PolicyContext(LIMITS, TABLES))
    assert isinstance(policy, FallbackPolicy)
    assert policy.guarded
    with pytest.raises(ConfigError, match="only a bundle"):
        by_name("fallback:ecofreq", PolicyContext(LIMITS, TABLES))


def test_another_deployment_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="trained for"):
        fallback(bundle).start(replace(LIMITS, interval_s=2.0), 1)


@pytest.mark.parametrize("bad", [{"distance": 0.0}, {"leave_score": 1.5}, {"at_once": 0.5}])
def test_settings_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        FallbackSettings(**bad)  # type: ignore[arg-type]  # names and values of the fields
