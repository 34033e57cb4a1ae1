from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlgov.deployments.recorded import UNEXPLAINED, RecordedDeployment
from rlgov.errors import DeploymentError, JournalError
from rlgov.journal import Interval, read_journal
from rlgov.records import Configuration, Decision, Limits, ServiceLevel, Window

LIMITS = Limits(
    sm_clocks_mhz=(1980, 1200),
    batch_caps=(64, 8),
    tp_degrees=(2, 1),
    interval_s=1.0,
    service_level=ServiceLevel(1.0, 0.075),
    allotted_gpus=2,
    tdp_w=700.0,
    kv_capacity_tokens=(1000, 400),
    switch_s=(5.0, 5.0),
    max_num_batched_tokens=8192,
)
FAST = LIMITS.fastest
SLOW = Configuration(1200, 8, 1)
WINDOW = Window(
    start_s=0.0, duration_s=1.0, arrivals=1 / 3, prompt_tokens=0.1 + 0.2, output_tokens=1e-300,
    prefill_tokens=4e15, served=4.0, misses=0.0, overdue=0.0, preemptions=0.0, running=20.0, waiting=0.0,
    waiting_tokens=0.0, oldest_wait_s=0.0, running_mean=19.5, busy_fraction=0.9, kv_usage=0.1,
    ttft_p50_s=None, ttft_p99_s=None, tpot_p50_s=0.02, tpot_p99_s=0.03, itl_mean_s=0.02, energy_j=1200.0,
    measured_clock_mhz=1980.0, throttled_fraction=0.0, sm_clock_mhz=1980.0, batch_cap=64.0, tp_degree=2.0,
    switching=0.0, age_s=0.0,
)  # fmt: skip


class Scripted:
    """Hands out prepared windows and keeps what it was asked."""

    def __init__(self, windows: int, fail_at: int = -1) -> None:
        self.limits = LIMITS
        self.asked: list[Configuration] = []
        self.closed = False
        self._windows = windows
        self._fail_at = fail_at
        self._next = 0

    @property
    def finished(self) -> bool:
        return self._next >= self._windows

    def start(self, seed: int) -> Window:
        self._next = 1
        return replace(WINDOW, energy_j=float(seed))

    def advance(self, configuration: Configuration) -> Window:
        self.asked.append(configuration)
        if self._next == self._fail_at:
            raise DeploymentError("the engine is gone")
        self._next += 1
        return replace(WINDOW, start_s=self._next - 1.0, sm_clock_mhz=float(configuration.sm_clock_mhz))

    def close(self) -> None:
        self.closed = True


def test_windows_and_decisions_are_journalled_and_passed_through(tmp_path: Path) -> None:
    inner = Scripted(3)
    recorded = RecordedDeployment(inner, tmp_path / "run.jsonl", policy_digest="abc", versions={"rlgov": "1"})
    windows = [recorded.start(7)]
    decision = Decision(1.0, asked=SLOW, applied=FAST, reason="SLO_OVERRIDE", probability=0.25)
    recorded.note(decision, "0123")
    windows.append(recorded.advance(FAST))
    windows.append(recorded.advance(SLOW))
    assert recorded.finished
    recorded.close()
    recorded.close()
    assert inner.closed
    assert inner.asked == [FAST, SLOW]
    journal = read_journal(tmp_path / "run.jsonl")
    assert journal.header.limits == LIMITS
    assert (journal.header.seed, journal.header.policy_digest) == (7, "abc")
    assert journal.header.versions == {"rlgov": "1"}
    unnoted = Decision(2.0, SLOW, SLOW, UNEXPLAINED)
    assert journal.intervals == (
        Interval(windows[0], decision, "0123"),
        Interval(windows[1], unnoted),
        Interval(windows[2]),
    )


def test_every_episode_has_its_own_file(tmp_path: Path) -> None:
    recorded = RecordedDeployment(Scripted(2), tmp_path / "run.jsonl")
    for seed in (1, 2, 3):
        recorded.start(seed)
        recorded.advance(FAST)
    recorded.close()
    names = ["run.jsonl", "run-1.jsonl", "run-2.jsonl"]
    assert [read_journal(tmp_path / name).header.seed for name in names] == [1, 2, 3]


def test_an_existing_journal_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("precious\n")
    with pytest.raises(JournalError, match=r"run\.jsonl.*does not exist"):
        RecordedDeployment(Scripted(2), path).start(0)
    assert path.read_text() == "precious\n"


def test_a_deployment_that_fails_leaves_a_readable_journal(tmp_path: Path) -> None:
    recorded = RecordedDeployment(Scripted(5, fail_at=2), tmp_path / "run.jsonl")
    recorded.start(0)
    recorded.advance(FAST)
    with pytest.raises(DeploymentError, match="gone"):
        recorded.advance(SLOW)
    recorded.close()
    intervals = read_journal(tmp_path / "run.jsonl").intervals
    assert [i.decision.applied for i in intervals if i.decision] == [FAST, SLOW]


def test_a_note_must_be_about_what_is_done(tmp_path: Path) -> None:
    recorded = RecordedDeployment(Scripted(5), tmp_path / "run.jsonl")
    recorded.start(0)
    recorded.note(Decision(1.0, SLOW, SLOW, "POLICY"), "")
    with pytest.raises(DeploymentError, match="noted"):
        recorded.advance(FAST)
    recorded.close()


def test_advance_before_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="start"):
        RecordedDeployment(Scripted(5), tmp_path / "run.jsonl").advance(FAST)
    assert not (tmp_path / "run.jsonl").exists()
