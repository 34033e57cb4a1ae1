"""A governor over the virtual world of tests/fakes/world.py, and policies that do what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rlgov.deployments.live import LiveDeployment
from rlgov.deployments.live_open import open_live
from rlgov.governor.core import Core
from rlgov.governor.loop import Governor
from rlgov.governor.records import Command, Mode, Tick
from rlgov.hardware.events import XidEvent
from rlgov.records import Configuration, Limits
from rlgov.simulation.profile import load_profile

if TYPE_CHECKING:
    from tests.fakes.world import World

LIMITS = load_profile("h100-qwen3-32b").limits()


class Wishes:
    """A policy that asks for what it is told: an index, or a function of the number of the decision."""

    name = "wishes"
    guarded = True
    digest = "0123"

    def __init__(self, wish: Callable[[int], Any]) -> None:
        self._wish = wish
        self.decisions = 0

    def start_configuration(self, limits: Limits) -> Configuration:
        return limits.fastest

    def start(self, limits: Limits, n: int) -> None:
        """It forgets nothing."""

    def decide(
        self,
        observation: NDArray[np.float32],
        rows: NDArray[np.float64],  # noqa: ARG002  # the seam's
        mask: NDArray[np.bool_],  # noqa: ARG002  # as rows
    ) -> Any:
        assert np.isfinite(observation).all()
        self.decisions += 1
        return np.array([self._wish(self.decisions)])


class Faults:
    """Xid events a test plans."""

    def __init__(self) -> None:
        self.planned: list[XidEvent] = []

    def poll(self) -> tuple[XidEvent, ...]:
        told, self.planned = tuple(self.planned), []
        return told

    def close(self) -> None:
        """Nothing to close."""


@dataclass
class Governed:
    """Everything of one governed world."""

    world: World
    deployment: LiveDeployment
    core: Core
    governor: Governor
    faults: Faults
    orders: list[Command]
    ticks: list[Tick] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._run: Iterator[Tick] = self.governor.run()

    def tick(self, count: int = 1) -> Tick:
        """So many ticks; the last one."""
        for _ in range(count):
            self.ticks.append(next(self._run))
        return self.ticks[-1]

    def until(self, what: Callable[[Tick], bool], most: int = 60) -> Tick:
        """Tick until something holds."""
        for _ in range(most):
            if what(tick := self.tick()):
                return tick
        raise AssertionError(f"it did not come about in {most} ticks; the last one: {self.ticks[-1]}")

    @property
    def given_back(self) -> bool:
        return self.world.lock_mhz is None and self.world.batch_cap == 256

    def names(self) -> set[str]:
        """Conditions of the last tick."""
        return {condition.name for condition in self.ticks[-1].conditions}

    def condition(self, name: str) -> str:
        """What a condition of the last tick says."""
        return next(held.message for held in self.ticks[-1].conditions if held.name == name)


@pytest.fixture
def govern(fake_stack: ModuleType) -> Iterator[Callable[..., Governed]]:
    """Makes governed worlds; they are closed at the end of the test."""
    made: list[Governed] = []

    def make(
        wish: Callable[[int], Any] | Any = None,
        *,
        mode: Mode = Mode.ACTIVE,
        world: World | None = None,
        core: Callable[..., Core] = Core,
        journal: Any = None,
        metered: bool = True,
        clocks: Any = None,
        claim: Any = None,
        **more: Any,
    ) -> Governed:
        policy = wish
        if wish is not None and not hasattr(wish, "decide"):
            policy = Wishes(wish if callable(wish) else lambda _: wish)
        there = fake_stack.World() if world is None else world
        gpus = fake_stack.FakeGpus(there, metered=metered)
        if clocks is not None:
            gpus.clocks = clocks
        deployment = open_live(fake_stack.FakeStack(there), LIMITS, there.clock, hardware=gpus, acting=False)
        brain = core(deployment.limits, policy, mode=mode, clocks="direct", **more)
        faults = Faults()
        orders: list[Command] = []

        def take() -> tuple[Command, ...]:
            told = tuple(orders)
            orders.clear()
            return told

        loop = Governor(
            deployment,
            brain,
            there.clock,
            clocks=gpus.clocks,
            events=faults,
            journal=journal,
            orders=take,
            claim=claim,
        )
        made.append(Governed(there, deployment, brain, loop, faults, orders))
        return made[-1]

    yield make
    for governed in made:
        governed.deployment.close()
