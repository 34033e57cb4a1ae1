"""What a generation asks for, and the body that goes to the engine: with the usage we count tokens by."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rlgov.engine.gateway.paths import Kind

if TYPE_CHECKING:
    from rlgov.engine.gateway.wire import Request

_READ_BYTES: Final = 8 * 1024 * 1024  # reading more would keep every other stream waiting for too long
_USAGE: Final = b'{"stream_options":{"include_usage":true},'
_NO_TOKENS: Final = re.compile(rb'"max_(?:completion_|output_)?tokens"\s*:\s*0\s*[,}]')


@dataclass(frozen=True, slots=True)
class Asked:
    """A generation request, ready to be sent."""

    body: bytes
    strips_usage: bool = False  # the client did not ask for the usage that the engine will send
    detached: bool = False  # answered before it is done: its answer holds no tokens


def read(kind: Kind, request: Request) -> Asked:
    """Look at a request body, and add ``stream_options.include_usage`` to a stream that lacks it.

    A body that cannot be read goes to the engine as it is, which knows best what to say about it. So does a
    very large one; its answer then holds no counts of tokens unless the client asked for them.
    """
    body = request.body
    if len(body) > _READ_BYTES:
        return Asked(body)
    if kind is Kind.RESPONSES:
        background = b'"background"' in body and bool(_parsed(body).get("background"))
        return Asked(body, detached=background)
    # Quotes inside JSON strings are escaped, so these patterns match nothing but a key or a whole string.
    if kind is not Kind.CHOICES or b'"stream"' not in body:
        return Asked(body)
    document = _parsed(body)
    options = document.get("stream_options") or {}
    if document.get("stream") is not True or not isinstance(options, dict) or options.get("include_usage"):
        return Asked(body)
    if b'"stream_options"' not in body and body.lstrip()[:1] == b"{":
        return Asked(_USAGE + body.lstrip()[1:], strips_usage=True)
    document["stream_options"] = options | {"include_usage": True}
    if "continuous_usage_stats" in options:  # it had no effect without the usage, and shall have none
        document["stream_options"]["continuous_usage_stats"] = False
    return Asked(json.dumps(document).encode(), strips_usage=True)


def wants_no_tokens(body: bytes) -> bool:
    """Whether the client asked for zero output tokens, e.g. to have a prompt scored."""
    return _NO_TOKENS.search(body) is not None


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
