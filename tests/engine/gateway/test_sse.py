"""The observer of streams: byte for byte, wherever the network cuts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.engine.gateway.paths import Kind
from rlgov.engine.gateway.sse import StreamObserver
from rlgov.engine.gateway.tally import Tally, read_whole
from tests.fakes.scripted import DONE, completion, event, token, usage


def chat(delta: dict[str, Any], reason: str | None = None, index: int = 0) -> bytes:
    return event({"choices": [{"index": index, "delta": delta, "finish_reason": reason}]})


ROLE = chat({"role": "assistant", "content": ""})
TOKENS = [token(), token('"finish_reason":null'), token("ü\n"), token("", "stop")]


def observer(*, strips: bool = False, kind: Kind = Kind.CHOICES, largest: int = 2**20) -> StreamObserver:
    return StreamObserver(kind, strips_usage=strips, max_event_bytes=largest)


def feed_in_pieces(watched: StreamObserver, data: bytes, cuts: list[int]) -> bytes:
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return b"".join(watched.feed(data[a:b]) for a, b in pairwise(edges))


any_event = st.one_of(
    st.sampled_from(
        [*TOKENS, ROLE, b": keep-alive\n\n", b"event: x\r\ndata: {}\r\n\r\n", b"data: no json\n\n"]
    ),
    st.text(max_size=20).map(token),
)


@settings(deadline=None)
@given(
    events=st.lists(any_event, max_size=8),
    strips=st.booleans(),
    cuts=st.lists(st.integers(min_value=0), max_size=12),
)
def test_what_goes_in_comes_out_wherever_it_is_cut(
    *, events: list[bytes], strips: bool, cuts: list[int]
) -> None:
    data = b"".join(events)
    watched = observer(strips=strips)
    assert feed_in_pieces(watched, data, cuts) + watched.rest() == data
    whole = observer(strips=strips)
    whole.feed(data)
    assert watched.tally == whole.tally


def test_only_the_usage_event_is_taken_out_at_every_single_cut() -> None:
    before, after = b"".join(TOKENS), DONE
    data = before + usage(11, 4) + after
    for cut in range(len(data) + 1):
        watched = observer(strips=True)
        assert feed_in_pieces(watched, data, [cut]) == before + after
        assert (watched.tally.prompt_tokens, watched.tally.output_tokens) == (11, 4)
        assert watched.done


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_either_line_end_ends_an_event(end: bytes) -> None:
    data = (b"".join(TOKENS) + usage() + DONE).replace(b"\n\n", end)
    expected = (b"".join(TOKENS) + DONE).replace(b"\n\n", end)
    for cut in range(len(data) + 1):
        assert feed_in_pieces(observer(strips=True), data, [cut]) == expected


def test_the_client_that_asked_for_usage_gets_it() -> None:
    data = b"".join(TOKENS) + usage() + DONE
    assert observer().feed(data) == data


def test_events_come_out_whole() -> None:
    watched = observer()
    assert watched.feed(TOKENS[0][:-1]) == b""
    assert watched.feed(TOKENS[0][-1:] + TOKENS[1][:5]) == TOKENS[0]


def test_the_role_is_no_token_and_an_empty_text_is_one() -> None:
    watched = observer()
    watched.feed(ROLE)
    assert watched.tally.token_events == 0
    watched.feed(chat({"content": ""}))
    assert watched.tally.token_events == 1


def test_a_role_that_comes_with_content_is_a_token() -> None:
    watched = observer()
    watched.feed(chat({"role": "assistant", "content": "hi"}))
    assert watched.tally.token_events == 1


def test_data_over_several_lines_is_one_document() -> None:
    watched = observer()
    watched.feed(b'data: {"choices": [{"index": 0,\ndata: "text": "a", "finish_reason": "stop"}]}\n\n')
    assert watched.tally.finish_reason == "stop"


@pytest.mark.parametrize(
    "events",
    [
        [DONE],
        [],
        [token(), DONE],
        [token(), token("", "abort"), DONE],
        [token("", "abort"), DONE],
        [token("", "error")],
        [ROLE, DONE],
        [token(), event({"error": {"message": "EngineCore died", "code": 500}}), DONE],
        [token(index=0), token(index=1), token(index=0, reason="stop"), DONE],  # the second choice never ends
        [token(reason="stop"), token(index=1), token(index=0), DONE],
    ],
)
def test_what_a_dying_engine_sends_is_no_answer(events: list[bytes]) -> None:
    watched = observer()
    watched.feed(b"".join(events))
    assert watched.tally.verdict(tokens_wanted=True) is not None


def test_nothing_after_the_failure_gets_through() -> None:
    watched = observer()
    assert watched.feed(token() + token("", "abort") + DONE) == token()
    assert watched.tally.failure is not None


def test_the_closing_mark_of_an_unfinished_stream_does_not_get_through() -> None:
    assert observer().feed(token() + DONE) == token()


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter"])
def test_a_finished_stream_is_an_answer(reason: str) -> None:
    watched = observer()
    watched.feed(token() + token("", reason) + usage() + DONE)
    assert watched.tally.verdict(tokens_wanted=True) is None
    assert watched.tally.finish_reason == reason


def test_several_choices_are_an_answer_once_each_has_finished() -> None:
    watched = observer()
    watched.feed(token(index=0) + token(index=1) + token(reason="stop", index=1))
    assert watched.tally.verdict(tokens_wanted=True) is not None
    watched.feed(token(reason="length", index=0) + DONE)
    assert watched.tally.verdict(tokens_wanted=True) is None


def test_zero_tokens_are_an_answer_only_when_none_were_asked_for() -> None:
    watched = observer()
    watched.feed(token("", "length") + usage(7, 0) + DONE)
    assert watched.tally.verdict(tokens_wanted=True) is not None
    assert watched.tally.verdict(tokens_wanted=False) is None


def test_a_request_error_inside_the_stream_is_a_refusal() -> None:
    watched = observer()
    watched.feed(event({"error": {"message": "bad grammar", "code": 400}}) + DONE)
    assert watched.tally.refusal == "bad grammar"
    assert watched.tally.failure is None


def test_an_event_without_end_is_a_failure_and_no_memory_leak() -> None:
    watched = observer(largest=1000)
    watched.feed(b"data: " + b"x" * 2000)
    assert watched.tally.failure is not None


def test_cached_tokens_are_read() -> None:
    watched = observer()
    counts = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 8}}
    watched.feed(event({"choices": [], "usage": counts}))
    assert watched.tally.cached_tokens == 8


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["choices", "usage", "error", "type", "response", "status", "output", "x"]),
        json_values
        | st.lists(st.dictionaries(st.sampled_from(["index", "finish_reason", "delta"]), json_values)),
    ),
    st.sampled_from([Kind.CHOICES, Kind.RESPONSES]),
)
def test_no_document_throws_the_reader_off(document: dict[str, Any], kind: Kind) -> None:
    watched = observer(kind=kind)
    watched.feed(event(document))
    watched.tally.verdict(tokens_wanted=True)
    read_whole(kind)(Tally(), document)


def responses(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\n".encode() + event({"type": kind, **fields})


def test_the_responses_api_is_read() -> None:
    counts = {"input_tokens": 5, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 1}}
    data = (
        responses("response.created", response={"status": "in_progress"})
        + responses("response.output_text.delta", delta="a")
        + responses("response.reasoning_text.delta", delta="a")
        + responses("response.completed", response={"status": "completed", "usage": counts})
    )
    watched = observer(kind=Kind.RESPONSES)
    assert watched.feed(data) == data
    tally = watched.tally
    assert tally.verdict(tokens_wanted=True) is None
    assert (tally.token_events, tally.prompt_tokens, tally.output_tokens, tally.cached_tokens) == (2, 5, 2, 1)


def test_a_failed_response_is_no_answer() -> None:
    watched = observer(kind=Kind.RESPONSES)
    watched.feed(responses("response.failed", response={"status": "failed"}))
    assert watched.tally.verdict(tokens_wanted=True) is not None


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (completion(), True),
        (completion("", "abort", 0), False),
        (completion("", "stop", 0), False),
        ({}, False),
        ({"error": {"message": "x", "code": 500}}, False),
        ({"choices": [{"index": 0, "text": "a", "finish_reason": None}]}, False),
        ({"choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}]}, True),
    ],
)
def test_whole_answers_are_judged(*, answer: dict[str, Any], good: bool) -> None:
    tally = Tally()
    read_whole(Kind.CHOICES)(tally, answer)
    assert (tally.verdict(tokens_wanted=True) is None) is good
