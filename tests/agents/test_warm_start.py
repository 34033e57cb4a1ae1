"""The head start: what the sweep's table promises, and that imitation takes the policy there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlgov.agents import warm_start
from rlgov.agents.ppo import build_ppo
from rlgov.agents.train_config import PpoSettings
from rlgov.agents.warm_start import LOADS, ClockTable, ImitationSettings, imitate, sweep
from rlgov.deployments.scenario import FixedScenario
from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.envs.vec_env import ServingVecEnv
from rlgov.records import ServiceLevel
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.agents.ppo import Ppo

PROFILE = load_profile("h100-qwen3-32b")
LIMITS = PROFILE.limits()
TABLES = build_tables(PROFILE)
CLOCKS, CAPS, DEGREES = LIMITS.axis_sizes
FULL_PER_S = 20.0  # what the toy workload calls a load of 1
SPAN_S = 40.0
TARGET = 0.99


def traffic(load: float, duration_s: float) -> Trace:
    """Requests at even gaps, with every tenth prompt ten times as long."""
    n = max(int(FULL_PER_S * load * duration_s), 1)
    prompts = np.where(np.arange(n) % 10 == 0, 6000, 600).astype(np.int64)
    return Trace(
        "even",
        np.arange(n, dtype=np.float64) * (duration_s / n),
        prompts,
        np.full(n, 60, dtype=np.int64),
        np.zeros(n, dtype=np.int64),
        duration_s,
    )


@dataclass(frozen=True)
class ToySampler:
    """Even traffic; ``ranges`` are the loads of the constraint groups."""

    ranges: tuple[tuple[float, float], ...] = ((0.1, 0.8),)
    slo_scale: float = 1.0
    limits = LIMITS
    nominal = TABLES

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(map(str, self.ranges))

    @property
    def service_level(self) -> ServiceLevel:
        return LIMITS.service_level.scaled(self.slo_scale)

    def covers(self, group: int, load: float) -> bool:
        low, high = self.ranges[group]
        return low <= load <= high

    def traffic(
        self, group: int, load: float, duration_s: float, rng: np.random.Generator
    ) -> tuple[Trace, ServiceLevel]:
        del group
        # a little chance, so that another seed gives another table
        return traffic(load * rng.uniform(0.95, 1.0), duration_s), self.service_level


@pytest.fixture(autouse=True)
def _short_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "SWEEP_S", (SPAN_S, SPAN_S))


def swept(sampler: ToySampler, target: float = TARGET, seed: int = 0) -> ClockTable:
    return sweep(sampler, target, seed)  # type: ignore[arg-type]  # stands in for EpisodeSampler


def held(trace: Trace, level: ServiceLevel, index: tuple[int, int, int]) -> tuple[float, float]:
    """Energy until the last arrival and attainment of one setting, by way of a deployment."""
    configuration = LIMITS.configuration(index)
    deployment = SimulatedDeployment(PROFILE, trace, service_level=level, start=configuration, tables=TABLES)
    windows = [deployment.start(0)]
    while len(windows) < SPAN_S + 60:
        windows.append(deployment.advance(configuration))
    log = deployment.request_log()
    energy_j = sum(window.energy_j or 0.0 for window in windows[: int(SPAN_S)])
    return energy_j, 1.0 - float(np.mean(log.missed | np.isnan(log.finish_s)))


# ---------------------------------------------------------------- the sweep


def test_an_entry_is_the_most_frugal_clock_that_holds_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    load = 0.3
    monkeypatch.setattr(warm_start, "LOADS", (load,))
    sampler = ToySampler(slo_scale=0.6)
    table = swept(sampler)
    rng = np.random.default_rng([warm_start._STREAM, 0])
    sampler.traffic(0, load, SPAN_S, rng)  # the sweep looks at the traffic's rate first
    trace, level = sampler.traffic(0, load, SPAN_S, rng)
    for tp in range(DEGREES):
        outcomes = [held(trace, level, (clock, 0, tp)) for clock in range(CLOCKS)]
        holding = [clock for clock, (_, attainment) in enumerate(outcomes) if attainment >= TARGET]
        if not holding:
            assert np.isinf(table.energy_j[0, 0, tp])
            assert table.clock[0, 0, tp] == 0
            continue
        cheapest = min(holding, key=lambda clock: outcomes[clock][0])
        assert table.clock[0, 0, tp] == cheapest
        assert table.energy_j[0, 0, tp] == pytest.approx(outcomes[cheapest][0], rel=1e-9)
    assert np.isfinite(table.energy_j[0, 0]).any()
    assert table.clock[0, 0, 0] > 0  # the fastest clock is not simply always the answer


def test_asking_more_never_gets_cheaper() -> None:
    """A tighter SLO or a higher target leaves fewer settings, of which each spends what it spent."""
    any_will_do = swept(ToySampler(), target=0.0)
    assert np.isfinite(any_will_do.energy_j).all()
    demanding = [
        swept(ToySampler(slo_scale=scale), target) for scale, target in ((2, 0.9), (1, 0.99), (0.6, 1))
    ]
    for looser, tighter in zip([any_will_do, *demanding], demanding, strict=False):
        assert (tighter.energy_j >= looser.energy_j).all()
        alike = tighter.energy_j == looser.energy_j
        alike &= np.isfinite(tighter.energy_j)
        np.testing.assert_array_equal(tighter.clock[alike], looser.clock[alike])
    assert (demanding[-1].energy_j > any_will_do.energy_j).any()
    impossible = swept(ToySampler(), target=1.1)
    assert np.isinf(impossible.energy_j).all()
    assert not impossible.clock.any()


def test_loads_outside_a_group_take_the_nearest_entry_inside() -> None:
    whole = swept(ToySampler())
    parts = swept(ToySampler(ranges=((0.1, 0.2), (0.3, 0.5))))
    inside = [[LOADS.index(load) for load in loads] for loads in ((0.1, 0.15, 0.2), (0.3, 0.4, 0.5))]
    for group, levels in enumerate(inside):
        np.testing.assert_array_equal(parts.energy_j[group, levels], whole.energy_j[0, levels])
        for level in range(len(LOADS)):
            nearest = min(max(level, levels[0]), levels[-1])
            np.testing.assert_array_equal(parts.clock[group, level], whole.clock[0, nearest])


def test_a_group_between_the_loads_of_the_grid_is_swept_at_all_of_them() -> None:
    whole, narrow = swept(ToySampler()), swept(ToySampler(ranges=((0.31, 0.32),)))
    np.testing.assert_array_equal(narrow.clock, whole.clock)


def test_equal_seeds_sweep_alike_and_others_differ() -> None:
    one, again, other = (swept(ToySampler(), seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.clock, again.clock)
    np.testing.assert_array_equal(one.energy_j, again.energy_j)
    assert (one.energy_j != other.energy_j).any()


# ---------------------------------------------------------------- the table


@settings(max_examples=60, deadline=None)
@given(
    clock=hnp.arrays(np.int64, (2, len(LOADS), 3), elements=st.integers(0, 9)),
    energy_j=hnp.arrays(np.float64, (2, len(LOADS), 3), elements=st.sampled_from([1.0, 2.0, 3.0, np.inf])),
    group=st.integers(0, 1),
    load=st.floats(0.0, 1.5),
    rise=st.floats(0.0, 1.0),
)
def test_the_degree_follows_the_load_to_come_and_the_clock_the_present_one(
    clock: NDArray[np.int64], energy_j: NDArray[np.float64], group: int, load: float, rise: float
) -> None:
    table = ClockTable(np.array(LOADS), clock, energy_j)
    (chosen,) = table.lookup(np.array([group]), np.array([load]), np.array([load + rise]))
    present, peak = (int(np.argmin(np.abs(table.loads - x))) for x in (load, load + rise))
    costs = energy_j[group, peak]
    assert costs[chosen[2]] == costs.min()
    assert chosen[2] == 0 or np.isfinite(costs[chosen[2]])
    assert chosen[0] == clock[group, present, chosen[2]]
    assert chosen[1] == 0


# ---------------------------------------------------------------- imitation

WANTED = (4, 0, 1)
QUICK = ImitationSettings(windows=30, epochs=60, batch_size=64, learning_rate=1e-2)


def constant_table() -> ClockTable:
    clock = np.full((1, len(LOADS), DEGREES), WANTED[0])
    energy_j = np.ones((1, len(LOADS), DEGREES))
    energy_j[..., WANTED[2]] = 0.5
    return ClockTable(np.array(LOADS), clock, energy_j)


def environment() -> ServingVecEnv:
    scenario = FixedScenario(traffic(0.2, SPAN_S), TABLES, LIMITS.service_level)
    return ServingVecEnv(LIMITS, scenario, TABLES, 4, windows=20)


def fresh(env: ServingVecEnv, *, masked: bool = True, seed: int = 0) -> Ppo:
    torch.set_num_threads(1)
    ppo = PpoSettings(masked=masked, rollout_steps=16, batch_size=64, hidden=(16,))
    return build_ppo(env, ppo, seed)


def probabilities(model: Ppo, observations: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of what the table wants, on each axis, averaged over observations."""
    with torch.no_grad():
        heads = warm_start._heads(model, torch.from_numpy(observations))
    means = [float(head.probs[:, index].mean()) for head, index in zip(heads, WANTED, strict=True)]
    return np.array(means)


def weights(model: Ppo) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in model.policy.state_dict().items()}


@pytest.mark.parametrize("masked", [True, False])
def test_imitation_raises_the_probability_of_what_the_table_wants(*, masked: bool) -> None:
    env = environment()
    model = fresh(env, masked=masked)
    observations = env.reset()
    before, values = probabilities(model, observations), weights(model)
    short = imitate(model, env, constant_table(), 0, replace(QUICK, epochs=1))
    loss = imitate(model, env, constant_table(), 0, QUICK)
    after = probabilities(model, observations)
    assert loss < short
    assert (after[[0, 2]] > before[[0, 2]] + 0.2).all()
    assert (after[1:] > 0.8).all()  # the cap and the degree are meant to be all but certain
    for name, value in weights(model).items():
        if "value" in name:
            assert torch.equal(value, values[name]), name


def test_the_clock_target_reaches_the_neighbours_but_peaks_at_the_label() -> None:
    labels = np.arange(CLOCKS)
    target = warm_start._soft(labels, CLOCKS, 0.7)
    np.testing.assert_allclose(target.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(target.argmax(axis=1), labels)
    assert (target > 0).all()
    inner = target[1:-1]
    at = labels[1:-1]
    rows = np.arange(at.size)
    np.testing.assert_allclose(inner[rows, at - 1], inner[rows, at + 1])
    assert (inner[rows, at - 1] > 0.1).all()
    np.testing.assert_allclose(warm_start._peaked(labels, CLOCKS, 0.96).sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(warm_start._peaked(np.zeros(3, dtype=np.int64), 1, 0.96), np.ones((3, 1)))


def test_equal_seeds_imitate_alike_and_others_differ() -> None:
    made = []
    for seed in (0, 0, 1):
        env = environment()
        model = fresh(env)
        imitate(model, env, constant_table(), seed, replace(QUICK, epochs=2))
        made.append(weights(model))
    one, again, other = made
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_imitation_leaves_no_trace_in_the_counters() -> None:
    env = environment()
    imitate(fresh(env), env, constant_table(), 0, replace(QUICK, epochs=1))
    assert not any(env.totals().values())
    assert not any(totals.any() for totals in env.group_totals())
