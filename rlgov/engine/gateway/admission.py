"""Who goes next: holding while there is no engine, and the portable batch cap. Pure; time is passed in.

Requests leave in the order in which they arrived. One that has to be sent again keeps its place, which is
in front of everybody who came later.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeVar

OwnerT = TypeVar("OwnerT")


class Place(Enum):
    """Where a ticket is."""

    NEW = auto()
    WAITING = auto()  # in the queue
    PARKED = auto()  # its engine failed: until the route changes or some time has passed
    TAKEN = auto()
    GONE = auto()


@dataclass(slots=True, eq=False)
class Ticket(Generic[OwnerT]):
    """A request's place in the order of arrival."""

    owner: OwnerT
    limited: bool  # counts against the concurrency limit
    sequence: int = -1
    place: Place = Place.NEW
    held_since_s: float = 0.0  # since when it has been waiting for an engine
    wake_s: float = 0.0  # parked until then

    def __lt__(self, other: Ticket[OwnerT]) -> bool:
        return self.sequence < other.sequence


class Admission(Generic[OwnerT]):
    """The order of arrival, the route's state and the limit.

    Args:
        max_held: New requests that may wait while there is no route.
        max_waiting: New requests that may wait in all.
        hold_timeout_s: How long a request may wait for an engine.
    """

    def __init__(self, max_held: int, max_waiting: int, hold_timeout_s: float) -> None:
        self._max_held = max_held
        self._max_waiting = max_waiting
        self._hold_timeout_s = hold_timeout_s
        self._free: list[Ticket[OwnerT]] = []  # two heaps by sequence: those the limit does not concern ...
        self._limited: list[Ticket[OwnerT]] = []  # ... pass those who wait for a slot
        self._parked: set[Ticket[OwnerT]] = set()
        self._waiting = 0
        self._next_sequence = 0
        self._routed = False
        self._limit: int | None = None
        self._active = 0

    @property
    def held(self) -> int:
        """Requests that wait: for an engine or for a slot."""
        return self._waiting + len(self._parked)

    @property
    def active(self) -> int:
        """Slots in use: limited requests that were taken and not given back."""
        return self._active

    @property
    def routed(self) -> bool:
        """Whether an engine takes requests."""
        return self._routed

    def offer(self, ticket: Ticket[OwnerT], now_s: float) -> bool:
        """Queue a new request; False when too many wait already."""
        if self.held >= (self._max_waiting if self._routed else min(self._max_held, self._max_waiting)):
            return False
        ticket.sequence = self._next_sequence
        self._next_sequence += 1
        ticket.held_since_s = now_s
        self._queue(ticket)
        return True

    def take(self) -> Ticket[OwnerT] | None:
        """The next request to be sent now; None when nobody may go."""
        if not self._routed:
            return None
        ticket = _first(self._free)
        if self._limit is None or self._active < self._limit:
            other = _first(self._limited)
            if ticket is None or (other is not None and other < ticket):
                ticket = other
        if ticket is None:
            return None
        heapq.heappop(self._limited if ticket.limited else self._free)
        ticket.place = Place.TAKEN
        self._waiting -= 1
        self._active += ticket.limited
        return ticket

    def park(self, ticket: Ticket[OwnerT], now_s: float, wake_s: float, *, fresh: bool) -> None:
        """Put a taken request aside after its engine failed; it gives its slot back meanwhile.

        ``fresh`` starts its time limit anew: an engine had been found, and took it.
        """
        self._active -= ticket.limited
        ticket.place = Place.PARKED
        ticket.wake_s = wake_s
        if fresh:
            ticket.held_since_s = now_s
        self._parked.add(ticket)

    def release(self, ticket: Ticket[OwnerT]) -> None:
        """Forget a request, wherever it is; safe to call twice."""
        place, ticket.place = ticket.place, Place.GONE
        if place is Place.TAKEN:
            self._active -= ticket.limited
        elif place is Place.WAITING:
            self._waiting -= 1  # it stays in its heap and is skipped there
            self._tidy()
        elif place is Place.PARKED:
            self._parked.discard(ticket)

    def set_route(self, now_s: float, *, routed: bool) -> None:
        """An engine takes requests from now on, another one does, or none does."""
        if self._routed and not routed:
            # Who waited for a slot until now begins to wait for an engine.
            for ticket in (*self._free, *self._limited):
                ticket.held_since_s = now_s
        self._routed = routed
        if routed:
            self._unpark(list(self._parked))

    def set_limit(self, limit: int | None) -> None:
        """Let at most so many limited requests go at once; those beyond finish undisturbed."""
        self._limit = limit

    def wake(self, now_s: float) -> None:
        """Queue the parked requests whose time has come."""
        self._unpark([ticket for ticket in self._parked if ticket.wake_s <= now_s])

    def waiting(self) -> list[Ticket[OwnerT]]:
        """Everybody who waits, in order of arrival."""
        queued = [one for one in (*self._free, *self._limited) if one.place is Place.WAITING]
        return sorted([*queued, *self._parked])

    def expired(self, now_s: float) -> list[Ticket[OwnerT]]:
        """Requests that have waited too long for an engine, in order of arrival; release them."""
        before_s = now_s - self._hold_timeout_s
        waiting = sorted(self._parked) if self._routed else self.waiting()
        return [ticket for ticket in waiting if ticket.held_since_s <= before_s]

    def _queue(self, ticket: Ticket[OwnerT]) -> None:
        ticket.place = Place.WAITING
        self._waiting += 1
        heapq.heappush(self._limited if ticket.limited else self._free, ticket)

    def _unpark(self, tickets: list[Ticket[OwnerT]]) -> None:
        for ticket in tickets:
            self._parked.discard(ticket)
            self._queue(ticket)

    def _tidy(self) -> None:
        """Drop what was released inside the heaps once it outweighs what waits."""
        if len(self._free) + len(self._limited) > 2 * self._waiting + 64:
            for heap in (self._free, self._limited):
                heap[:] = [ticket for ticket in heap if ticket.place is Place.WAITING]
                heapq.heapify(heap)


def _first(heap: list[Ticket[OwnerT]]) -> Ticket[OwnerT] | None:
    """The first ticket that still waits; those released meanwhile are dropped on the way."""
    while heap and heap[0].place is not Place.WAITING:
        heapq.heappop(heap)
    return heap[0] if heap else None
