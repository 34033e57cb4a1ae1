"""One request from its arrival to the end of its answer."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from rlgov.engine.gateway.admission import Ticket
from rlgov.engine.gateway.asked import read, wants_no_tokens
from rlgov.engine.gateway.ledger import Entry
from rlgov.engine.gateway.paths import Kind
from rlgov.engine.gateway.sse import StreamObserver
from rlgov.engine.gateway.tally import Tally, read_whole
from rlgov.engine.gateway.wire import ResponseHead, error_body, error_event, request_head
from rlgov.engine.samples import Outcome

if TYPE_CHECKING:
    from rlgov.engine.gateway.connection import ClientConnection
    from rlgov.engine.gateway.settings import GatewaySettings
    from rlgov.engine.gateway.upstream import Pool, Upstream, UpstreamConnection
    from rlgov.engine.gateway.wire import Request

_OK: Final = 200
_RETRIED: Final = frozenset(
    {500, 502, 504}
)  # 503 is how an engine in order refuses, which the client shall see
_NO_ROOM: Final = frozenset({429, 503})
_MISTAKES: Final = (400, 500)  # the client's, but for those of too many requests
_SAFE: Final = frozenset({b"GET", b"HEAD", b"OPTIONS"})
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
_HELD_BACK_BYTES: Final = 256 * 1024  # of a stream without a token yet, e.g. an echoed prompt


class Dispatcher(Protocol):
    """What an exchange needs from the gateway."""

    settings: GatewaySettings
    pool: Pool

    def now_s(self) -> float:
        """The time."""
        ...

    def offer(self, exchange: Exchange) -> bool:
        """Queue a new exchange; False when too many wait."""
        ...

    def park(self, exchange: Exchange, pause_s: float, *, fresh: bool) -> None:
        """Dispatch it again later: after the pause, or as soon as the route changes."""
        ...

    def count(self, engine_id: str, by: int) -> None:
        """Requests in flight to an engine become more or less."""
        ...

    def ended(self, exchange: Exchange, outcome: Outcome) -> None:
        """An exchange has ended; called once each."""
        ...


@dataclass(slots=True)
class _Answer:
    """What an engine has answered so far to one dispatch."""

    head: ResponseHead | None = None
    observer: StreamObserver | None = None  # it is a stream of generated tokens
    whole: bool = False  # it is kept back to its end
    committed: bool = False  # its head went to the client
    held_back: list[bytes] = field(default_factory=list)
    held_back_bytes: int = 0

    def hold_back(self, data: bytes) -> None:
        self.held_back.append(data)
        self.held_back_bytes += len(data)


@dataclass(frozen=True, slots=True)
class _Reply:
    """An answer in one piece."""

    head: ResponseHead
    body: bytes


class Exchange:
    """One request of a client. It is the connection's Serving and the upstream connection's Sink."""

    def __init__(
        self, dispatcher: Dispatcher, client: ClientConnection, request: Request, kind: Kind
    ) -> None:
        self.kind = kind
        self.entry = Entry(request.request_id, dispatcher.now_s())
        self.ticket: Ticket[Exchange] = Ticket(self, limited=kind.limited)
        self.why = ""  # it failed, for the log
        self._dispatcher = dispatcher
        self._client = client
        self._request = request
        self._asked = read(kind, request)
        self._connection: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._engine_id: str | None = None  # counted as in flight there
        self._refusals = 0  # connections that could not be made
        self._ended = False
        self._answer = _Answer()

    @property
    def stamped(self) -> bool:
        """Whether it has a record."""
        return self.kind.stamped and not self._asked.detached

    def start(self) -> None:
        """Get in line."""
        if not self._dispatcher.offer(self):
            self._answer_error(503, "too many requests are waiting; try again later", Outcome.REJECTED)

    def dispatch(self, upstream: Upstream) -> None:
        """Send the request to this engine."""
        entry = self.entry
        entry.dispatched_s = self._dispatcher.now_s()
        entry.engine_id = self._engine_id = upstream.engine_id
        self._dispatcher.count(upstream.engine_id, 1)
        self._answer = _Answer()
        connection = self._dispatcher.pool.take(upstream)
        if connection is not None:
            self._send(connection)
        else:
            self._connecting = asyncio.get_running_loop().create_task(self._connect(upstream))

    def give_up(self, why: str) -> None:
        """Tell the client that no engine will take it; only for one that waits."""
        outcome = Outcome.FAILED if self.entry.dispatches else Outcome.REJECTED
        self._answer_error(503, f"{why}; try again later", outcome)

    # The client's connection.

    def on_client_gone(self) -> None:
        """Stop: nobody waits for the answer. Closing the connection makes the engine stop, too."""
        self._detach()
        self._end(Outcome.CANCELLED)

    def on_client_slow(self) -> None:
        """Let the engine's bytes wait in the engine."""
        if self._connection is not None:
            self._connection.pause()

    def on_client_ready(self) -> None:
        """Read on."""
        if self._connection is not None:
            self._connection.resume()

    # The engine's connection.

    def on_head(self, head: ResponseHead) -> None:
        """Decide how the answer is to be read."""
        self._answer.head = head
        if not self.stamped or (head.status != _OK and head.status not in _RETRIED):
            self._commit()
        elif head.status == _OK and head.header(b"content-type").startswith(b"text/event-stream"):
            self._answer.observer = StreamObserver(
                self.kind,
                strips_usage=self._asked.strips_usage,
                max_event_bytes=self._dispatcher.settings.max_answer_bytes,
            )
        else:
            self._answer.whole = True

    def on_body(self, data: bytes) -> None:
        """Pass on what may be passed on."""
        observer = self._answer.observer
        if observer is not None:
            self._observe(observer, data)
        elif self._answer.whole:
            self._answer.hold_back(data)
            if self._answer.held_back_bytes > self._dispatcher.settings.max_answer_bytes:
                self._failed(f"engine {self._engine_id} sent an answer that is too large to be judged")
        else:
            self._client.send(data)

    def on_end(self) -> None:
        """Judge the complete answer."""
        self._connection = None
        if self._answer.observer is not None:
            self._end_stream(self._answer.observer)
        elif self._answer.whole:
            self._end_whole()
        else:
            self._leave_engine()
            self._client.end()
            # What has a record and comes by here was refused, or led elsewhere, without a token.
            self._end(_refusal(self._answer) if self.stamped else Outcome.SERVED)

    def on_lost(self, why: str, *, untouched: bool) -> None:
        """The engine is gone, or closed a kept connection just when it was used again."""
        self._connection = None
        if untouched and (self.stamped or self._request.method in _SAFE):
            # No dispatch that failed: the engine never saw it. A new connection tells whether it is there.
            self._leave_engine()
            self.entry.dispatches -= 1
            self.entry.dispatched_s = None
            self._dispatcher.park(self, 0.0, fresh=True)
            return
        self._failed(why)

    # Inside: on the way there.

    async def _connect(self, upstream: Upstream) -> None:
        try:
            connection = await self._dispatcher.pool.connect(upstream)
        except OSError as error:
            self._connecting = None
            self._refused(f"engine {upstream.engine_id} at {upstream.host}:{upstream.port}: {error}")
        else:
            self._connecting = None
            self._send(connection)

    def _send(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        self.entry.dispatches += 1
        body = self._asked.body
        head = request_head(
            self._request, connection.upstream.authority, len(body), identity=self.kind.limited
        )
        connection.send(self, (head, body) if body else (head,), head_request=self._request.method == b"HEAD")
        if self._client.slow:
            connection.pause()

    def _refused(self, why: str) -> None:
        """The engine cannot be reached. It has seen nothing, so this counts as waiting, not as a dispatch."""
        self._leave_engine()
        self.entry.dispatched_s = None
        self.why = why
        if self.kind in {Kind.PROBE, Kind.PLAIN}:
            self._answer_error(502, "the engine cannot be reached; try again later", Outcome.FAILED)
            return
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._refusals)
        self._refusals += 1
        self._dispatcher.park(self, pause_s, fresh=self._refusals == 1)

    # Inside: on the way back.

    def _observe(self, observer: StreamObserver, data: bytes) -> None:
        tally = observer.tally
        before = tally.token_events
        passed = observer.feed(data)
        if tally.token_events != before:
            now_s = self._dispatcher.now_s()
            if before == 0:
                self.entry.first_token_s = now_s
            self.entry.last_token_s = now_s
        if self._answer.committed:
            self._client.send(passed)
        elif tally.failure is None:
            self._answer.hold_back(passed)
            if tally.token_events or self._answer.held_back_bytes > _HELD_BACK_BYTES:
                self._commit()
        if tally.failure is not None:
            self._failed(tally.failure)

    def _end_stream(self, observer: StreamObserver) -> None:
        tally = observer.tally
        if tally.refusal is not None and not self._answer.committed:
            # The engine refuses the request in the middle of its 200: what it says belongs to the client.
            self._leave_engine()
            self._answer.hold_back(observer.rest())
            self._commit()
            self._client.end()
            self._end(Outcome.REJECTED)
            return
        why = tally.verdict(tokens_wanted=not wants_no_tokens(self._asked.body))
        if why is not None:
            self._failed(why)
            return
        self._note(tally)
        self._leave_engine()
        if not self._answer.committed:
            self._commit()
        self._client.send(observer.rest())
        self._client.end()
        self._end(Outcome.SERVED)

    def _end_whole(self) -> None:
        head = self._answer.head
        body = b"".join(self._answer.held_back)
        if head is None:
            return
        if head.status != _OK:
            self._failed(f"engine {self._engine_id} answered {head.status}", _Reply(head, body))
            return
        tally = Tally()
        read_whole(self.kind)(tally, _parsed(body))
        why = tally.verdict(tokens_wanted=not wants_no_tokens(self._asked.body))
        if why is not None:
            self._failed(why)
            return
        self._note(tally)
        self._leave_engine()
        self._pass_on(_Reply(head, body))
        self._end(Outcome.SERVED)

    def _note(self, tally: Tally) -> None:
        entry = self.entry
        entry.prompt_tokens = tally.prompt_tokens
        entry.output_tokens = tally.output_tokens
        entry.cached_tokens = tally.cached_tokens
        entry.finish_reason = tally.finish_reason

    def _commit(self) -> None:
        """Send the head, and what was held back: from here on the request cannot be sent again."""
        answer = self._answer
        head = answer.head
        if head is None:
            return
        answer.committed = True
        # A stream may lose its usage event on the way, so that the engine's length says nothing.
        length = None if self._answer.observer is not None else head.length_bytes
        self._client.begin(head, self._request.request_id, length_bytes=length)
        held, answer.held_back = b"".join(answer.held_back), []
        self._client.send(held)

    def _pass_on(self, reply: _Reply) -> None:
        self._client.begin(reply.head, self._request.request_id, length_bytes=len(reply.body))
        self._client.send(reply.body)
        self._client.end()

    def _failed(self, why: str, reply: _Reply | None = None) -> None:
        """The engine failed: send the request again if nothing of an answer has gone out, else say so."""
        observer = self._answer.observer
        self._detach()
        self.why = why
        if self._answer.committed:
            if observer is not None:
                self._note(observer.tally)
                self._client.break_off(error_event(502, f"the answer broke off: {why}"))
            else:
                self._client.break_off()
            self._end(Outcome.FAILED)
        elif self.stamped and self.entry.dispatches <= self._dispatcher.settings.redispatches:
            self.entry.first_token_s = self.entry.last_token_s = None
            self.entry.dispatched_s = None
            self._dispatcher.park(self, _FIRST_PAUSE_S * 2 ** (self.entry.dispatches - 1), fresh=True)
        elif reply is not None:
            self._pass_on(reply)
            self._end(Outcome.FAILED)
        else:
            self._answer_error(502, f"the engine failed the request: {why}", Outcome.FAILED)

    def _answer_error(self, status: int, message: str, outcome: Outcome) -> None:
        retry = (b"Retry-After", b"%d" % self._dispatcher.settings.retry_after_s)
        self._client.respond(
            status, error_body(status, message), request_id=self._request.request_id, headers=(retry,)
        )
        self._end(outcome)

    def _detach(self) -> None:
        """Let go of the engine, closing the connection if it is still at work."""
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
        self._leave_engine()

    def _leave_engine(self) -> None:
        engine_id, self._engine_id = self._engine_id, None
        if engine_id is not None:
            self._dispatcher.count(engine_id, -1)

    def _end(self, outcome: Outcome) -> None:
        if not self._ended:
            self._ended = True
            self._dispatcher.ended(self, outcome)


def _refusal(answer: _Answer) -> Outcome:
    """Whether the engine had no room, or the client asked for what cannot be."""
    status = 0 if answer.head is None else answer.head.status
    mistaken = _MISTAKES[0] <= status < _MISTAKES[1] and status not in _NO_ROOM
    return Outcome.INVALID if mistaken else Outcome.REJECTED


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
