from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.config import LoadSettings
from rlgov.workload.load_plan import PlannedRequest
from rlgov.workload.load_prompts import FIRST_TOKEN_ID, BodyBuilder


def _body(
    prompt: int, output: int = 4, prefix: int = 0, index: int = 0, longest: int = 0, **changes: Any
) -> dict[str, Any]:
    builder = BodyBuilder(LoadSettings(url="http://server", **changes), 'a "model"', max(longest, prefix))
    body: dict[str, Any] = json.loads(builder.build(PlannedRequest(index, 0.0, prompt, output, prefix)))
    return body


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 500), st.integers(64, 50_000), st.integers(0, 2**40))
def test_a_body_asks_for_exactly_the_tokens_of_the_plan(
    prompt: int, output: int, vocabulary: int, seed: int
) -> None:
    body = _body(prompt, output, vocabulary=vocabulary, seed=seed)
    assert len(body["prompt"]) == prompt
    assert min(body["prompt"]) >= FIRST_TOKEN_ID
    assert max(body["prompt"]) < vocabulary
    assert body["max_tokens"] == body["min_tokens"] == output
    assert body["ignore_eos"] is True
    assert body["temperature"] == 0
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["model"] == 'a "model"'


def test_prompts_are_fixed_by_the_seed_and_differ_between_requests() -> None:
    assert _body(50, index=3, seed=1) == _body(50, index=3, seed=1)
    assert _body(50, index=3, seed=1)["prompt"] != _body(50, index=3, seed=2)["prompt"]
    assert _body(50, index=3)["prompt"][:16] != _body(50, index=4)["prompt"][:16]


def test_a_prompt_does_not_depend_on_the_rest_of_the_plan() -> None:
    assert _body(90, prefix=20, longest=20) == _body(90, prefix=20, longest=5000)


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 100))
def test_common_prefixes_are_shared_and_what_follows_is_not(first: int, second: int, own: int) -> None:
    longest = max(first, second)
    a = _body(first + own, prefix=first, index=1, longest=longest)["prompt"]
    b = _body(second + own, prefix=second, index=2, longest=longest)["prompt"]
    common = min(first, second)
    assert a[:common] == b[:common]
    if own >= 16:
        assert a[first:] != b[second:]
        assert a[common : common + 16] != b[common : common + 16]


def test_chat_sends_as_many_words() -> None:
    body = _body(40, prefix=10, api="chat")
    assert "prompt" not in body
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert len(message["content"].split()) == 40
