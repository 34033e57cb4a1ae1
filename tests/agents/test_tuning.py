"""Tuning spends its budget exactly, repeats itself, and finds what is there to find."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.agents.baselines import FAMILIES, PolicyContext, by_name
from rlgov.agents.baselines.space import Choice, Real
from rlgov.agents.baselines.tuned import write_tuned
from rlgov.agents.baselines.two_level import TwoLevelPolicy
from rlgov.agents.policy import Policy
from rlgov.agents.tuning import Outcome, tune
from rlgov.errors import ConfigError
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile

PROFILE = load_profile("h100-qwen3-32b")
LIMITS = PROFILE.limits()
CONTEXT = PolicyContext(LIMITS, build_tables(PROFILE))
TARGET_MHZ = LIMITS.sm_clocks_mhz[4]


def cost(policy: Policy) -> Outcome:
    """Energy with its minimum inside the space; attainment falls off at low clocks and small caps."""
    assert isinstance(policy, TwoLevelPolicy)
    chosen = policy.settings
    energy_j = 100.0 + abs(chosen.low_clock_mhz - TARGET_MHZ) / 100 + abs(chosen.wait_fraction - 0.6)
    energy_j += abs(np.log(chosen.backlog_tokens / 3000.0)) + 5 * (chosen.tp_degree != LIMITS.tp_degrees[1])
    reaching = (chosen.batch_cap or 0) >= LIMITS.batch_caps[2]
    return Outcome(float(energy_j) - 20 * (not reaching), 0.995 if reaching else 0.9)


def test_tuning_finds_the_cheapest_setting_that_holds_the_target() -> None:
    result = tune(FAMILIES["two-level"], cost, 120, np.random.default_rng(0), context=CONTEXT)
    assert result.feasible
    best = result.best.parameters
    assert best["tp_degree"] == LIMITS.tp_degrees[1]
    assert best["batch_cap"] in LIMITS.batch_caps[:3]  # smaller caps look cheaper but miss the target
    assert result.best.outcome.energy_j < 102.0
    default = cost(FAMILIES["two-level"].build({}, CONTEXT))
    assert result.best.outcome.energy_j < default.energy_j


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("budget", [1, 2, 37])
def test_every_family_gets_exactly_the_budget_and_no_setting_twice(family: str, budget: int) -> None:
    calls: list[Policy] = []

    def evaluate(policy: Policy) -> Outcome:
        calls.append(policy)
        return Outcome(float(len(calls)), 1.0)

    result = tune(FAMILIES[family], evaluate, budget, np.random.default_rng(1), context=CONTEXT)
    assert len(calls) == len(result.trials) == budget
    assert len({tuple(trial.parameters.items()) for trial in result.trials}) == budget
    assert result.trials[0].parameters == {
        dimension.name: dimension.value(dimension.unit(FAMILIES[family].defaults(LIMITS)[dimension.name]))
        for dimension in FAMILIES[family].space(LIMITS)
    }


def test_a_space_smaller_than_the_budget_is_searched_whole() -> None:
    def evaluate(policy: Policy) -> Outcome:
        clock_mhz = policy.start_configuration(LIMITS).sm_clock_mhz
        return Outcome(float(clock_mhz), 1.0 if clock_mhz > LIMITS.sm_clocks_mhz[-1] else 0.5)

    count = int(np.prod(LIMITS.axis_sizes))
    result = tune(FAMILIES["static"], evaluate, 2 * count, np.random.default_rng(2), context=CONTEXT)
    assert len(result.trials) == count
    assert result.best.parameters["sm_clock_mhz"] == LIMITS.sm_clocks_mhz[-2]


def test_equal_seeds_give_equal_results_also_through_a_pool() -> None:
    first = tune(FAMILIES["two-level"], cost, 40, np.random.default_rng(3), context=CONTEXT)
    with ThreadPoolExecutor(2) as pool:
        again = tune(
            FAMILIES["two-level"], cost, 40, np.random.default_rng(3), context=CONTEXT, map_many=pool.map
        )
    assert first.trials == again.trials
    other = tune(FAMILIES["two-level"], cost, 40, np.random.default_rng(4), context=CONTEXT)
    assert first.trials != other.trials


def test_when_nothing_holds_the_target_the_highest_attainment_wins() -> None:
    attainments = iter(np.linspace(0.5, 0.9, 20))

    def evaluate(policy: Policy) -> Outcome:
        assert policy.name == "kv-threshold"
        return Outcome(1.0, float(next(attainments)))

    result = tune(FAMILIES["kv-threshold"], evaluate, 20, np.random.default_rng(5), context=CONTEXT)
    assert not result.feasible
    assert result.best.outcome.slo_attainment == 0.9


def test_an_outcome_that_is_no_number_never_wins() -> None:
    outcomes = iter([Outcome(5.0, 1.0), *[Outcome(float("nan"), 1.0)] * 9])
    result = tune(
        FAMILIES["ecofreq"], lambda _: next(outcomes), 10, np.random.default_rng(6), context=CONTEXT
    )
    assert result.best.outcome.energy_j == 5.0


def test_the_best_static_setting_is_a_second_start() -> None:
    best = LIMITS.configuration((4, 2, 1))
    context = PolicyContext(LIMITS, build_tables(PROFILE), best)
    for name, family in FAMILIES.items():
        result = tune(family, lambda _: Outcome(1.0, 1.0), 8, np.random.default_rng(0), context=context)
        second = result.trials[1].parameters
        assert second["batch_cap"] == best.batch_cap, name
        assert best.sm_clock_mhz in second.values(), name
        assert best.tp_degree in second.values(), name


def test_knobs_of_one_kind_are_recorded_in_rising_order() -> None:
    result = tune(FAMILIES["two-level"], cost, 60, np.random.default_rng(8), context=CONTEXT)
    for trial in result.trials:
        assert float(trial.parameters["low_clock_mhz"] or 0) <= float(trial.parameters["high_clock_mhz"] or 0)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        tune(FAMILIES["two-level"], cost, 0, np.random.default_rng(0), context=CONTEXT)


def test_the_result_can_be_stored_and_named(tmp_path: Path) -> None:
    result = tune(FAMILIES["two-level"], cost, 30, np.random.default_rng(7), context=CONTEXT)
    path = tmp_path / "tuned.json"
    write_tuned(result.record(profile="h100-qwen3-32b", trained_on=("conversation",)), path)
    policy = by_name(str(path), CONTEXT)
    assert cost(policy) == result.best.outcome


@settings(max_examples=100, deadline=None)
@given(unit=st.floats(0, 1), low=st.floats(1e-3, 1e3), ratio=st.floats(1.01, 1e4), log_scale=st.booleans())
def test_a_real_knob_stays_in_range_and_is_inverted(
    *, unit: float, low: float, ratio: float, log_scale: bool
) -> None:
    knob = Real("x", low, low * ratio, log_scale)
    value = knob.value(unit)
    assert low * (1 - 1e-5) <= value <= low * ratio * (1 + 1e-5)
    assert knob.unit(value) == pytest.approx(unit, abs=0.5 / 256 + 1e-3)


@given(values=st.lists(st.integers(), min_size=1, max_size=12, unique=True), unit=st.floats(0, 1))
def test_a_choice_takes_each_value_and_is_inverted(values: list[int], unit: float) -> None:
    knob = Choice("x", tuple(values))
    assert knob.value(unit) in values
    assert [knob.value(knob.unit(value)) for value in values] == values
