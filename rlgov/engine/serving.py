"""Where new requests go and under which cap: the one place that speaks to the gateway about it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rlgov.engine.caps import CapLease
from rlgov.engine.fleet import Phase
from rlgov.errors import RlgovError

if TYPE_CHECKING:
    from rlgov.clock import Clock
    from rlgov.engine.fleet import Engine, Fleet
    from rlgov.engine.gateway.gateway import Gateway

LOG = logging.getLogger(__name__)
EXPECTED_FAILURES = (RlgovError, OSError, TimeoutError)


class Serving:
    """Routes to at most one engine, and holds the batch cap over changes of engine.

    Args:
        gateway: Takes the requests.
        fleet: The engines.
        maximum: Largest cap.
        cap_timeout_s: Longest wait for an engine to take a cap; then the gateway limits.
        clock: For leases.
    """

    def __init__(
        self, gateway: Gateway, fleet: Fleet, maximum: int, cap_timeout_s: float, clock: Clock
    ) -> None:
        self._gateway = gateway
        self._fleet = fleet
        self._clock = clock
        self._cap_timeout_s = cap_timeout_s
        self._lease = CapLease.open(maximum)
        self._lock = asyncio.Lock()
        self._held_since_s: float | None = None
        self._held_s = 0.0
        self.routed: Engine | None = None
        self.since_s = clock.monotonic_s()  # when the routed engine began to take requests

    @property
    def batch_cap(self) -> int:
        """In force now."""
        return self._lease.in_force(self._clock.monotonic_s())

    @property
    def held_s(self) -> float:
        """Time without a routed engine so far."""
        now_s = self._clock.monotonic_s()
        return self._held_s + (0.0 if self._held_since_s is None else now_s - self._held_since_s)

    def in_flight(self, engine: Engine) -> int:
        """Requests dispatched to an engine and not finished."""
        return self._gateway.in_flight(engine.engine_id)

    def route(self, engine: Engine | None) -> None:
        """New requests go to this engine; None holds them."""
        now_s = self._clock.monotonic_s()
        if engine is None and self._held_since_s is None:
            self._held_since_s = now_s
        elif engine is not None and self._held_since_s is not None:
            self._held_s += now_s - self._held_since_s
            self._held_since_s = None
        before, self.routed = self.routed, engine
        if engine is not None and engine is not before:
            self.since_s = now_s
        self._gateway.route(engine.upstream if engine is not None else None)
        if before is not None and before is not engine and before.phase is Phase.ACTIVE:
            before.phase = Phase.DRAINING
        if engine is not None:
            engine.phase = Phase.ACTIVE
        self._fleet.changed()

    def lost(self, engine: Engine) -> None:
        """An engine died: if it was the routed one, new requests are held."""
        if self.routed is engine:
            self.route(None)

    async def ask_cap(self, cap: int, lease_s: float | None) -> None:
        """Put a cap in force, for the time of a lease if one is given."""
        self._lease = self._lease.asked(cap, lease_s, self._clock.monotonic_s())
        if self.routed is not None:
            await self.apply_cap(self.routed)

    async def apply_cap(self, engine: Engine) -> None:
        """Put the cap in force on one engine: by its plugin, else by the gateway."""
        async with self._lock:
            now_s = self._clock.monotonic_s()
            wanted = self._lease.wanted(now_s)
            by_engine = engine.cap_by != "gateway" and await self._set(engine, wanted, now_s)
            if engine is self.routed or not by_engine:
                self._gateway.set_limit(None if by_engine else wanted)

    async def _set(self, engine: Engine, wanted: int | None, now_s: float) -> bool:
        lease_s = None if wanted is None else self._lease.remaining_s(now_s)
        try:
            async with asyncio.timeout(self._cap_timeout_s):
                await engine.running.set_cap(wanted, lease_s)
        except EXPECTED_FAILURES as error:
            engine.note = f"the cap is held by the gateway: {str(error) or 'no answer in time'}"
            LOG.warning("engine %s: %s", engine.engine_id, engine.note)
            return False
        return True

    async def expire(self) -> None:
        """Let go of a cap whose lease has run out."""
        if self._lease.expired(self._clock.monotonic_s()):
            LOG.warning("the lease of batch cap %d has run out: no cap from now on", self._lease.cap)
            self._lease = CapLease.open(self._lease.maximum)
            self._gateway.set_limit(None)
            if self.routed is not None:
                await self.apply_cap(self.routed)  # a plugin has let go by itself; vLLM's own cap has not
