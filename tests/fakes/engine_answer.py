"""Completions and chat completions of the fake vLLM server: what a client sees of its sequences."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from rlgov.clock import Clock
from tests.fakes.engine_faults import Faults
from tests.fakes.engine_model import FakeEngine, Sequence

JSON_ERROR = {
    400: "BadRequestError",
    404: "NotFoundError",
    500: "InternalServerError",
    503: "ServiceUnavailable",
}


class RequestError(Exception):
    """A request that is answered with an error body as vLLM's."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def response(self) -> web.Response:
        kind = JSON_ERROR[self.status]
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.status}
        return web.json_response({"error": error}, status=self.status)


async def read_body(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError:
        raise RequestError(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the body is not a JSON object")
    return body


@dataclass(frozen=True)
class Served:
    """What an answer needs of its server."""

    engine: FakeEngine
    faults: Faults
    clock: Clock
    model_names: list[str]
    max_model_len: int
    eos_after: int | None


class Answer:
    """One completion or chat completion: its sequences, and the form of what the client sees."""

    def __init__(self, served: Served, request: web.Request, fault: str, body: dict[str, Any]) -> None:
        self.served, self.request, self.fault = served, request, fault
        self.chat = request.path.endswith("/chat/completions")
        self.stream = bool(body.get("stream", False))
        options = body.get("stream_options") or {}
        if options and not self.stream:
            raise RequestError(
                400, "Stream options can only be defined when `stream=True`.", "stream_options"
            )
        self.include_usage = bool(options.get("include_usage"))
        self.continuous_usage = self.include_usage and bool(options.get("continuous_usage_stats"))
        self.model = body.get("model") or served.model_names[0]
        if self.model not in served.model_names:
            raise RequestError(404, f"The model `{self.model}` does not exist.", "model")
        self.prompts = self._prompt_tokens(body)
        self.max_tokens = self._max_tokens(body)
        self.choices = int(body.get("n") or 1)
        self.ignore_eos = bool(body.get("ignore_eos"))
        kind = "chatcmpl" if self.chat else "cmpl"
        self.identity = f"{kind}-{request.headers.get('X-Request-Id') or uuid.uuid4().hex}"
        self.created = int(served.clock.wall_s())
        self.events: asyncio.Queue[tuple[int, int, str | None]] = asyncio.Queue()
        self.sequences: list[Sequence] = []

    def _prompt_tokens(self, body: dict[str, Any]) -> list[int]:
        if self.chat:
            messages = body.get("messages")
            if not isinstance(messages, list) or not messages:
                raise RequestError(400, "messages: Field required", "messages")
            return [sum(len(str(message.get("content", ""))) + 4 for message in messages)]
        prompt = body.get("prompt")
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt or not all(prompt):
            raise RequestError(
                400, "Either prompt or prompt_embeds must be provided and non-empty.", "prompt"
            )
        return [len(one) for one in prompt]

    def _max_tokens(self, body: dict[str, Any]) -> int:
        longest = self.served.max_model_len
        room = longest - max(self.prompts)
        wanted = body.get("max_completion_tokens") or body.get("max_tokens")
        if wanted is None:
            wanted = room if self.chat else 16
        if not isinstance(wanted, int) or wanted < 1:
            raise RequestError(400, f"max_tokens must be at least 1, got {wanted}.", "max_tokens")
        if room < 1 or wanted > room:
            raise RequestError(
                400,
                f"This model's maximum context length is {longest} tokens. However, you requested {wanted} "
                f"output tokens and your prompt contains {max(self.prompts)} input tokens.",
                "max_tokens",
            )
        return wanted

    async def respond(self) -> web.StreamResponse:
        """Run the sequences to their end, or drop them when the client goes."""
        try:
            self._submit()
            return await (self._respond_stream() if self.stream else self._respond_whole())
        finally:
            for sequence in self.sequences:
                self.served.engine.cancel(sequence)

    def _submit(self) -> None:
        if self.fault in {"abort", "done-only", "empty"}:
            for index in range(len(self.prompts) * self.choices):
                self.events.put_nowait((index, 0, "abort"))
            return
        stop_after = None if self.ignore_eos else self.served.eos_after
        for number, prompt_tokens in enumerate(self.prompts):
            for choice in range(self.choices):
                index = number * self.choices + choice

                def deliver(tokens: int, reason: str | None, index: int = index) -> None:
                    self.events.put_nowait((index, tokens, reason))

                sequence = Sequence(prompt_tokens, self.max_tokens, deliver, stop_after)
                self.sequences.append(sequence)
                self.served.engine.add(sequence)

    async def _tokens(self) -> AsyncIterator[tuple[int, int, str | None]]:
        unfinished = len(self.prompts) * self.choices
        sent = 0
        while unfinished:
            event = await self.events.get()
            unfinished -= int(event[2] is not None)
            yield event
            sent += event[1]
            if self.fault == "drop" and sent >= self.served.faults.drop_after_tokens:
                transport = self.request.transport
                if transport is not None:
                    transport.abort()
                raise ConnectionResetError

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model}

    def _usage(self, generated: int) -> dict[str, int]:
        prompt = sum(self.prompts)
        return {"prompt_tokens": prompt, "total_tokens": prompt + generated, "completion_tokens": generated}

    async def _respond_whole(self) -> web.Response:
        counts = [0] * (len(self.prompts) * self.choices)
        reasons: list[str | None] = [None] * len(counts)
        async for index, tokens, reason in self._tokens():
            counts[index] += tokens
            reasons[index] = reason
        choices: list[dict[str, Any]] = []
        for index, (count, reason) in enumerate(zip(counts, reasons, strict=True)):
            text = "x" * count
            choice: dict[str, Any] = {
                "index": index,
                "logprobs": None,
                "finish_reason": reason,
                "stop_reason": None,
            }
            choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append(choice)
        if self.fault == "empty":
            return web.Response(status=200, content_type="application/json")
        head = self._head("chat.completion" if self.chat else "text_completion")
        return web.json_response({**head, "choices": choices, "usage": self._usage(sum(counts))})

    async def _respond_stream(self) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(self.request)
        counts = [0] * (len(self.prompts) * self.choices)
        began = [not self.chat] * len(counts)
        async for index, tokens, reason in self._tokens():
            if not began[index]:
                began[index] = True
                await self._send(response, index, {"role": "assistant", "content": ""}, None, counts)
            if tokens == 0 and counts[index] == 0:
                continue  # aborted before its first token: vLLM sends nothing at all
            counts[index] += tokens
            text = "x" * tokens
            await self._send(response, index, {"content": text} if self.chat else text, reason, counts)
        if self.fault == "empty":
            await response.write_eof()
            return response
        if self.include_usage:
            head = self._head("chat.completion.chunk" if self.chat else "text_completion")
            await _event(response, {**head, "choices": [], "usage": self._usage(sum(counts))})
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _send(
        self,
        response: web.StreamResponse,
        index: int,
        piece: str | dict[str, str],
        reason: str | None,
        counts: list[int],
    ) -> None:
        choice: dict[str, Any] = {"index": index}
        choice |= {"text": piece} if isinstance(piece, str) else {"delta": piece}
        choice |= {"logprobs": None, "finish_reason": reason}
        if not self.chat:
            choice |= {"stop_reason": None, "prompt_token_ids": None, "token_ids": None}
        chunk = {
            **self._head("chat.completion.chunk" if self.chat else "text_completion"),
            "choices": [choice],
        }
        if self.continuous_usage:
            chunk["usage"] = self._usage(sum(counts))
        await _event(response, chunk)


async def _event(response: web.StreamResponse, value: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n")
