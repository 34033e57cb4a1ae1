from __future__ import annotations

from dataclasses import replace

import pytest

from rlgov.deployments.replayed import Audit, Outcome, ReplayedDeployment, Verdict, recorded_trace
from rlgov.errors import DeploymentError, JournalError
from rlgov.journal import Header, Interval, Journal, Request
from rlgov.records import WINDOW_FIELDS, Configuration, Decision, Limits, ServiceLevel, Window

LIMITS = Limits(
    sm_clocks_mhz=(1980, 1200),
    batch_caps=(64,),
    tp_degrees=(1,),
    interval_s=1.0,
    service_level=ServiceLevel(1.0, 0.075),
    allotted_gpus=1,
    tdp_w=700.0,
    kv_capacity_tokens=(1000,),
    switch_s=(0.0,),
    max_num_batched_tokens=8192,
)
FAST, SLOW = Configuration(1980, 64, 1), Configuration(1200, 64, 1)
WINDOW = Window(**(dict.fromkeys(WINDOW_FIELDS, 1.0) | {"blind": 0.0}))


def journal(*applied: Configuration | None, requests: tuple[Request, ...] = ()) -> Journal:
    intervals = []
    for i, configuration in enumerate(applied):
        window = replace(WINDOW, start_s=10.0 + i)
        decision = Decision(11.0 + i, SLOW, configuration, "POLICY") if configuration else None
        intervals.append(Interval(window, decision))
    return Journal(Header(LIMITS), tuple(intervals), requests)


def test_it_shows_what_was_recorded_whatever_is_asked() -> None:
    recording = journal(FAST, SLOW, None)
    replayed = ReplayedDeployment(recording)
    assert replayed.limits == LIMITS
    shown = [replayed.start(5)]
    while not replayed.finished:
        shown.append(replayed.advance(SLOW))
    assert shown == [entry.window for entry in recording.intervals]


def test_every_decision_gets_a_verdict_against_what_was_applied() -> None:
    replayed = ReplayedDeployment(journal(FAST, SLOW, None, FAST))
    replayed.start(0)
    for asked in (FAST, FAST, FAST):
        replayed.advance(asked)
    audit = replayed.audit()
    assert audit.verdicts == (
        Verdict(0, 11.0, Outcome.EQUAL, FAST, FAST),
        Verdict(1, 12.0, Outcome.DIVERGED, FAST, SLOW),
        Verdict(2, 13.0, Outcome.UNRECORDED, FAST, None),
    )
    assert audit.divergences == (audit.verdicts[1],)
    assert not audit.equal
    assert audit.summary().startswith(
        "3 decisions: 1 equal, 1 diverged, 1 unrecorded; first divergence at 12 s"
    )


def test_starting_again_begins_a_new_audit() -> None:
    replayed = ReplayedDeployment(journal(FAST, None))
    replayed.start(0)
    replayed.advance(SLOW)
    replayed.start(0)
    assert replayed.audit() == Audit(())
    assert not replayed.audit().equal  # nothing was compared
    replayed.advance(FAST)
    assert replayed.audit().equal


def test_out_of_order_use_is_refused() -> None:
    replayed = ReplayedDeployment(journal(FAST))
    with pytest.raises(DeploymentError, match="start"):
        replayed.advance(FAST)
    replayed.start(0)
    assert replayed.finished
    with pytest.raises(DeploymentError, match="ends after 1 windows"):
        replayed.advance(FAST)


def test_an_empty_journal_is_refused() -> None:
    with pytest.raises(JournalError, match="no interval"):
        ReplayedDeployment(journal())


def test_requests_become_a_trace_that_starts_with_the_first_window() -> None:
    requests = (Request(11.5, 30, 3), Request(10.25, 20, 2, 5), Request(9.0, 10, 1))
    trace = recorded_trace(journal(FAST, None, requests=requests), "run")
    assert trace.arrival_s.tolist() == [0.25, 1.5]
    assert trace.prompt_tokens.tolist() == [20, 30]
    assert trace.prefix_hit_tokens.tolist() == [5, 0]
    assert trace.duration_s == 2.0


def test_a_recording_without_requests_feeds_no_simulator() -> None:
    with pytest.raises(JournalError, match="no requests"):
        recorded_trace(journal(FAST, None), "run")
