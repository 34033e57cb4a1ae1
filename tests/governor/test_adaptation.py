"""What adaptation takes in, how its factors move, what it tells, and what it leaves alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov import cli
from rlgov.agents.baselines.ecofreq import EcoFreqPolicy, EcoFreqSettings
from rlgov.clock import VirtualClock
from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.errors import ConfigError
from rlgov.governor.adaptation import (
    GROSS,
    MOST_CONFIGURATIONS,
    Adaptation,
    AdaptationSettings,
    Sample,
)
from rlgov.governor.adaptation_file import AdaptationFile, Owner, decode, encode, read_scales
from rlgov.governor.core import Core
from rlgov.governor.facts import Facts
from rlgov.governor.records import Drift, Mode
from rlgov.hardware.clocks import ClockCheck, GpuCheck, Verdict
from rlgov.journal import FileSink, Header, Interval, JournalWriter
from rlgov.records import Configuration, Decision, Limits, Window
from rlgov.simulation.forecast import Forecast, Scales, stated_error
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.simulation.tables import PhysicsTables
from rlgov.workload.synthesis import SPECS, synthesize

PROFILE = load_profile("h100-qwen3-32b")
LIMITS = PROFILE.limits()
TABLES = build_tables(PROFILE)
ERROR = stated_error(PROFILE)
FASTEST = LIMITS.fastest
MIDDLE = LIMITS.configuration((5, 1, 0))
SLOW = LIMITS.configuration((9, 2, 0))

TIMES = (
    "decode_memory_s", "decode_compute_s", "decode_comm_s", "kv_memory_s", "kv_compute_s", "prefill_memory_s",
    "prefill_compute_s", "prefill_comm_s", "prompt_s", "attention_compute_s", "host_s",
)  # fmt: skip
ENERGIES = (
    "decode_memory_j", "decode_compute_j", "kv_memory_j", "kv_compute_j", "prefill_memory_j",
    "prefill_compute_j", "attention_compute_j", "busy_w", "idle_w",
)  # fmt: skip


def other(time: float, power: float) -> PhysicsTables:
    """A deployment that takes so many times as long, at so many times the power."""
    scaled = {name: getattr(TABLES, name) * time for name in TIMES}
    scaled |= {name: getattr(TABLES, name) * power for name in ENERGIES}
    return replace(TABLES, **scaled)


def make(**changed: Any) -> Adaptation:
    known = replace(AdaptationSettings(), **changed)
    return Adaptation(known, LIMITS, Forecast(TABLES, LIMITS), stated_error=ERROR)


def facts(now_s: float, **values: Any) -> Facts:
    return Facts(now_s=now_s, wall_s=now_s, **values)


def play(
    adaptation: Adaptation,
    tables: PhysicsTables,
    configurations: tuple[Configuration, ...],
    *,
    hold: int = 60,
    rounds: int = 4,
    workload: str = "conversation",
    noise: float = 0.0,
) -> list[Window]:
    """A simulated deployment of these tables, watched; its windows."""
    spec = replace(SPECS[workload], rate_per_s=3.0, duration_s=float(hold * rounds * len(configurations)))
    deployment = SimulatedDeployment(PROFILE, synthesize(spec, np.random.default_rng(7)), tables=tables)
    rng = np.random.default_rng(11)
    windows = [deployment.start(0)]
    for _ in range(rounds):
        for configuration in configurations:
            for _ in range(hold):
                window = deployment.advance(configuration)
                if noise and window.itl_mean_s and window.energy_j:
                    by = np.exp(noise * rng.standard_normal(2))
                    window = replace(
                        window, itl_mean_s=window.itl_mean_s * by[0], energy_j=window.energy_j * by[1]
                    )
                windows.append(window)
                adaptation.look(window, facts(window.start_s + 1.0), sound=True)
    return windows


def drifts(adaptation: Adaptation) -> list[Drift]:
    return list(adaptation.told.drifting)


def feed(adaptation: Adaptation, samples: list[tuple[float, float]], at: Configuration = MIDDLE) -> None:
    for number, (time, power) in enumerate(samples):
        adaptation.add(at, Sample(float(number), time, power))


# --------------------------------------------------------------------------- what it finds


@pytest.mark.parametrize(("time", "power"), [(1.3, 1.0), (1.0, 1.25), (0.85, 1.2), (1.15, 0.8)])
def test_it_recovers_how_a_deployment_differs_from_its_profile(time: float, power: float) -> None:
    adaptation = make(step=0.01)
    play(adaptation, other(time, power), (MIDDLE, SLOW))
    assert adaptation.scales.time == pytest.approx(time, rel=0.03)
    assert adaptation.scales.power == pytest.approx(power, rel=0.03)


@pytest.mark.parametrize("workload", ["conversation", "code", "day"])
def test_a_true_profile_with_noise_is_no_drift(workload: str) -> None:
    adaptation = make()
    play(adaptation, TABLES, (FASTEST, MIDDLE, SLOW), workload=workload, noise=0.1)
    assert adaptation.told.samples > 60
    assert adaptation.told.drifting == ()
    assert adaptation.scales.time == pytest.approx(1.0, abs=0.05)
    assert adaptation.scales.power == pytest.approx(1.0, abs=0.05)


def test_the_profiles_own_error_is_no_drift() -> None:
    rough = Adaptation(AdaptationSettings(), LIMITS, Forecast(TABLES, LIMITS), stated_error=0.4)
    feed(rough, [(math.log(1.35), 0.0)] * 64)
    assert rough.told.drifting == ()
    feed(rough, [(math.log(1.45), 0.0)] * 64)
    assert len(rough.told.drifting) == 1


@pytest.mark.parametrize(("time", "power"), [(1.3, 1.0), (1.0, 1.3), (0.7, 1.0), (1.0, 0.7)])
def test_thirty_per_cent_are_told_within_64_windows_that_count(time: float, power: float) -> None:
    rng = np.random.default_rng(3)
    adaptation = make()
    feed(adaptation, [tuple(0.08 * rng.standard_normal(2)) for _ in range(200)])
    assert not drifts(adaptation)
    for number in range(64):
        noise = 0.08 * rng.standard_normal(2)
        sample = Sample(200.0 + number, math.log(time) + noise[0], math.log(power) + noise[1])
        adaptation.add(MIDDLE, sample)
    drift = drifts(adaptation)[0]
    assert drift.configuration == MIDDLE
    assert drift.time == pytest.approx(time, rel=0.06)
    assert drift.power == pytest.approx(power, rel=0.06)


def test_drift_of_one_configuration_is_told_though_the_others_are_fine() -> None:
    adaptation = make()
    for at, ratio in ((FASTEST, 0.0), (SLOW, math.log(1.4)), (MIDDLE, 0.02)):
        feed(adaptation, [(ratio, 0.0)] * 40, at)
    assert [drift.configuration for drift in adaptation.told.drifting] == [SLOW]
    assert adaptation.told.configurations[0].configuration == SLOW
    assert adaptation.scales.time < 1.1


def test_drift_that_hovers_at_its_limit_does_not_flicker() -> None:
    adaptation = make()
    feed(adaptation, [(math.log(1.22), 0.0)] * 64)
    assert adaptation.told.drifting
    feed(adaptation, [(math.log(1.18), 0.0)] * 64)
    assert adaptation.told.drifting
    feed(adaptation, [(math.log(1.1), 0.0)] * 64)
    assert not adaptation.told.drifting


# --------------------------------------------------------------------------- how it moves

ANYTHING = st.floats(allow_nan=True, allow_infinity=True)
MODEST = st.floats(-0.3, 0.3)


@settings(max_examples=40)
@given(st.lists(st.tuples(ANYTHING, ANYTHING, st.integers(0, 11), st.integers(0, 5)), max_size=120))
def test_factors_stay_finite_and_bounded_and_move_slowly(
    samples: list[tuple[float, float, int, int]],
) -> None:
    adaptation = make(samples=3)
    before = adaptation.scales
    for number, (time, power, clock, cap) in enumerate(samples):
        adaptation.add(LIMITS.configuration((clock, cap, 0)), Sample(float(number), time, power))
        now = adaptation.scales
        for old, new in ((before.time, now.time), (before.power, now.power)):
            assert 1 / 1.5 - 1e-9 <= new <= 1.5 + 1e-9
            assert abs(math.log(new / old)) <= math.log1p(0.002) + 1e-12
        for drift in adaptation.told.configurations:
            assert math.exp(-GROSS) <= drift.time <= math.exp(GROSS) + 1e-9
        before = now


@settings(max_examples=40)
@given(
    good=st.lists(st.tuples(MODEST, MODEST), min_size=33, max_size=33),
    bad=st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), max_size=15),
    data=st.data(),
)
def test_outliers_do_not_move_it(
    good: list[tuple[float, float]], bad: list[tuple[float, float]], data: st.DataObject
) -> None:
    """A third of the windows may be anything: the factors stay within what the others say."""
    adaptation = make()
    feed(adaptation, data.draw(st.permutations(good + bad)))
    for scale, ratios in zip(
        (adaptation.scales.time, adaptation.scales.power), zip(*good, strict=True), strict=True
    ):
        assert min(*ratios, 0.0) - 1e-9 <= math.log(scale) <= max(*ratios, 0.0) + 1e-9
        assert abs(math.log(scale)) < 0.3
    (cell,) = adaptation.told.configurations
    times = [time for time, _ in good]
    assert min(times) - 1e-9 <= math.log(cell.time) <= max(times) + 1e-9


@settings(max_examples=25)
@given(st.permutations(range(60)), st.floats(-0.15, 0.15))
def test_the_order_of_windows_hardly_matters(order: list[int], centre: float) -> None:
    rng = np.random.default_rng(5)
    samples = [(centre + 0.05 * a, -centre + 0.05 * b) for a, b in rng.standard_normal((60, 2))]
    found = []
    for sequence in (range(60), order):
        adaptation = make(step=0.02)
        feed(adaptation, [samples[at] for at in sequence])
        found.append(adaptation)
    first, second = found
    assert first.told.configurations == second.told.configurations  # medians have no order at all
    assert first.scales.time == pytest.approx(second.scales.time, rel=0.03)
    assert first.scales.power == pytest.approx(second.scales.power, rel=0.03)


def test_nothing_moves_before_there_is_enough() -> None:
    adaptation = make()
    feed(adaptation, [(0.4, 0.4)] * 29)
    assert adaptation.scales == Scales()
    assert adaptation.told.configurations == ()


def test_old_windows_are_forgotten() -> None:
    adaptation = make(forget_s=100.0)
    feed(adaptation, [(0.4, 0.0)] * 40)
    assert adaptation.told.drifting
    adaptation.add(SLOW, Sample(1000.0, 0.0, 0.0))
    assert adaptation.told.samples == 1
    assert adaptation.told.drifting == ()


def test_memory_is_bounded_whatever_is_in_force() -> None:
    adaptation = make()
    for number in range(20_000):
        at = Configuration(200 + number % 1700, 1 + number % 300, 4)
        adaptation.add(at, Sample(number / 10, 0.1, 0.1)) if number % 40 == 0 else None
    assert len(adaptation.samples()) <= MOST_CONFIGURATIONS
    assert all(len(samples) <= 64 for samples in adaptation.samples().values())


# --------------------------------------------------------------------------- what it takes in


def ordinary() -> list[Window]:
    """Two windows of one configuration under load."""
    windows = play(make(), TABLES, (MIDDLE,), hold=12, rounds=1)
    found = [w for w in windows[4:] if w.busy_fraction > 0.5 and w.output_tokens > 50]
    return found[:2]


@pytest.mark.parametrize(
    "values",
    [
        {"blind": 1.0},
        {"switching": 1.0},
        {"throttled_fraction": 0.5},
        {"busy_fraction": 0.1},
        {"output_tokens": 3.0},
        {"preemptions": 1.0},
        {"measured_clock_mhz": 900.0},
        {"energy_j": None},
        {"energy_j": math.nan},
        {"energy_j": -3.0},
        {"energy_j": math.inf},
        {"itl_mean_s": None},
        {"itl_mean_s": math.nan},
        {"itl_mean_s": 0.0},
        {"duration_s": math.nan},
        {"duration_s": 0.0},
        {"kv_usage": math.nan},
        {"running": math.nan},
        {"prefill_tokens": math.nan},
        {"prefill_tokens": math.inf},
        {"arrivals": -1.0},
        {"sm_clock_mhz": math.nan},
        {"batch_cap": 0.0},
        {"tp_degree": 3.0},
        {"sm_clock_mhz": 1980.0, "measured_clock_mhz": 1980.0},
    ],
)
def test_windows_that_say_nothing_are_left_out(values: dict[str, Any]) -> None:
    first, second = ordinary()
    adaptation = make()
    adaptation.look(first, facts(1.0), sound=True)
    adaptation.look(replace(second, **values), facts(2.0), sound=True)
    assert adaptation.told.samples == 0


@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_lock_that_does_not_show_is_left_out(verdict: Verdict) -> None:
    check = ClockCheck(1380, (GpuCheck("GPU-a", 1380, frozenset(), verdict),))
    first, second = ordinary()
    adaptation = make()
    adaptation.look(first, facts(1.0), sound=True)
    counted = adaptation.look(second, facts(2.0, check=check), sound=True)
    assert counted == (verdict in {Verdict.HELD, Verdict.IDLE})


def test_what_the_guard_does_not_trust_is_left_out_and_so_is_the_first_of_a_configuration() -> None:
    first, second = ordinary()
    adaptation = make()
    assert not adaptation.look(first, facts(1.0), sound=True)
    assert not adaptation.look(second, facts(2.0), sound=False)
    assert not adaptation.look(second, facts(3.0), sound=True)
    assert adaptation.look(second, facts(4.0), sound=True)
    assert not adaptation.look(second, facts(5.0, unread_because="no answer"), sound=True)


@given(st.lists(ANYTHING, min_size=12, max_size=12))
def test_no_window_breaks_it(values: list[float]) -> None:
    names = (
        "running", "kv_usage", "output_tokens", "prefill_tokens", "prompt_tokens", "arrivals",
        "busy_fraction", "duration_s", "itl_mean_s", "energy_j", "sm_clock_mhz", "batch_cap",
    )  # fmt: skip
    first, _ = ORDINARY
    adaptation = make(samples=1)
    window = replace(first, **dict(zip(names, values, strict=True)))
    for _ in range(3):
        adaptation.look(window, facts(1.0), sound=True)
    assert math.isfinite(adaptation.scales.time)
    assert math.isfinite(adaptation.scales.power)


ORDINARY = ordinary()


# --------------------------------------------------------------------------- where it goes


def test_predictions_follow_and_the_profiles_own_tables_do_not_change() -> None:
    forecast = Forecast(TABLES, LIMITS)
    window, _ = ordinary()
    before, seen = forecast.expect(window, MIDDLE), forecast.seen(window)
    forecast.scales = Scales(time=1.2)
    assert forecast.expect(window, MIDDLE).itl_s > 1.15 * before.itl_s
    forecast.scales = Scales(power=1.1)
    assert forecast.expect(window, MIDDLE).power_w == pytest.approx(1.1 * before.power_w)
    assert forecast.seen(window) == seen  # what is compared with measurements stays the profile
    forecast.scales = Scales()
    assert forecast.expect(window, MIDDLE) == before


def test_ecofreq_takes_a_higher_clock_on_a_slower_deployment() -> None:
    chosen = []
    for scale in (1.0, 1.4):
        policy = EcoFreqPolicy(EcoFreqSettings(), TABLES)
        policy.time_scale = scale
        policy.start(LIMITS, 1)
        window, _ = ORDINARY
        row = replace(window, waiting=0.0, waiting_tokens=0.0, oldest_wait_s=0.0, running_mean=60.0).to_row()
        mask = np.ones((1, sum(LIMITS.axis_sizes)), dtype=np.bool_)
        chosen.append(int(policy.decide(np.zeros((1, 1), dtype=np.float32), row[None], mask)[0, 0]))
    assert chosen[1] < chosen[0]  # index 0 is the fastest


def test_the_learned_policy_sees_the_same_with_and_without(
    govern: Callable[..., Any], fake_stack: ModuleType
) -> None:
    """The toy world is nothing like the profile, so adaptation moves a lot: observations do not."""
    plain = govern((2, 0, 0), world=fake_stack.World(rate_per_s=20.0))
    adapting = govern(
        (2, 0, 0),
        world=fake_stack.World(rate_per_s=20.0),
        core=lambda limits, policy, **more: with_adaptation(limits, policy, samples=5, **more),
    )
    for _ in range(80):
        plain.tick()
        adapting.tick()
        assert np.array_equal(plain.core.observation, adapting.core.observation)
    assert [tick.decision for tick in plain.ticks] == [tick.decision for tick in adapting.ticks]
    assert plain.ticks[-1].adapted is None
    assert adapting.ticks[-1].adapted.samples > 10
    assert "ProfileDrift" in adapting.names()
    told = adapting.condition("ProfileDrift")
    assert "1680 MHz, batch cap 256, TP 4" in told
    assert "profile" in told
    drift = next(c for c in adapting.ticks[-1].conditions if c.name == "ProfileDrift")
    assert "rlgov characterize" in drift.remedy


def with_adaptation(limits: Limits, policy: Any, *, samples: int, **more: Any) -> Core:
    forecast = Forecast(TABLES, limits)
    adaptation = Adaptation(replace(AdaptationSettings(), samples=samples), limits, forecast)
    return Core(limits, policy, forecast=forecast, adaptation=adaptation, **more)


def test_it_is_off_unless_asked_for(govern: Callable[..., Any]) -> None:
    governed = govern((2, 0, 0), mode=Mode.SHADOW)
    governed.tick(5)
    assert governed.core.adaptation is None
    assert "ProfileDrift" not in governed.names()


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 0},
        {"samples": 99, "keep": 9},
        {"step": 0.5},
        {"bound": 1.0},
        {"drift": 0.0},
        {"calm": 2.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        replace(AdaptationSettings(), **wrong)  # type: ignore[arg-type]  # of each field's own type


# --------------------------------------------------------------------------- across runs

OWNER = Owner.of(PROFILE, ("GPU-a", "GPU-b"))


def found() -> Adaptation:
    adaptation = make(step=0.01)
    feed(adaptation, [(0.2, -0.1)] * 50)
    feed(adaptation, [(0.1, 0.0)] * 40, SLOW)
    return adaptation


def test_a_state_is_taken_up_again(tmp_path: Path) -> None:
    clock = VirtualClock(monotonic_s=100.0, wall_s=5000.0)
    before = found()
    kept = AdaptationFile(tmp_path / "deep" / "state.json", before, OWNER, clock)
    kept.close()
    kept.close()
    assert kept.problem == ""
    later = VirtualClock(monotonic_s=3.0, wall_s=5060.0)  # after a reboot
    after = make(step=0.01)
    again = AdaptationFile(tmp_path / "deep" / "state.json", after, OWNER, later)
    assert again.load()
    assert after.scales.time == pytest.approx(before.scales.time)
    assert after.scales.power == pytest.approx(before.scales.power)
    for one, other_one in zip(after.told.configurations, before.told.configurations, strict=True):
        assert one.configuration == other_one.configuration
        assert one.time == pytest.approx(other_one.time, rel=1e-3)
    again.close()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["state.json"]


def test_ages_survive_a_reboot_and_a_wall_clock_that_went_back() -> None:
    text = encode(found(), OWNER, 100.0, 5000.0)
    late = make(forget_s=3600.0)
    assert decode(text, late, OWNER, 3.0, 5000.0 + 4000.0) == ""
    assert late.told.samples == 0
    back = make(forget_s=3600.0)
    assert decode(text, back, OWNER, 3.0, 1.0) == ""
    assert back.told.samples == 90


def test_a_report_takes_the_factors_of_its_profile_only(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    before = found()
    path.write_text(encode(before, OWNER, 100.0, 5000.0), encoding="utf-8")
    assert read_scales(path, PROFILE) == before.scales
    with pytest.raises(ConfigError, match="of another profile"):
        read_scales(path, load_profile("h100-qwen3-8b"))
    with pytest.raises(ConfigError, match="--adapt"):
        read_scales(tmp_path / "none.json", PROFILE)


def test_a_report_follows_the_factors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a deployment that draws half as much again as its profile says."""
    windows = play(make(), other(1.0, 1.4), (FASTEST,), hold=60, rounds=1)
    path, state = tmp_path / "run.jsonl", tmp_path / "state.json"
    with JournalWriter(FileSink(path), Header(LIMITS)) as writer:
        for window in windows:
            writer.write(Interval(window, Decision(window.start_s + 1.0, MIDDLE, MIDDLE, "POLICY")))
    adaptation = make(step=0.02)
    feed(adaptation, [(0.0, math.log(1.4))] * 60)
    state.write_text(encode(adaptation, OWNER, 100.0, 5000.0), encoding="utf-8")
    words = ["report", str(path), "--profile", PROFILE.name, "--draws", "0", "--json"]
    off = []
    for more in ([], ["--adaptation", str(state)]):
        assert cli.run([*words, *more]) == 0
        told = json.loads(capsys.readouterr().out)
        off.append(told["tables"]["measured_over_predicted"])
    assert off[0] == pytest.approx(1.4, rel=0.1)
    assert off[0] / off[1] == pytest.approx(1.4)
    assert told["scales"]["power"] == pytest.approx(1.4)


def test_a_state_of_another_profile_or_other_gpus_is_not_taken() -> None:
    text = encode(found(), OWNER, 100.0, 5000.0)
    for owner in (
        Owner.of(PROFILE, ("GPU-a", "GPU-c")),
        Owner.of(load_profile("h100-qwen3-8b"), ("GPU-a", "GPU-b")),
    ):
        adaptation = make()
        assert "of another profile" in decode(text, adaptation, owner, 100.0, 5000.0)
        assert adaptation.told.samples == 0
        assert adaptation.scales == Scales()
    assert Owner.of(PROFILE, ("GPU-b", "GPU-a")) == OWNER


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "[]",
        lambda _: "\x00\xff",
        lambda text: text.replace('"time_scale":', '"time_scale":-'),
        lambda text: text.replace('"schema_version":1', '"schema_version":2'),
        lambda text: text.replace('"saved_wall_s":5000.0', '"saved_wall_s":NaN'),
        lambda text: text.replace('"kept"', '"more":1,"kept"'),
    ],
)
def test_a_damaged_state_is_named_and_not_taken(tmp_path: Path, change: Callable[[str], str]) -> None:
    path = tmp_path / "state.json"
    path.write_text(change(encode(found(), OWNER, 100.0, 5000.0)), encoding="utf-8")
    adaptation = make()
    kept = AdaptationFile(path, adaptation, OWNER, VirtualClock())
    assert not kept.load()
    assert "state.json" in kept.problem
    assert adaptation.scales == Scales()
    kept.close()


@given(st.text(max_size=200))
def test_no_file_breaks_loading(text: str) -> None:
    adaptation = make()
    assert decode(text, adaptation, OWNER, 1.0, 1.0) != ""
    assert adaptation.scales == Scales()


def test_a_file_that_cannot_be_written_is_told_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    kept = AdaptationFile(tmp_path / "file" / "state.json", found(), OWNER, VirtualClock())
    kept.save(at_once=True)
    kept.close()
    assert "not saved" in kept.problem


def test_an_absent_file_is_no_problem_and_it_saves_only_now_and_then(tmp_path: Path) -> None:
    clock = VirtualClock()
    kept = AdaptationFile(tmp_path / "state.json", found(), OWNER, clock)
    assert not kept.load()
    assert kept.problem == ""
    for _ in range(50):
        clock.advance_s(1.0)
        kept.save()
    assert not (tmp_path / "state.json").exists()
    kept.close()
    assert (tmp_path / "state.json").exists()
