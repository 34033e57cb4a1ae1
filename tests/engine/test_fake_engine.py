"""The fake vLLM server behaves as the real one where the tests of the serving path rely on it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

PROMPT = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True}
PATIENCE = aiohttp.ClientTimeout(total=60)
EVENT = re.compile(rb"data: (.*?)\n\n")


async def _stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> list[Any]:
    """Every event, decoded; the last is "[DONE]" where it came."""
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status == 200
        events = EVENT.findall(await answer.read())
    return [event.decode() if event == b"[DONE]" else json.loads(event) for event in events]


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        assert answer.status == 200
        decoded: dict[str, Any] = await answer.json()
        return decoded


def test_a_completion_has_exactly_the_tokens_asked_for(start_fake: Callable[..., Any]) -> None:
    server = start_fake("--fake-token-ms", "1")

    async def play() -> None:
        async with aiohttp.ClientSession(timeout=PATIENCE) as session:
            whole = await _ask(session, server.url, PROMPT)
            assert whole["choices"][0]["finish_reason"] == "length"
            assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
            asked = {**PROMPT, "stream_options": {"include_usage": True}}
            *chunks, usage, done = await _stream(session, server.url, asked)
            assert done == "[DONE]"
            assert usage["choices"] == []
            assert usage["usage"] == whole["usage"]
            texts = [chunk["choices"][0]["text"] for chunk in chunks]
            assert len(texts) == 5
            assert "".join(texts) == whole["choices"][0]["text"]
            assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]

    asyncio.run(play())


def test_the_cap_limits_admission_and_preempts_nothing(start_fake: Callable[..., Any]) -> None:
    server = start_fake("--fake-token-ms", "2", "--max-num-seqs", "8")
    authorization = {"Authorization": f"Bearer {server.token}"}

    async def play() -> None:
        async with aiohttp.ClientSession(timeout=PATIENCE) as session:

            async def sample() -> dict[str, Any]:
                url = f"{server.url}/rlgov/v1/state"
                async with session.get(url, headers=authorization) as answer:
                    state: dict[str, Any] = (await answer.json())["sample"]
                    return state

            async def cap(**body: Any) -> Any:
                url = f"{server.url}/rlgov/v1/cap"
                async with session.post(url, json=body, headers=authorization) as answer:
                    return await answer.json()

            assert await cap(batch_cap=2, lease_s=None) == {"batch_cap": 2, "max_num_seqs": 8}
            tasks = [
                asyncio.create_task(_ask(session, server.url, {**PROMPT, "max_tokens": 40}))
                for _ in range(10)
            ]
            seen = []
            while not all(task.done() for task in tasks):
                seen.append(await sample())
                await asyncio.sleep(0.005)
            assert max(state["running"] for state in seen) == 2
            assert max(state["waiting"] for state in seen) > 0
            assert all(task.result()["usage"]["completion_tokens"] == 40 for task in tasks)
            assert (await cap(batch_cap=None, lease_s=None))["batch_cap"] == 8
            assert (await cap(batch_cap=3, lease_s=0.5))["batch_cap"] == 3
            while (await sample())["batch_cap"] != 8:  # noqa: ASYNC110  # of another process
                await asyncio.sleep(0.01)

    asyncio.run(play())


def test_plugin_calls_need_the_token(start_fake: Callable[..., Any]) -> None:
    server = start_fake()

    async def play() -> None:
        async with (
            aiohttp.ClientSession(timeout=PATIENCE) as session,
            session.get(f"{server.url}/rlgov/v1/state", headers={"Authorization": "Bearer no"}) as answer,
        ):
            assert answer.status == 401

    asyncio.run(play())


@pytest.mark.parametrize("timeout_s", [0, 60])
def test_sigterm_ends_requests_as_the_shutdown_timeout_says(
    start_fake: Callable[..., Any], timeout_s: int
) -> None:
    server = start_fake("--fake-token-ms", "10", "--max-num-seqs", "2", "--shutdown-timeout", str(timeout_s))

    async def play() -> list[list[Any]]:
        async with aiohttp.ClientSession(timeout=PATIENCE) as session:
            tasks = [
                asyncio.create_task(_stream(session, server.url, {**PROMPT, "max_tokens": 60}))
                for _ in range(4)
            ]
            while (state := server.state())["running"] < 2 or state["waiting"] < 2:  # noqa: ASYNC110  # of another process
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)  # the running ones have a token
            server.process.send_signal(signal.SIGTERM)
            if timeout_s:
                while not server.state()["draining"]:  # noqa: ASYNC110  # of another process
                    await asyncio.sleep(0.005)
                assert await _stream(session, server.url, PROMPT) == [
                    "[DONE]"
                ]  # vLLM's hazard: 200, no error
                late = await _ask(session, server.url, PROMPT)
                assert late["choices"][0]["finish_reason"] == "abort"
                assert late["usage"]["completion_tokens"] == 0
            return await asyncio.gather(*tasks)

    streams = asyncio.run(play())
    assert server.process.wait(60) == 0
    reasons = sorted(stream[-2]["choices"][0]["finish_reason"] if stream[1:] else "" for stream in streams)
    assert all(stream[-1] == "[DONE]" for stream in streams)
    assert reasons == (["length"] * 4 if timeout_s else ["", "", "abort", "abort"])


def test_faults_do_what_they_say(start_fake: Callable[..., Any]) -> None:
    server = start_fake("--fake-token-ms", "1")

    async def play() -> None:
        async with aiohttp.ClientSession(timeout=PATIENCE) as session:
            server.fault(requests="abort", count=1)
            aborted = await _ask(session, server.url, PROMPT)
            assert aborted["choices"][0]["finish_reason"] == "abort"
            assert (await _ask(session, server.url, PROMPT))["usage"]["completion_tokens"] == 5
            server.fault(requests="done-only", count=1)
            assert await _stream(session, server.url, PROMPT) == ["[DONE]"]
            server.fault(requests="drop", drop_after_tokens=2, count=1)
            with pytest.raises(aiohttp.ClientError):
                await _stream(session, server.url, PROMPT)
            server.fault(hang=True)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(_ask(session, server.url, PROMPT), 0.2)
            async with session.get(f"{server.url}/health") as answer:
                assert answer.status == 200
            server.fault(reset=True)
            assert (await _ask(session, server.url, PROMPT))["usage"]["completion_tokens"] == 5

    asyncio.run(play())


def test_the_page_has_the_names_of_the_real_one(start_fake: Callable[..., Any], shared_dir: Path) -> None:
    server = start_fake("--fake-token-ms", "1")

    async def page() -> str:
        async with aiohttp.ClientSession(timeout=PATIENCE) as session:
            await _ask(session, server.url, PROMPT)
            async with session.get(f"{server.url}/metrics") as answer:
                return await answer.text()

    def families(text: str) -> dict[str, str]:
        return dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))

    real = families((shared_dir / "data" / "vllm_metrics_0.32.txt").read_text(encoding="utf-8"))
    fake = families(asyncio.run(page()))
    wanted = {name: kind for name, kind in real.items() if name.startswith(("vllm:", "process_"))}
    left_out = {"vllm:admission_rejections_total", "vllm:prompt_tokens_cached_by_source_total"}
    left_out |= {name.replace("_total", "_created") for name in left_out}
    assert {
        name: kind for name, kind in wanted.items() if fake.get(name) != kind and name not in left_out
    } == {}
