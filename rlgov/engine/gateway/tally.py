"""What an answer says about itself: tokens, finish reasons, usage, failures. Pure; fed with parsed JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from rlgov.engine.gateway.paths import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

NumberT = TypeVar("NumberT", int, int | None)

_SERVER_ERROR: Final = 500
_CONTENT: Final = ("content", "reasoning", "reasoning_content", "tool_calls", "function_call", "refusal")


@dataclass(slots=True)
class Tally:
    """What was read of one answer so far."""

    token_events: int = 0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    failure: str | None = None  # the engine failed this request; what the client got so far is no answer
    refusal: str | None = None  # the engine says that the request itself is at fault
    unfinished: set[int] = field(default_factory=set)  # choices with tokens and without a finish reason

    def verdict(self, *, tokens_wanted: bool) -> str | None:
        """Why the complete answer is none; None when it is one."""
        if self.failure or self.refusal:
            return self.failure or self.refusal
        if self.finish_reason is None or self.unfinished:
            return "the engine ended the answer without a finish reason"
        if tokens_wanted and (
            self.output_tokens == 0 or (self.output_tokens is None and not self.token_events)
        ):
            return "the engine finished the answer without a token"
        return None


def read_event(kind: Kind) -> Callable[[Tally, dict[str, Any]], None]:
    """The reader of a stream's events."""
    return _responses_event if kind is Kind.RESPONSES else _choices_event


def read_whole(kind: Kind) -> Callable[[Tally, dict[str, Any]], None]:
    """The reader of an answer in one piece."""
    return _responses_whole if kind is Kind.RESPONSES else _choices_whole


def _choices_event(tally: Tally, event: dict[str, Any]) -> None:
    if "error" in event:
        _error(tally, event["error"])
        return
    _usage(tally, event.get("usage"), "prompt_tokens", "completion_tokens")
    for choice in _dicts(event.get("choices")):
        index = _count(choice.get("index"), 0)
        reason = choice.get("finish_reason")
        if not _opens_only(choice):
            tally.token_events += 1
            tally.unfinished.add(index)
        if reason is not None:
            tally.unfinished.discard(index)
            _finish(tally, reason)


def _opens_only(choice: dict[str, Any]) -> bool:
    """Whether a chat chunk only announces the role, before any token.

    Any other chunk stands for a token, be its text empty: some tokens have none of their own.
    """
    delta = choice.get("delta")
    return (
        isinstance(delta, dict)
        and "role" in delta
        and choice.get("finish_reason") is None
        and not any(delta.get(name) for name in _CONTENT)
        and not choice.get("token_ids")
    )


def _choices_whole(tally: Tally, answer: dict[str, Any]) -> None:
    if "error" in answer:
        _error(tally, answer["error"])
        return
    _usage(tally, answer.get("usage"), "prompt_tokens", "completion_tokens")
    for choice in _dicts(answer.get("choices")):
        reason = choice.get("finish_reason")
        message = choice.get("message")
        if choice.get("text") or (isinstance(message, dict) and any(message.get(name) for name in _CONTENT)):
            tally.token_events += 1
        if reason is None:
            tally.unfinished.add(_count(choice.get("index"), 0))
        else:
            _finish(tally, reason)


def _responses_event(tally: Tally, event: dict[str, Any]) -> None:
    kind = str(event.get("type"))
    if kind == "error" or ("type" not in event and "error" in event):
        _error(tally, event.get("error", event))
    elif kind.endswith(".delta"):
        tally.token_events += 1
    elif kind in {"response.completed", "response.incomplete", "response.failed"}:
        response = event.get("response")
        _responses_whole(tally, response if isinstance(response, dict) else {})


def _responses_whole(tally: Tally, answer: dict[str, Any]) -> None:
    if answer.get("error"):
        _error(tally, answer["error"])
        return
    _usage(tally, answer.get("usage"), "input_tokens", "output_tokens")
    status = str(answer.get("status"))
    if answer.get("output"):
        tally.token_events += 1
    if status == "completed":
        _finish(tally, "stop")
    elif status == "incomplete":
        details = answer.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, dict) else None
        _finish(tally, "length" if reason in {None, "max_output_tokens"} else str(reason))
    elif status in {"failed", "cancelled"}:
        tally.failure = f"the engine says that the response {status}"


def _finish(tally: Tally, reason: object) -> None:
    """A finish reason: abort and error are what a dying or draining engine says, with HTTP 200."""
    if str(reason) in {"abort", "error"}:
        tally.failure = f"the engine ended the answer with finish reason {reason!r}"
    else:
        tally.finish_reason = str(reason)


def _error(tally: Tally, error: object) -> None:
    code: object = None
    message = "unknown error"
    if isinstance(error, dict):
        code, message = error.get("code"), str(error.get("message", message))
    if isinstance(code, int) and code < _SERVER_ERROR:
        tally.refusal = message
    else:
        tally.failure = f"the engine reported: {message}"


def _usage(tally: Tally, usage: object, prompt: str, output: str) -> None:
    if not isinstance(usage, dict):
        return
    tally.prompt_tokens = _count(usage.get(prompt), tally.prompt_tokens)
    tally.output_tokens = _count(usage.get(output), tally.output_tokens)
    details = usage.get(f"{prompt}_details")
    if isinstance(details, dict):
        tally.cached_tokens = _count(details.get("cached_tokens"), tally.cached_tokens)


def _count(value: object, otherwise: NumberT) -> int | NumberT:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _dicts(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
