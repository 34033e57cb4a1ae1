"""A live deployment that watches without acting, begins to act, and gives back at once."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from rlgov.deployments.live import LiveDeployment
from rlgov.deployments.live_open import open_live
from rlgov.errors import EngineError, HardwareError
from rlgov.records import Configuration
from rlgov.simulation.profile import load_profile

if TYPE_CHECKING:
    from tests.fakes.world import World

LIMITS = load_profile("h100-qwen3-32b").limits()
SLOW = Configuration(1080, 64, 4)
WRITES = {"lock", "renew", "restore", "configure"}


def watching(fake: ModuleType, world: World, **more: Any) -> LiveDeployment:
    gpus = fake.FakeGpus(world)
    return open_live(fake.FakeStack(world), LIMITS, world.clock, hardware=gpus, acting=False, **more)


def test_who_only_watches_writes_nothing_and_sees_what_is(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    world.tp_degree, world.batch_cap = 2, 128
    live = watching(fake_stack, world)
    window = live.start(0)
    assert window.configuration == Configuration(1980, 128, 2)
    assert live.advance(SLOW).configuration == Configuration(1980, 128, 2)
    live.close()
    assert not (WRITES - {"restore"}) & set(world.calls)  # restoring what was never locked changes nothing
    assert (world.tp_degree, world.batch_cap) == (2, 128)


def test_acting_begins_and_ends_at_once(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    with watching(fake_stack, world) as live:
        live.start(0)
        live.set_acting(acting=True)
        live.advance(SLOW)
        assert (world.lock_mhz, world.batch_cap) == (1080, 64)
        live.set_acting(acting=False)
        assert (world.lock_mhz, world.batch_cap) == (None, 256)
        calls = len(world.calls)
        live.advance(SLOW)
        assert not WRITES & set(world.calls[calls:])
        live.set_acting(acting=True)
        live.advance(SLOW)
        assert world.lock_mhz == 1080


def test_a_lease_is_renewed_while_the_clock_stays(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    with watching(fake_stack, world) as live:
        live.start(0)
        live.set_acting(acting=True)
        for _ in range(5):
            live.advance(SLOW)
    assert world.calls.count("lock") == 1
    assert world.calls.count("renew") == 4


def test_what_cannot_be_given_back_is_tried_in_every_interval(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    broken = True

    def before(name: str) -> None:
        if broken and name == "restore":
            raise HardwareError("the driver is busy")
        if broken and name == "configure":
            raise EngineError("no answer")

    with watching(fake_stack, world) as live:
        live.start(0)
        live.set_acting(acting=True)
        live.advance(SLOW)
        world.before_call = before
        live.set_acting(acting=False)  # never raises
        live.advance(SLOW)
        assert world.lock_mhz == 1080
        assert live.status.failures == {"clock/HardwareError": 2}
        assert "lease" in live.status.last_problem
        broken = False
        live.advance(SLOW)
        assert (world.lock_mhz, world.batch_cap) == (None, 256)
