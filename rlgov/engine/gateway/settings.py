"""What can be set about the gateway."""

from __future__ import annotations

from dataclasses import dataclass

from rlgov.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Bounds and timeouts of the gateway. It speaks plain HTTP/1.1: put a TLS terminator in front of it."""

    host: str = "127.0.0.1"
    """Address to listen at. Reach beyond this machine has to be asked for."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    max_held: int = 1024
    """Requests that may wait while no engine takes any; the next one gets 503."""
    hold_timeout_s: float = 120.0
    """How long a request waits for an engine before it gets 503."""
    max_waiting: int = 16384
    """Requests that may wait in all, those behind a concurrency limit included."""
    redispatches: int = 2
    """How often a generation is sent again after an engine failed before its first token."""
    max_body_bytes: int = 64 * MIB
    """Largest request body; a larger one gets 413."""
    max_buffered_bytes: int = 512 * MIB
    """Request bodies held at once, all together; beyond, a request gets 503."""
    max_answer_bytes: int = 64 * MIB
    """Largest answer, or event of a stream, that is held back until it can be judged."""
    max_head_bytes: int = 64 * KIB
    """Largest request head; a larger one gets 431."""
    max_headers: int = 128
    """Most header fields of a request; more get 431."""
    max_connections: int = 8192
    """Client connections at once; the next one is answered 503 and closed."""
    max_pipelined_bytes: int = 256 * KIB
    """Bytes read ahead while a request of the same connection is being answered."""
    header_timeout_s: float = 10.0
    """From the first byte of a request to the end of its head."""
    body_timeout_s: float = 60.0
    """From the end of the head to the end of the body."""
    idle_timeout_s: float = 75.0
    """Between two requests of a connection."""
    stall_timeout_s: float = 300.0
    """How long a client may leave its answer unread before it counts as gone."""
    connect_timeout_s: float = 5.0
    """Connecting to an engine."""
    upstream_idle_timeout_s: float | None = None
    """Silence of an engine in the middle of an answer. Off: a long prefill is silent for minutes."""
    upstream_keepalive_s: float = 3.0
    """How long an unused connection to an engine is kept.

    Below vLLM's 5 s, so that the engine never closes first.
    """
    metrics_timeout_s: float = 2.0
    """Fetching the engine's own metrics page."""
    retry_after_s: int = 5
    """What Retry-After says beside a 502 or 503."""
    records: int = 100_000
    """Closed request records that are kept for those who ask."""

    def __post_init__(self) -> None:
        optional = {"upstream_idle_timeout_s"}
        may_be_zero = {"port", "redispatches", "max_held"}
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, str) or (value is None and name in optional):
                continue
            if value < 0 or (value == 0 and name not in may_be_zero):
                msg = f"gateway setting {name} must be above 0, got {value}"
                raise ConfigError(msg)
