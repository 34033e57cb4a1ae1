"""The TP switch as a pure machine: what it never does, whatever happens in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.engine.switch.machine import (
    Action,
    Died,
    Done,
    Event,
    Failed,
    Life,
    Outcome,
    Role,
    Strategy,
    Switch,
    advance,
    plan,
)

MANY = 60  # more steps than any switch has, roll-back and its failures included

plans = st.builds(
    plan, st.sampled_from(list(Strategy)), asleep=st.booleans(), room_for_both=st.booleans()
).filter(lambda switch: switch.strategy is Strategy.SLEEP or switch.new is Life.ABSENT)
events = st.one_of(
    st.just(Done()),
    st.just(Failed("it broke")),
    st.builds(Died, st.sampled_from(list(Role)), st.just("killed")),
)


def _names(switch: Switch) -> list[str]:
    return [str(step) for step in switch.steps]


def _run(switch: Switch, *happenings: Event) -> Switch:
    for event in happenings:
        switch = advance(switch, event)
    return switch


def _until(switch: Switch, action: Action, role: Role) -> Switch:
    while switch.step is not None and (switch.step.action, switch.step.role) != (action, role):
        switch = advance(switch, Done())
    assert switch.step is not None
    return switch


def _finish(switch: Switch) -> Switch:
    return _run(switch, *[Done()] * MANY)


def test_side_by_side_never_holds_and_stops_the_old_engine_last() -> None:
    assert _names(plan(Strategy.SIDE_BY_SIDE)) == [
        "launch new", "ready new", "warm-up new", "cap new", "route new", "drain old", "stop old",
    ]  # fmt: skip


def test_restart_holds_drains_and_stops_before_it_launches() -> None:
    assert _names(plan(Strategy.RESTART)) == [
        "hold old", "drain old", "stop old", "launch new", "ready new", "warm-up new", "cap new", "route new",
    ]  # fmt: skip


def test_sleep_wakes_instead_of_launching_and_first_where_memory_allows() -> None:
    assert _names(plan(Strategy.SLEEP, asleep=True)) == [
        "hold old", "drain old", "sleep old", "wake new", "warm-up new", "cap new", "route new",
    ]  # fmt: skip
    assert _names(plan(Strategy.SLEEP, asleep=True, room_for_both=True)) == [
        "wake new", "warm-up new", "cap new", "route new", "drain old", "sleep old",
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", list(Strategy))
def test_without_trouble_the_new_engine_serves(strategy: Strategy) -> None:
    ended = _finish(plan(strategy))
    assert (ended.outcome, ended.routed, ended.reason) == (Outcome.DONE, Role.NEW, "")
    assert ended.old is (Life.ASLEEP if strategy is Strategy.SLEEP else Life.ABSENT)


@pytest.mark.parametrize("action", [Action.LAUNCH, Action.READY, Action.WARM_UP])
@pytest.mark.parametrize("strategy", list(Strategy))
def test_a_failure_before_the_move_brings_the_old_degree_back(strategy: Strategy, action: Action) -> None:
    ended = _finish(advance(_until(plan(strategy), action, Role.NEW), Failed("out of memory")))
    assert (ended.outcome, ended.routed, ended.old) == (Outcome.ROLLED_BACK, Role.OLD, Life.AWAKE)
    assert ended.reason == f"{action} new: out of memory"
    assert ended.new is Life.ABSENT


def test_a_new_engine_that_dies_after_the_move_gives_the_traffic_back_to_the_draining_one() -> None:
    draining = _until(plan(Strategy.SIDE_BY_SIDE), Action.DRAIN, Role.OLD)
    back = advance(draining, Died(Role.NEW, "killed"))
    assert _names(back) == ["route old"]
    assert _finish(back).outcome is Outcome.ROLLED_BACK


@pytest.mark.parametrize("strategy", list(Strategy))
def test_a_new_engine_that_dies_during_the_move_gives_the_traffic_back(strategy: Strategy) -> None:
    moving = _until(plan(strategy), Action.ROUTE, Role.NEW)
    back = advance(moving, Died(Role.NEW, "killed"))
    assert "route old" in _names(back)
    assert _finish(back).routed is Role.OLD


def test_a_drain_without_end_after_the_move_ends_in_a_stop_and_is_told() -> None:
    draining = _until(plan(Strategy.SIDE_BY_SIDE), Action.DRAIN, Role.OLD)
    after = advance(draining, Failed("3 requests still run after 600 s"))
    assert _names(after) == ["stop old"]
    assert after.notes == ("drain old: 3 requests still run after 600 s",)
    assert _finish(after).outcome is Outcome.DONE


def test_a_drain_without_end_before_the_move_gives_the_switch_up() -> None:
    draining = _until(plan(Strategy.RESTART), Action.DRAIN, Role.OLD)
    after = advance(draining, Failed("3 requests still run after 600 s"))
    assert _names(after) == ["route old"]
    assert _finish(after).outcome is Outcome.ROLLED_BACK


def test_an_engine_that_will_not_sleep_is_stopped() -> None:
    sleeping = _until(plan(Strategy.SLEEP, asleep=True), Action.SLEEP, Role.OLD)
    assert _names(advance(sleeping, Failed("unsupported")))[:2] == ["stop old", "wake new"]


def test_an_old_engine_that_dies_first_is_replaced_by_the_new_one() -> None:
    after = advance(_until(plan(Strategy.RESTART), Action.DRAIN, Role.OLD), Died(Role.OLD, "killed"))
    assert after.step is not None
    assert str(after.step) == "launch new"
    assert _finish(after).outcome is Outcome.DONE


def test_when_neither_degree_comes_up_it_is_broken_and_nothing_is_left() -> None:
    failing = _until(plan(Strategy.RESTART), Action.READY, Role.NEW)
    reviving = _until(advance(failing, Failed("out of memory")), Action.READY, Role.OLD)
    ended = _finish(advance(reviving, Failed("no such file")))
    assert (ended.outcome, ended.routed) == (Outcome.BROKEN, None)
    assert (ended.old, ended.new) == (Life.ABSENT, Life.ABSENT)
    assert "out of memory" in ended.reason


@given(plans, st.lists(events, max_size=MANY))
def test_the_engine_that_takes_requests_is_never_stopped_nor_put_to_sleep(
    switch: Switch, happenings: list[Event]
) -> None:
    for event in happenings:
        step = switch.step
        if step is not None and step.action in {Action.STOP, Action.SLEEP}:
            assert switch.routed is not step.role
        if switch.routed is not None:
            assert switch.life(switch.routed) is Life.AWAKE
        switch = advance(switch, event)


@given(plans, st.lists(events, max_size=MANY))
def test_an_engine_takes_requests_only_after_a_warm_up(switch: Switch, happenings: list[Event]) -> None:
    fit = {Role.OLD: True, Role.NEW: False}
    for event in happenings:
        step = switch.step
        if step is not None and isinstance(event, Done):
            if step.action is Action.WARM_UP:
                fit[step.role] = True
            elif step.action in {Action.STOP, Action.SLEEP, Action.LAUNCH, Action.WAKE}:
                fit[step.role] = False
            elif step.action is Action.ROUTE:
                assert fit[step.role]
        switch = advance(switch, event)


@given(plans, st.lists(events, max_size=MANY))
def test_it_ends_with_one_engine_serving_or_says_why_not(switch: Switch, happenings: list[Event]) -> None:
    ended = _finish(_run(switch, *happenings))
    assert ended.outcome is not None
    assert ended.steps == ()
    awake = [role for role in Role if ended.life(role) not in {Life.ABSENT, Life.ASLEEP}]
    if ended.outcome is Outcome.BROKEN:
        assert ended.routed is None
        assert awake == []
    else:
        assert awake == [ended.routed]
        assert ended.routed is (Role.NEW if ended.outcome is Outcome.DONE else Role.OLD)
    assert bool(ended.reason) == (ended.outcome is not Outcome.DONE)


@given(plans, st.lists(events, max_size=MANY))
def test_it_does_not_go_on_for_ever(switch: Switch, happenings: list[Event]) -> None:
    """Even if everything fails, time and again, a switch has an end."""
    for _ in range(MANY):
        for event in happenings or [Failed("again")]:
            switch = advance(switch, event)
    assert switch.outcome is not None or all(isinstance(event, Died) for event in happenings)
