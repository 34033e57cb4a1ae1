"""Who goes next: order, limit, holding, time."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rlgov.engine.gateway.admission import Admission, Place, Ticket


def admission(max_held: int = 100, max_waiting: int = 1000, hold_timeout_s: float = 10.0) -> Admission[int]:
    return Admission(max_held, max_waiting, hold_timeout_s)


def offered(queue: Admission[int], count: int, *, limited: bool = True, first: int = 0) -> list[Ticket[int]]:
    tickets = [Ticket(first + k, limited=limited) for k in range(count)]
    assert all(queue.offer(ticket, 0.0) for ticket in tickets)
    return tickets


def taken(queue: Admission[int]) -> list[int]:
    owners = []
    while (ticket := queue.take()) is not None:
        owners.append(ticket.owner)
    return owners


def test_without_a_route_nobody_goes_and_with_one_all_go_in_order() -> None:
    queue = admission()
    offered(queue, 5)
    assert taken(queue) == []
    assert queue.held == 5
    queue.set_route(0.0, routed=True)
    assert taken(queue) == [0, 1, 2, 3, 4]
    assert queue.held == 0


def test_the_limit_lets_the_next_go_when_one_ends() -> None:
    queue = admission()
    queue.set_route(0.0, routed=True)
    queue.set_limit(2)
    tickets = offered(queue, 4)
    assert taken(queue) == [0, 1]
    queue.release(tickets[1])
    assert taken(queue) == [2]
    queue.set_limit(1)
    queue.release(tickets[0])
    assert taken(queue) == []  # lowering it disturbs nobody, and nobody follows
    queue.set_limit(None)
    assert taken(queue) == [3]


def test_the_limit_does_not_concern_other_requests() -> None:
    queue = admission()
    queue.set_route(0.0, routed=True)
    queue.set_limit(1)
    offered(queue, 2)
    offered(queue, 2, limited=False, first=10)
    assert taken(queue) == [0, 10, 11]


def test_too_many_are_refused() -> None:
    queue = admission(max_held=2, max_waiting=3)
    offered(queue, 2)
    assert not queue.offer(Ticket(9, limited=True), 0.0)
    queue.set_route(0.0, routed=True)
    queue.set_limit(0)
    offered(queue, 1)
    assert not queue.offer(Ticket(9, limited=True), 0.0)


def test_who_is_sent_again_keeps_its_place() -> None:
    queue = admission()
    queue.set_route(0.0, routed=True)
    queue.set_limit(1)
    first, *_ = offered(queue, 3)
    assert taken(queue) == [0]
    queue.park(first, 1.0, 2.0, fresh=True)
    assert queue.active == 0
    queue.set_limit(0)
    queue.wake(1.9)
    assert queue.held == 3
    queue.wake(2.0)
    queue.set_limit(None)
    assert taken(queue) == [0, 1, 2]


def test_a_new_route_wakes_the_parked() -> None:
    queue = admission()
    queue.set_route(0.0, routed=True)
    (ticket,) = offered(queue, 1)
    taken(queue)
    queue.park(ticket, 0.0, 1000.0, fresh=True)
    queue.set_route(0.0, routed=False)
    queue.set_route(0.0, routed=True)
    assert taken(queue) == [0]


def test_waiting_for_an_engine_ends() -> None:
    queue = admission(hold_timeout_s=10.0)
    tickets = offered(queue, 2)
    assert queue.expired(9.9) == []
    assert queue.expired(10.0) == tickets
    queue.release(tickets[0])
    assert queue.expired(10.0) == tickets[1:]


def test_waiting_for_a_slot_does_not_end_but_its_time_begins_with_the_loss_of_the_route() -> None:
    queue = admission(hold_timeout_s=10.0)
    queue.set_route(0.0, routed=True)
    queue.set_limit(0)
    tickets = offered(queue, 1)
    assert queue.expired(1000.0) == []
    queue.set_route(1000.0, routed=False)
    assert queue.expired(1009.0) == []
    assert queue.expired(1010.0) == tickets


@pytest.mark.parametrize("waits", ["queue", "parked", "taken"])
def test_whoever_leaves_is_forgotten(waits: str) -> None:
    queue = admission()
    queue.set_route(0.0, routed=waits != "queue")
    queue.set_limit(1)
    ticket, other = offered(queue, 2)
    if waits != "queue":
        assert queue.take() is ticket
    if waits == "parked":
        queue.park(ticket, 0.0, 5.0, fresh=True)
    queue.release(ticket)
    queue.release(ticket)
    queue.set_route(0.0, routed=True)
    assert queue.take() is other
    assert (queue.active, queue.held) == (1, 0)


class Machine(RuleBasedStateMachine):
    """Any order of events against the plainest model: lists."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: Admission[int] = admission(10**6, 10**6)
        self.tickets: list[Ticket[int]] = []
        self.routed = False
        self.limit: int | None = None
        self.now_s = 0.0

    def at(self, place: Place) -> list[Ticket[int]]:
        return [ticket for ticket in self.tickets if ticket.place is place]

    @rule(limited=st.booleans())
    def offer(self, *, limited: bool) -> None:
        ticket = Ticket(len(self.tickets), limited=limited)
        assert self.queue.offer(ticket, self.now_s)
        self.tickets.append(ticket)

    @rule()
    def take(self) -> None:
        active = sum(ticket.limited for ticket in self.at(Place.TAKEN))
        room = self.limit is None or active < self.limit
        may = [t for t in self.at(Place.WAITING) if self.routed and (room or not t.limited)]
        assert self.queue.take() is min(may, key=lambda ticket: ticket.sequence, default=None)

    @precondition(lambda self: self.at(Place.TAKEN))
    @rule(data=st.data(), pause_s=st.integers(0, 5))
    def park(self, data: st.DataObject, pause_s: int) -> None:
        ticket = data.draw(st.sampled_from(self.at(Place.TAKEN)))
        self.queue.park(ticket, self.now_s, self.now_s + pause_s, fresh=False)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.queue.release(data.draw(st.sampled_from(self.tickets)))

    @rule(routed=st.booleans())
    def route(self, *, routed: bool) -> None:
        self.queue.set_route(self.now_s, routed=routed)
        self.routed = routed

    @rule(limit=st.none() | st.integers(0, 3))
    def set_limit(self, limit: int | None) -> None:
        self.queue.set_limit(limit)
        self.limit = limit

    @rule(by_s=st.integers(0, 3))
    def wait(self, by_s: int) -> None:
        self.now_s += by_s
        self.queue.wake(self.now_s)
        assert all(ticket.wake_s > self.now_s for ticket in self.at(Place.PARKED))

    @invariant()
    def counts_agree(self) -> None:
        assert self.queue.held == len(self.at(Place.WAITING)) + len(self.at(Place.PARKED))
        assert self.queue.active == sum(ticket.limited for ticket in self.at(Place.TAKEN))


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAdmission = Machine.TestCase
