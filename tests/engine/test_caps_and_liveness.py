"""Pure parts of the stack: the lease of a cap, and what counts as progress."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlgov.engine.caps import CapLease
from rlgov.engine.liveness import Progress
from rlgov.engine.samples import EngineSample

HUNG_S, IDLE_S = 30.0, 60.0


def _sample(work: float, running: int = 1) -> EngineSample:
    return EngineSample(0.0, "plugin", "e", running, 0, 0.1, work, 0.0, 0.0, 0.0, 0.0)


@given(st.integers(1, 500), st.floats(0.1, 100), st.floats(0, 1000))
def test_a_cap_holds_for_its_lease_and_not_longer(cap: int, lease_s: float, now_s: float) -> None:
    lease = CapLease.open(256).asked(cap, lease_s, now_s)
    assert lease.in_force(now_s) == min(cap, 256)
    assert lease.in_force(now_s + 1.001 * lease_s) == 256
    assert lease.wanted(now_s + 1.001 * lease_s) is None
    assert lease.remaining_s(now_s + 1.001 * lease_s) is None


def test_a_cap_without_lease_stays_and_the_maximum_is_no_cap() -> None:
    lease = CapLease.open(256).asked(8, None, 0.0)
    assert lease.wanted(1e9) == 8
    assert CapLease.open(256).asked(256, 5.0, 0.0).wanted(1.0) is None


def test_work_that_goes_on_needs_no_probe() -> None:
    progress = Progress(0.0, 0.0)
    for second in range(200):
        progress = progress.seen(_sample(work=float(second)), 1, float(second))
        assert not progress.needs_probe(float(second), HUNG_S, IDLE_S, hung=False)


def test_work_that_stands_still_is_probed_and_an_answer_calms() -> None:
    progress = Progress(0.0, 0.0).seen(_sample(5.0), 1, 1.0).seen(_sample(5.0), 1, 32.0)
    assert progress.needs_probe(32.0, HUNG_S, IDLE_S, hung=False)
    assert not progress.probed(32.0, answered=True).needs_probe(40.0, HUNG_S, IDLE_S, hung=False)
    unanswered = progress.probed(32.0, answered=False)
    assert not unanswered.needs_probe(40.0, HUNG_S, IDLE_S, hung=False)  # not at every look
    assert unanswered.needs_probe(63.0, HUNG_S, IDLE_S, hung=False)


def test_an_unreadable_engine_with_requests_at_it_is_probed() -> None:
    progress = Progress(0.0, 0.0).seen(None, 3, 31.0)
    assert progress.needs_probe(31.0, HUNG_S, IDLE_S, hung=False)


def test_an_idle_engine_is_probed_now_and_then() -> None:
    progress = Progress(0.0, 0.0).seen(_sample(5.0, running=0), 0, 50.0)
    assert not progress.needs_probe(50.0, HUNG_S, IDLE_S, hung=False)
    assert progress.needs_probe(61.0, HUNG_S, IDLE_S, hung=False)


def test_an_idle_engine_that_hung_is_asked_again_soon() -> None:
    progress = Progress(0.0, 0.0).seen(_sample(5.0, running=0), 0, 31.0)
    assert progress.needs_probe(31.0, HUNG_S, IDLE_S, hung=True)
