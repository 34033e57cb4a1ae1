"""The report of a governed run, against a simulated deployment whose truth is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rlgov import cli
from rlgov.agents.baselines import PolicyContext, by_name
from rlgov.commands.traces import open_trace
from rlgov.deployments.recorded import TraceArrivals
from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.errors import ConfigError
from rlgov.governor.shadow_report import shadow_report
from rlgov.journal import FileSink, Header, Interval, Journal, JournalWriter, decode_journal, encode
from rlgov.records import Configuration, Decision
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import Profile, load_profile
from rlgov.workload.trace import Trace

PROFILE = "h100-qwen3-8b"
SPAN_S = 150.0


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile(PROFILE)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return open_trace("synthetic:conversation", seed=3).slice(0.0, SPAN_S / 2).scaled(0.5)


@pytest.fixture(scope="module")
def slower(profile: Profile) -> Configuration:
    limits = profile.limits()
    return replace(limits.fastest, sm_clock_mhz=limits.sm_clocks_mhz[4])


def _recorded(profile: Profile, trace: Trace, decided: Configuration, *, acting: bool) -> Journal:
    """A run that decides the same in every window, carried out or not."""

    def lines() -> Iterator[str]:
        deployment = SimulatedDeployment(profile, trace)
        limits, arrivals = deployment.limits, TraceArrivals(trace)
        yield encode(Header(limits, policy_digest="abc"))
        window = deployment.start(0)
        while True:
            end_s = window.start_s + window.duration_s
            yield from (encode(request) for request in arrivals.take(end_s))
            yield encode(Interval(window, Decision(end_s, decided, decided, "POLICY")))
            if deployment.finished:
                return
            window = deployment.advance(decided if acting else limits.fastest)

    return decode_journal(lines(), name="recorded")


@pytest.fixture(scope="module")
def shadow(profile: Profile, trace: Trace, slower: Configuration) -> Journal:
    return _recorded(profile, trace, slower, acting=False)


@pytest.fixture(scope="module")
def active(profile: Profile, trace: Trace, slower: Configuration) -> Journal:
    return _recorded(profile, trace, slower, acting=True)


def _energy_j(journal: Journal) -> float:
    windows = [interval.window for interval in journal.intervals]
    return sum(window.energy_j or 0.0 for window in windows if window.start_s < SPAN_S)


def test_both_ways_find_the_saving_that_is_there(shadow: Journal, active: Journal, profile: Profile) -> None:
    truth = 1.0 - _energy_j(active) / _energy_j(shadow)
    assert truth > 0.1
    report = shadow_report(shadow, profile, draws=2)
    assert report.simulation is not None
    assert report.simulation.decided.share == pytest.approx(truth, abs=0.02)
    assert report.tables.decided.share == pytest.approx(truth, abs=0.05)
    assert report.tables.in_force.share == pytest.approx(0.0, abs=1e-9)
    assert report.simulation.in_force.share == pytest.approx(0.0, abs=1e-9)


def test_an_active_run_is_compared_with_the_fastest(
    shadow: Journal, active: Journal, profile: Profile
) -> None:
    truth = 1.0 - _energy_j(active) / _energy_j(shadow)
    report = shadow_report(active, profile, draws=0)
    assert report.simulation is not None
    assert report.simulation.in_force.share == pytest.approx(truth, abs=0.02)
    assert report.tables.in_force.share == pytest.approx(truth, abs=0.05)
    assert report.simulation.in_force_range is None


def test_the_errors_are_stated(shadow: Journal, profile: Profile) -> None:
    report = shadow_report(shadow, profile, draws=3)
    assert report.simulation is not None
    # Here the deployment is the simulator itself, so the simulation must find its energy again.
    assert report.simulation.measured_over_predicted == pytest.approx(1.0, abs=0.01)
    assert report.tables.measured_over_predicted == pytest.approx(1.0, abs=0.1)
    assert 0.0 < report.stated_error < 1.0
    low, high = report.simulation.decided_range or (0.0, 0.0)
    assert low < high
    assert report.simulation.slo_attainment["fastest"] > 0.99
    assert "%" in report.simulation.shown["decided"]


def test_a_meter_that_is_off_shows_as_an_error_and_not_as_saving(shadow: Journal, profile: Profile) -> None:
    doubled = replace(
        shadow,
        intervals=tuple(
            replace(i, window=replace(i.window, energy_j=2.0 * (i.window.energy_j or 0.0)))
            for i in shadow.intervals
        ),
    )
    plain, off = shadow_report(shadow, profile, draws=0), shadow_report(doubled, profile, draws=0)
    assert off.tables.measured_over_predicted == pytest.approx(2.0 * plain.tables.measured_over_predicted)
    assert off.tables.decided.share == pytest.approx(plain.tables.decided.share)
    assert off.tables.decided_saved_j == pytest.approx(2.0 * plain.tables.decided_saved_j)


def test_blind_unmetered_and_switching_windows_are_left_out(shadow: Journal, profile: Profile) -> None:
    intervals = list(shadow.intervals)
    for number, changes in ((20, {"blind": 1.0}), (30, {"energy_j": None}), (40, {"switching": 1.0})):
        intervals[number] = replace(intervals[number], window=replace(intervals[number].window, **changes))
    report = shadow_report(replace(shadow, intervals=tuple(intervals)), profile, draws=0)
    whole = shadow_report(shadow, profile, draws=0)
    assert report.measured.used_windows == whole.measured.used_windows - 3
    assert report.measured.blind_windows == 1
    assert report.tables.decided.share == pytest.approx(whole.tables.decided.share, abs=0.01)


def test_a_gap_makes_two_stretches(shadow: Journal, profile: Profile) -> None:
    kept = tuple(i for n, i in enumerate(shadow.intervals) if not 60 <= n < 90)
    report = shadow_report(replace(shadow, intervals=kept), profile, draws=0)
    assert report.simulation is not None
    assert report.simulation.stretches == 2
    assert report.simulation.requests < len(shadow.requests)


def test_without_requests_only_tables_speak(shadow: Journal, profile: Profile) -> None:
    report = shadow_report(replace(shadow, requests=()), profile)
    assert report.simulation is None
    assert "attached" in report.no_simulation


def test_a_run_that_decided_nothing_is_refused(shadow: Journal, profile: Profile) -> None:
    silent = replace(shadow, intervals=tuple(replace(i, decision=None) for i in shadow.intervals))
    with pytest.raises(ConfigError, match="--mode shadow"):
        shadow_report(silent, profile)


def test_another_deployments_profile_is_refused(shadow: Journal) -> None:
    with pytest.raises(ConfigError, match="TP"):
        shadow_report(shadow, load_profile("h100-qwen3-32b"))


def test_a_policy_can_decide_anew(shadow: Journal, profile: Profile) -> None:
    policy = by_name("ecofreq", PolicyContext(profile.limits(), build_tables(profile)))
    report = shadow_report(shadow, profile, policy=policy, draws=0)
    assert report.replayed is not None
    assert report.replayed.policy == "ecofreq"
    assert report.replayed.saving.share > 0.05
    fastest = by_name("fastest", PolicyContext(profile.limits()))
    again = shadow_report(shadow, profile, policy=fastest, draws=0)
    assert again.replayed is not None
    assert again.replayed.saving.share == pytest.approx(0.0, abs=1e-9)


def test_the_command_prints_and_is_the_same_twice(
    shadow: Journal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.jsonl"
    with JournalWriter(FileSink(path), shadow.header) as writer:
        for request in shadow.requests:
            writer.write(request)
        for interval in shadow.intervals:
            writer.write(interval)
    words = ["report", str(path), "--profile", PROFILE, "--draws", "1"]
    assert cli.run(words) == 0
    printed = capsys.readouterr().out
    assert "decided, against in force" in printed
    assert "- The same requests would have come" in printed
    assert cli.run([*words, "--json"]) == 0
    first = capsys.readouterr().out
    assert json.loads(first)["tables"]["decided"]["share"] > 0
    assert cli.run([*words, "--json"]) == 0
    assert capsys.readouterr().out == first
    assert cli.run([*words, "--draws", "-1"]) == 2
