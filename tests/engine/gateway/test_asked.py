"""What a request asks for, and the usage it is made to ask for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.engine.gateway.asked import Asked, read, wants_no_tokens
from rlgov.engine.gateway.paths import Kind
from rlgov.engine.gateway.wire import Request


def asked(body: bytes | dict[str, Any], kind: Kind = Kind.CHOICES) -> Asked:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read(kind, Request(b"POST", b"/", [], data, http_1_1=True, keep_alive=True, peer=""))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
keys = st.sampled_from(["prompt", "messages", "n", 'a"b', "streams"])


@settings(deadline=None)
@given(body=st.dictionaries(keys, values), ascii_only=st.booleans())
def test_a_stream_asks_for_usage_and_for_nothing_else_that_is_new(
    *, body: dict[str, Any], ascii_only: bool
) -> None:
    sent = json.dumps(body | {"stream": True}, ensure_ascii=ascii_only, indent=1)
    try:
        data = sent.encode()
    except UnicodeEncodeError:
        return  # a lone surrogate; no client can send it so
    result = asked(data)
    assert result.strips_usage
    assert json.loads(result.body) == body | {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    "options", [None, {}, {"include_usage": False}, {"x": 1}, {"continuous_usage_stats": True}]
)
def test_options_without_usage_get_it(options: dict[str, Any] | None) -> None:
    result = asked({"stream": True, "stream_options": options, "prompt": "x"})
    sent = json.loads(result.body)
    assert result.strips_usage
    assert sent["stream_options"]["include_usage"] is True
    silent = {"continuous_usage_stats": False} if "continuous_usage_stats" in (options or {}) else {}
    assert sent["stream_options"] == {**(options or {}), "include_usage": True, **silent}
    assert sent["prompt"] == "x"


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x"}',
        b'{"prompt": "x", "stream": false}',
        b'{"stream": true, "stream_options": {"include_usage": true}}',
        b'{"metadata": {"stream": true}}',
        b'{"prompt": "\\"stream\\": true"}',
        b'{"stream": true',
        b'["stream", true]',
        b"",
        b"\xff\xfe\x00",
        b'{"stream": "true"}',
        b'{"stream": true, "stream_options": 5}',
        b"[" * 100_000 + b'"stream"',
        b'{"stream": true, "prompt": "' + b"x" * 9_000_000 + b'"}',
    ],
)
def test_everything_else_goes_as_it_is(body: bytes) -> None:
    result = asked(body)
    assert result.body == body
    assert not result.strips_usage


def test_a_response_in_the_background_holds_no_tokens() -> None:
    assert asked({"background": True}, Kind.RESPONSES).detached
    assert not asked({"background": False}, Kind.RESPONSES).detached
    assert not asked({"stream": True}, Kind.RESPONSES).detached


def test_who_wants_no_tokens() -> None:
    assert wants_no_tokens(b'{"max_tokens": 0, "echo": true}')
    assert wants_no_tokens(b'{"max_completion_tokens":0}')
    assert not wants_no_tokens(b'{"max_tokens": 01}')
    assert not wants_no_tokens(b'{"max_tokens": 10}')
