"""A change of the TP degree as a pure state machine: which step comes next, and what to take back.

Two engines take part: the *old* one, which serves, and the *new* one of the other degree. The machine
says which step to do; whoever carries it out tells what happened; nothing here does I/O. It holds, for
every order of events:

* At most one engine takes new requests.
* An engine that takes new requests is never stopped and never put to sleep.
* A failure before the new engine takes requests brings the old degree back.
* It ends: ``done``, ``rolled-back`` (the old degree serves) or ``broken`` (nothing serves; the
  supervisor starts an engine again).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Strategy(StrEnum):
    """How two engines share the GPUs."""

    SIDE_BY_SIDE = "side-by-side"  # both at once; requests are never held
    SLEEP = "sleep"  # every degree has an engine, all but one asleep
    RESTART = "restart"  # one after the other; requests are held in between


class Role(StrEnum):
    """The two engines of a switch."""

    OLD = "old"
    NEW = "new"


class Action(StrEnum):
    """What a step does."""

    HOLD = "hold"  # the gateway keeps new requests back
    LAUNCH = "launch"  # start the process
    READY = "ready"  # wait until it is healthy
    WAKE = "wake"
    WARM_UP = "warm-up"  # a real completion
    CAP = "cap"  # put the batch cap in force
    ROUTE = "route"  # new requests go to it from now on
    DRAIN = "drain"  # wait until it has nothing left to do
    SLEEP = "sleep"
    STOP = "stop"


class Outcome(StrEnum):
    """How a switch ended."""

    DONE = "done"
    ROLLED_BACK = "rolled-back"
    BROKEN = "broken"


class Life(StrEnum):
    """What the machine knows of an engine."""

    ABSENT = "absent"
    ASLEEP = "asleep"
    STARTING = "starting"  # launched or woken, not yet fit to serve
    AWAKE = "awake"
    STOPPING = "stopping"  # a stop has begun: it serves nothing any more


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do with one engine."""

    action: Action
    role: Role

    def __str__(self) -> str:
        return f"{self.action} {self.role}"


@dataclass(frozen=True, slots=True)
class Switch:
    """A switch at one moment. ``steps[0]`` is being done; none are left once ``outcome`` is set."""

    strategy: Strategy
    steps: tuple[Step, ...]
    old: Life
    new: Life
    routed: Role | None
    rolling_back: bool = False
    outcome: Outcome | None = None
    reason: str = ""  # of the first failure
    notes: tuple[str, ...] = ()  # what went wrong without changing the outcome

    @property
    def step(self) -> Step | None:
        """What to do now; None once the switch has ended."""
        return self.steps[0] if self.steps else None

    def life(self, role: Role) -> Life:
        """What is known of an engine."""
        return self.old if role is Role.OLD else self.new


@dataclass(frozen=True, slots=True)
class Done:
    """The current step succeeded."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The current step failed, or did not end within its bound."""

    reason: str


@dataclass(frozen=True, slots=True)
class Died:
    """An engine's process has gone, whatever the current step is."""

    role: Role
    reason: str


Event = Done | Failed | Died

_O, _N = Role.OLD, Role.NEW
_START = (Step(Action.LAUNCH, _N), Step(Action.READY, _N))
_TAKE_OVER = (Step(Action.WARM_UP, _N), Step(Action.CAP, _N), Step(Action.ROUTE, _N))
_HOLD_AND_DRAIN = (Step(Action.HOLD, _O), Step(Action.DRAIN, _O))


def plan(strategy: Strategy, *, asleep: bool = False, room_for_both: bool = False) -> Switch:
    """The switch at its first step.

    Args:
        strategy: How the engines share the GPUs.
        asleep: The new degree's engine exists and is asleep.
        room_for_both: Both may be awake at once, so that requests need not be held.
    """
    begin = (Step(Action.WAKE, _N),) if asleep else _START
    rest = Action.SLEEP if strategy is Strategy.SLEEP else Action.STOP
    if strategy is Strategy.SIDE_BY_SIDE or room_for_both:
        steps = (*begin, *_TAKE_OVER, Step(Action.DRAIN, _O), Step(rest, _O))
    else:
        steps = (*_HOLD_AND_DRAIN, Step(rest, _O), *begin, *_TAKE_OVER)
    return _enter(Switch(strategy, steps, Life.AWAKE, Life.ASLEEP if asleep else Life.ABSENT, Role.OLD))


def advance(switch: Switch, event: Event) -> Switch:
    """The switch after an event; a switch that has ended stays as it is."""
    if switch.outcome is not None:
        return switch
    if isinstance(event, Died):
        return switch if switch.life(event.role) is Life.ABSENT else _settle(_died(switch, event))
    step = switch.steps[0]
    if isinstance(event, Done):
        after = _with_life(switch, step.role, _LIFE_AFTER.get(step.action))
        if step.action is Action.ROUTE:
            after = replace(after, routed=step.role)
        return _settle(_enter(replace(after, steps=switch.steps[1:])))
    return _settle(_enter(_failed(switch, step, event.reason)))


_LIFE_AFTER = {
    Action.LAUNCH: Life.STARTING,
    Action.WAKE: Life.STARTING,
    Action.WARM_UP: Life.AWAKE,
    Action.SLEEP: Life.ASLEEP,
    Action.STOP: Life.ABSENT,
}


def _enter(switch: Switch) -> Switch:
    """What is true from the moment the next step begins."""
    step = switch.step
    if step is None:
        return switch
    if step.action in {Action.HOLD, Action.ROUTE}:
        # Until a move is done nobody knows which side it is on: a failure has to route anew.
        return replace(switch, routed=None)
    if step.action in {Action.LAUNCH, Action.WAKE}:
        return _with_life(switch, step.role, Life.STARTING)
    if step.action in {Action.STOP, Action.SLEEP}:
        return _with_life(switch, step.role, Life.STOPPING)
    return switch


def _failed(switch: Switch, step: Step, reason: str) -> Switch:
    told = f"{step}: {reason}"
    left = switch.steps[1:]
    if step.action is Action.SLEEP:
        # An engine that will not sleep still holds its GPUs: stop it instead.
        steps = (Step(Action.STOP, step.role), *left)
        return replace(switch, steps=steps, notes=(*switch.notes, told))
    if step.action is Action.STOP:
        # The executor kills what does not stop; whatever is left of it must not block serving.
        after = _with_life(switch, step.role, Life.ABSENT)
        return replace(after, steps=left, notes=(*switch.notes, told))
    if step.action is Action.CAP:
        return replace(switch, steps=left, notes=(*switch.notes, told))  # caps fail open
    if step.action is Action.DRAIN and switch.routed is Role.NEW:
        # Its bound has passed: the shutdown timeout ends what is left, sleeping would abort it at once.
        return replace(switch, steps=(Step(Action.STOP, Role.OLD),), notes=(*switch.notes, told))
    if switch.rolling_back:
        return _rollback_failed(switch, step, told)
    return _roll_back(switch, told)


def _rollback_failed(switch: Switch, step: Step, told: str) -> Switch:
    noted = replace(switch, notes=(*switch.notes, told))
    if step.action is Action.WAKE:
        steps = (Step(Action.STOP, Role.OLD), *_revive(Life.ABSENT))
        return replace(noted, steps=steps)
    return _break(noted)


def _died(switch: Switch, event: Died) -> Switch:
    told = f"the {event.role} engine died: {event.reason}"
    current = switch.steps[0]
    stopping = switch.life(event.role) is Life.STOPPING and current.role is event.role
    after = _with_life(switch, event.role, Life.ABSENT)
    if after.routed is event.role:
        after = replace(after, routed=None)
    if stopping:
        return _enter(replace(after, steps=switch.steps[1:]))  # a dead engine is a stopped engine
    if event.role is Role.OLD and not switch.rolling_back:
        # Nothing of it is left to drain or stop; the new one is the shortest way back to serving.
        steps = tuple(step for step in switch.steps if step.role is Role.NEW)
        return _enter(replace(after, steps=steps, notes=(*switch.notes, told)))
    if switch.rolling_back:
        if event.role is Role.NEW:
            steps = tuple(step for step in switch.steps if step.role is Role.OLD)
            return _enter(replace(after, steps=steps, notes=(*switch.notes, told)))
        return _enter(_break(replace(after, notes=(*switch.notes, told))))
    return _enter(_roll_back(after, told))


def _roll_back(switch: Switch, told: str) -> Switch:
    """Drop the new engine, let the old degree serve."""
    back = replace(switch, rolling_back=True, reason=switch.reason or told)
    drop = _drop(switch)
    if switch.old is Life.AWAKE:
        route = () if switch.routed is Role.OLD else (Step(Action.ROUTE, Role.OLD),)
        return replace(back, steps=(*route, *drop))
    return replace(back, steps=(*drop, *_revive(switch.old)))


def _drop(switch: Switch) -> tuple[Step, ...]:
    if switch.new in {Life.ABSENT, Life.ASLEEP}:
        return ()
    woken = switch.strategy is Strategy.SLEEP and switch.new is Life.AWAKE
    return (Step(Action.SLEEP if woken else Action.STOP, Role.NEW),)


def _revive(old: Life) -> tuple[Step, ...]:
    """Steps that bring the old degree's engine back from where it is."""
    take_over = tuple(Step(step.action, Role.OLD) for step in _TAKE_OVER)
    if old is Life.ASLEEP:
        return (Step(Action.WAKE, Role.OLD), *take_over)
    stop = (Step(Action.STOP, Role.OLD),) if old is not Life.ABSENT else ()
    return (*stop, Step(Action.LAUNCH, Role.OLD), Step(Action.READY, Role.OLD), *take_over)


def _break(switch: Switch) -> Switch:
    """Nothing serves and nothing can be brought back: leave no half-started engine behind."""
    left = tuple(
        Step(Action.STOP, role)
        for role in (Role.NEW, Role.OLD)
        if switch.life(role) not in {Life.ABSENT, Life.ASLEEP} and switch.routed is not role
    )
    return replace(switch, steps=left)


def _settle(switch: Switch) -> Switch:
    """Set the outcome once nothing is left to do."""
    if switch.steps:
        return switch
    outcome = {
        Role.NEW: Outcome.DONE,
        Role.OLD: Outcome.ROLLED_BACK,
        None: Outcome.BROKEN,
    }[switch.routed]
    reason = switch.reason
    if outcome is not Outcome.DONE and not reason:
        reason = switch.notes[-1] if switch.notes else "no engine is left"
    return replace(switch, outcome=outcome, reason=reason)


def _with_life(switch: Switch, role: Role, life: Life | None) -> Switch:
    if life is None:
        return switch
    return replace(switch, old=life) if role is Role.OLD else replace(switch, new=life)
