"""``rlgov serve`` as a program: where it listens, how signals end it, and what survives its death."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rlgov.clock import SystemClock
from rlgov.engine.control.client import StackClient

START_S = 60.0


class _Program:
    """A running ``rlgov serve``."""

    def __init__(self, run: Path, vllm: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "rlgov", "serve", "--model", "fake/model", "--tp", "2", "1"]
        command += ["--gpus", "none", "--port", "0", "--vllm", str(vllm), "--run", str(run), "--json"]
        run.mkdir(exist_ok=True)
        self._log = (run / "serve.log").open("ab")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RLGOV_")}
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=self._log, env=environment
        )
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line == b"}\n":
                break
        assert lines, (run / "serve.log").read_text(encoding="utf-8")
        self.says: dict[str, Any] = json.loads(b"".join(lines))

    def ends(self) -> int:
        """Its exit code, soon."""
        return self.process.wait(START_S)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()


@pytest.fixture
def serve(tmp_path: Path, fake_program: Path, processes: Any) -> Iterator[Callable[..., _Program]]:
    """``serve(*arguments)`` starts the program in ``tmp_path / "run"``."""
    started: list[_Program] = []

    def start(*arguments: str) -> _Program:
        started.append(_Program(tmp_path / "run", fake_program, *arguments))
        return started[-1]

    yield start
    for program in started:
        program.close()
    del processes  # its own end kills what is left


async def _request(url: str, tokens: int) -> dict[str, Any]:
    body = {"prompt": [1, 2, 3], "max_tokens": tokens, "ignore_eos": True}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=body) as answer:
        content: dict[str, Any] = await answer.json()
        return content


def _while_streaming(program: _Program, act: Callable[[], None]) -> dict[str, Any]:
    """Ask for some seconds' worth of tokens, act once the engine works on it, and give the answer."""

    async def both() -> dict[str, Any]:
        asked = asyncio.create_task(_request(program.says["url"], 300))
        with StackClient(Path(program.says["control"])) as client:
            while not any(one.running for one in client.interval(0).engines):  # noqa: ASYNC110  # told by nobody
                await asyncio.sleep(0.02)
        act()
        return await asked

    return asyncio.run(both())


def test_a_signal_lets_requests_finish_and_leaves_nothing(
    tmp_path: Path, serve: Callable[..., _Program], processes: Any
) -> None:
    program = serve("--", "--max-model-len", "2048")
    assert program.says["tp_degrees"] == [2, 1]
    assert program.says["switch"] == "side-by-side"
    (engine,) = processes.engines(tmp_path / "run")
    assert b"--max-model-len\x002048" in Path(f"/proc/{engine}/cmdline").read_bytes()
    answer = _while_streaming(program, lambda: program.process.send_signal(signal.SIGTERM))
    assert answer["usage"]["completion_tokens"] == 300
    assert program.ends() == 0
    assert processes.all(tmp_path / "run") == set()
    assert not Path(program.says["control"]).exists()


def test_a_second_signal_ends_it_at_once(
    tmp_path: Path, serve: Callable[..., _Program], processes: Any
) -> None:
    program = serve("--", "--fake-token-ms", "250")
    log = tmp_path / "run" / "serve.log"

    def twice() -> None:
        program.process.send_signal(signal.SIGTERM)
        clock = SystemClock()
        while "a second signal" not in log.read_text(encoding="utf-8"):
            clock.sleep_s(0.02)
        program.process.send_signal(signal.SIGTERM)

    with pytest.raises(aiohttp.ClientError):  # a minute's worth of tokens would have been left
        _while_streaming(program, twice)
    assert program.ends() == 0
    assert processes.all(tmp_path / "run") == set()


def test_engines_survive_a_kill_and_are_taken_over(
    tmp_path: Path, serve: Callable[..., _Program], processes: Any
) -> None:
    first = serve()
    (engine,) = processes.engines(tmp_path / "run")
    first.process.kill()
    assert first.ends() == -signal.SIGKILL
    assert processes.engines(tmp_path / "run") == {engine}
    second = serve()
    assert processes.engines(tmp_path / "run") == {engine}
    answer = asyncio.run(_request(second.says["url"], 5))
    assert answer["usage"]["completion_tokens"] == 5
    with StackClient(Path(second.says["control"])) as client:
        assert client.configure(batch_cap=8, lease_s=30.0).batch_cap == 8
        assert client.configure(tp_degree=1).switching
        clock = SystemClock()
        while (state := client.state()).switching:
            clock.sleep_s(0.05)
        assert (state.tp_degree, state.last_switch["outcome"]) == (1, "done")
        assert client.limits().switch_s[1] > 0
    second.process.send_signal(signal.SIGINT)
    assert second.ends() == 0
    assert processes.all(tmp_path / "run") == set()


def test_a_first_engine_that_fails_ends_it_with_the_reason(
    tmp_path: Path, fake_program: Path, processes: Any
) -> None:
    command = [sys.executable, "-m", "rlgov", "serve", "--model", "m", "--gpus", "none", "--port", "0"]
    command += ["--vllm", str(fake_program), "--run", str(tmp_path / "run"), "--", "--fake-fail", "oom"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "too little free memory" in done.stderr
    assert processes.all(tmp_path / "run") == set()
