from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.workload.load_stream import TAIL_BYTES, StreamScan

TOKEN = {"id": "cmpl-1", "choices": [{"index": 0, "text": 'a data: "b"', "finish_reason": None}]}
LAST = {"choices": [{"index": 0, "text": "é", "finish_reason": "length"}]}
USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}},
}


def _stream(*events: object) -> bytes:
    texts = [event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events]
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def _scan(*pieces: bytes) -> StreamScan:
    scan = StreamScan()
    for piece in pieces:
        scan.feed(piece)
    return scan


@settings(deadline=None)
@given(st.integers(0, 200), st.lists(st.integers(0, 60_000), max_size=30))
def test_it_does_not_matter_where_the_stream_is_cut(tokens: int, cuts: list[int]) -> None:
    data = _stream(*[TOKEN] * tokens, LAST, USAGE, "[DONE]")
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    scan = _scan(*(data[a:b] for a, b in pairwise(edges)))
    assert scan.events == tokens + 3
    assert scan.first_is_token
    end = scan.end()
    assert end.done
    assert (end.finish_reason, end.prompt_tokens, end.output_tokens, end.cached_tokens) == (
        "length",
        11,
        3,
        8,
    )


@settings(deadline=None)
@given(st.integers(1, 12))
def test_small_reads_of_every_size(size: int) -> None:
    data = _stream(TOKEN, LAST, USAGE, "[DONE]")
    scan = _scan(*(data[i : i + size] for i in range(0, len(data), size)))
    assert scan.events == 4
    assert scan.end().output_tokens == 3


@settings(deadline=None)
@given(st.integers(1, 12))
def test_lines_may_end_with_carriage_return_and_line_feed(size: int) -> None:
    data = _stream(TOKEN, LAST, USAGE, "[DONE]").replace(b"\n", b"\r\n")
    scan = _scan(*(data[i : i + size] for i in range(0, len(data), size)))
    assert scan.events == 4
    assert scan.first_is_token
    assert scan.end().output_tokens == 3


def test_the_head_is_known_as_soon_as_its_event_is_complete() -> None:
    data = _stream(TOKEN)
    assert not _scan(data[:-1]).head_seen
    scan = _scan(data[:-1], data[-1:])
    assert scan.head_seen
    assert scan.first_is_token


def test_a_comment_is_not_taken_for_the_first_token() -> None:
    comments = (b": ping\n\n", b": pi", b"ng\n\n")
    assert not _scan(*comments).head_seen
    assert _scan(*comments, _stream(TOKEN)).first_is_token


@pytest.mark.parametrize(
    "first",
    [
        "[DONE]",
        {"choices": [{"text": "", "finish_reason": "abort"}]},
        {"error": {"message": "boom"}},
        {"choices": [], "usage": {}},
        "not json",
        "3",
    ],
)
def test_a_first_event_without_a_token_is_no_first_token(first: object) -> None:
    scan = _scan(_stream(first, "[DONE]"))
    assert scan.head_seen
    assert not scan.first_is_token


def test_an_error_in_the_stream_is_told() -> None:
    end = _scan(_stream(TOKEN, {"error": {"message": "the engine died", "code": 500}}, "[DONE]")).end()
    assert end.error == "the engine died"


def test_a_stream_that_was_cut_has_no_end() -> None:
    end = _scan(_stream(TOKEN, TOKEN), b'data: {"choi').end()
    assert not end.done
    assert end.finish_reason is None
    assert end.output_tokens is None


@settings(deadline=None)
@given(st.binary(max_size=400), st.binary(max_size=400))
def test_no_bytes_are_too_strange(head: bytes, tail: bytes) -> None:
    scan = _scan(head, tail)
    scan.end()
    assert scan.events <= (head + tail).count(b"\n") // 2 + 1


def test_memory_stays_bounded() -> None:
    scan = _scan(*[_stream(TOKEN) * 50] * 200)
    assert len(scan._tail) <= TAIL_BYTES
    assert scan.events == 10_000
