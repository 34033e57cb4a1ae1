"""Which paths lead to an engine, and which of them generate tokens."""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Final
from urllib.parse import unquote_to_bytes

HEALTH_PATH: Final = b"/rlgov/healthz"
METRICS_PATH: Final = b"/metrics"

_ABSOLUTE: Final = re.compile(rb"^[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
_UNPRINTABLE: Final = re.compile(rb"[\x00-\x1f\x7f]")
_DECODINGS: Final = 4  # nobody in good faith encodes a path more often

_CONTROL: Final = frozenset(
    {
        b"abort_requests",
        b"collective_rpc",
        b"fault_tolerance",
        b"finish_weight_update",
        b"get_world_size",
        b"init_weight_transfer_engine",
        b"is_paused",
        b"is_scaling_elastic_ep",
        b"is_sleeping",
        b"kv_event_sources",
        b"pause",
        b"release_kv_cache_memory",
        b"resume",
        b"rlgov",
        b"runtime_config",
        b"scale_elastic_ep",
        b"server_info",
        b"shutdown_weight_transfer_engine",
        b"sleep",
        b"start_draft_weight_update",
        b"start_profile",
        b"start_weight_update",
        b"stop_profile",
        b"update_weight_version",
        b"update_weights",
        b"wake_up",
        b"weight_checker",
        b"weight_info",
    }
)


class Kind(Enum):
    """How a request is treated."""

    CHOICES = auto()  # completions and chat completions: stamped, judged, sent again
    RESPONSES = auto()  # the Responses API: the same with other events
    UNREAD = auto()  # generates tokens in a form that is not read here: counts against the limit only
    PLAIN = auto()  # everything else
    PROBE = auto()  # plain, and never held: who asks wants to know now

    @property
    def stamped(self) -> bool:
        """Whether requests of this kind have records."""
        return self in {Kind.CHOICES, Kind.RESPONSES}

    @property
    def limited(self) -> bool:
        """Whether requests of this kind count against the concurrency limit."""
        return self in {Kind.CHOICES, Kind.RESPONSES, Kind.UNREAD}


_POSTED: Final = {
    b"/v1/completions": Kind.CHOICES,
    b"/v1/chat/completions": Kind.CHOICES,
    b"/v1/responses": Kind.RESPONSES,
    b"/v1/chat/completions/batch": Kind.UNREAD,
    b"/v1/messages": Kind.UNREAD,
    b"/inference/v1/generate": Kind.UNREAD,
    b"/invocations": Kind.UNREAD,
    b"/cohere/v2/chat": Kind.UNREAD,
}
_PROBES: Final = frozenset({b"/health", b"/ping", b"/version", b"/load"})


def decoded_path(target: bytes) -> bytes | None:
    """The path of a request target as the engine's server sees it; None when it is not a path."""
    path = _ABSOLUTE.sub(b"", target, count=1).partition(b"?")[0].partition(b"#")[0]
    if not path and target != path:
        path = b"/"
    if not path.startswith(b"/"):
        return None
    path = unquote_to_bytes(path)
    return None if _UNPRINTABLE.search(path) else path


def origin_form(target: bytes) -> bytes:
    """The target as path and query only, as an engine expects it."""
    if target.startswith(b"/"):
        return target
    rest = _ABSOLUTE.sub(b"", target, count=1)
    return rest if rest.startswith(b"/") else b"/" + rest


def leads_to_control(path: bytes) -> bool:
    """Whether a decoded path could, by any reading of it, reach an endpoint that steers the engine.

    Every segment counts, not only the first: an engine may be mounted below a prefix.
    """
    for _ in range(_DECODINGS):
        segments = _segments(path)
        if any(name in _CONTROL or name.startswith(b"reset_") for name in segments):
            return True
        once_more = unquote_to_bytes(path)
        if once_more == path:
            return False
        path = once_more
    return True  # still encoded: not meant well


def _segments(path: bytes) -> list[bytes]:
    parts = path.replace(b"\\", b"/").split(b"/")
    return [part.partition(b";")[0].strip().lower() for part in parts]


def kind_of(method: bytes, path: bytes) -> Kind:
    """How a request to this decoded path is treated."""
    if path in _PROBES:
        return Kind.PROBE
    return _POSTED.get(path, Kind.PLAIN) if method == b"POST" else Kind.PLAIN
