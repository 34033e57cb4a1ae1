"""Engines as real processes: the fake vLLM server in the place of the real one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rlgov.clock import SystemClock
from rlgov.engine import process
from rlgov.engine.client import RefusedError
from rlgov.engine.identity import ProcessIdentity, family, identify, is_running
from rlgov.engine.process import EngineProcess, EngineSpec, kill_family
from rlgov.errors import ConfigError, EngineError

PATIENCE_S = 60.0  # on a loaded machine
CLOCK = SystemClock()
MakeSpec = Callable[..., EngineSpec]


@pytest.fixture
def make_spec(
    fake_command: tuple[str, ...], free_port: Callable[[], int], tmp_path: Path
) -> Iterator[MakeSpec]:
    """Makes specs of fakes; whatever was launched from them is gone after the test."""
    made: list[EngineSpec] = []

    def make(*arguments: str, **changes: Any) -> EngineSpec:
        spec = EngineSpec(
            engine_id=uuid.uuid4().hex,
            command=fake_command,
            model="fake/model",
            tp_degree=1,
            gpu_uuids=(),
            host="127.0.0.1",
            port=free_port(),
            max_num_seqs=8,
            arguments=("--fake-token-ms", "2", *arguments),
            environment={},
            log_path=tmp_path / "engine.log",
            token="a-token",  # noqa: S106  # of a fake
            plugin=True,
            start_timeout_s=PATIENCE_S,
            shutdown_timeout_s=PATIENCE_S,
        )
        spec = replace(spec, **changes)
        made.append(spec)
        return spec

    yield make
    nobody = ProcessIdentity(2**22 + 1, 0, "")
    for spec in made:
        me = identify(os.getpid())
        assert me is not None
        gone = replace(nobody, boot_id=me.boot_id)
        mark = f"RLGOV_ENGINE_ID={spec.engine_id}"
        asyncio.run(kill_family(gone, CLOCK, mark=mark))


async def _started(spec: EngineSpec) -> EngineProcess:
    engine = await EngineProcess.launch(spec, CLOCK)
    await engine.wait_ready()
    return engine


async def _fault(spec: EngineSpec, **changes: Any) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{spec.port}/fake/fault", json=changes) as answer,
    ):
        assert answer.status == 200


async def _state(spec: EngineSpec) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{spec.port}/fake/state") as answer,
    ):
        state: dict[str, Any] = await answer.json()
        return state


async def _generate(spec: EngineSpec, tokens: int) -> dict[str, Any]:
    body = {"prompt": [5, 6], "max_tokens": tokens, "ignore_eos": True}
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(f"http://127.0.0.1:{spec.port}/v1/completions", json=body) as answer,
    ):
        decoded: dict[str, Any] = await answer.json()
        return decoded


async def _until(seen: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await seen():  # noqa: ASYNC110  # of another process
            await asyncio.sleep(0.01)


def _leftovers(engine: EngineProcess) -> list[ProcessIdentity]:
    return family(engine.identity, f"RLGOV_ENGINE_ID={engine.spec.engine_id}")


def test_from_launch_to_stop(make_spec: MakeSpec) -> None:
    spec = make_spec()

    async def play() -> None:
        engine = await EngineProcess.launch(spec, CLOCK)
        assert is_running(engine.identity)
        await engine.wait_ready()
        assert engine.cap_by == "plugin"
        assert engine.note == ""
        assert await engine.warm_up() > 0
        assert await engine.probe(PATIENCE_S)
        sample = await engine.sample(PATIENCE_S)
        assert sample.source == "plugin"
        assert sample.engine_id == spec.engine_id
        assert sample.finished == 2
        assert sample.generated_tokens == 9
        info = await engine.plugin_info()
        assert info is not None
        assert info.cap_supported
        state = await _state(spec)
        assert state["tp_degree"] == 1
        assert state["environment"]["VLLM_PLUGINS"] == "rlgov"
        assert os.getsid(engine.identity.pid) == engine.identity.pid != os.getsid(0)
        assert len(_leftovers(engine)) == 2  # with a child that stands for EngineCore
        assert await engine.stop(PATIENCE_S) == 0
        assert not engine.alive
        assert engine.exit_code == 0
        assert _leftovers(engine) == []

    asyncio.run(play())


def test_an_engine_keeps_no_file_of_its_parent_open(make_spec: MakeSpec) -> None:
    async def play() -> None:
        reading, writing = os.pipe()
        os.set_inheritable(writing, True)  # noqa: FBT003  # its only argument
        try:
            engine = await _started(make_spec())
        finally:
            os.close(writing)
        assert is_running(engine.identity)
        os.set_blocking(reading, False)
        assert os.read(reading, 1) == b""  # its end: nobody else could still write
        os.close(reading)

    asyncio.run(play())


def test_stop_lets_requests_in_flight_finish(make_spec: MakeSpec) -> None:
    spec = make_spec("--fake-token-ms", "10")

    async def play() -> None:
        engine = await _started(spec)
        asked = [asyncio.create_task(_generate(spec, 60)) for _ in range(12)]  # 8 at once, 4 in the queue

        async def busy() -> bool:
            state = await _state(spec)
            return bool(state["running"] == 8 and state["waiting"] == 4)

        await _until(busy)
        assert await engine.stop(PATIENCE_S) == 0
        for answer in await asyncio.gather(*asked):
            assert answer["usage"]["completion_tokens"] == 60
            assert answer["choices"][0]["finish_reason"] == "length"

    asyncio.run(play())


@pytest.mark.parametrize("grace_s", [0.0, 0.3])
def test_an_engine_that_does_not_end_is_killed_with_all_it_started(
    make_spec: MakeSpec, grace_s: float
) -> None:
    spec = make_spec("--fake-children", "3", "--fake-detached-child", "--fake-fault", "ignore_sigterm=true")

    async def play() -> None:
        engine = await _started(spec)
        members = _leftovers(engine)
        assert len(members) == 4
        assert await engine.stop(grace_s) == -signal.SIGKILL
        assert not any(map(is_running, members))
        assert await engine.stop(grace_s) == -signal.SIGKILL  # again does no harm

    asyncio.run(play())


def test_an_api_server_that_outlives_its_engine_is_not_waited_for(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "HOLLOW_S", 0.2)
    spec = make_spec("--fake-fault", 'drain="hollow"')

    async def play() -> None:
        engine = await _started(spec)
        async with asyncio.timeout(PATIENCE_S):
            assert await engine.stop(100 * PATIENCE_S) == -signal.SIGKILL
        assert not await engine.probe(PATIENCE_S)

    asyncio.run(play())


def test_orphans_of_a_dead_api_server_are_ended(make_spec: MakeSpec) -> None:
    spec = make_spec("--fake-children", "2")

    async def play() -> None:
        engine = await _started(spec)
        os.kill(engine.identity.pid, signal.SIGKILL)

        async def dead() -> bool:
            return not engine.alive

        await _until(dead)
        assert engine.exit_code == -signal.SIGKILL
        assert len(_leftovers(engine)) == 2
        await engine.stop(PATIENCE_S)
        assert _leftovers(engine) == []

    asyncio.run(play())


@pytest.mark.parametrize(
    ("failure", "cause", "remedy"),
    [
        ("oom", "CUDA out of memory", "free memory"),
        ("kv", "No available memory for the cache blocks", "free memory"),
        ("port", "Address already in use", "another process listens"),
        ("model", "is not a valid model identifier", "its name or folder"),
        ("argument", "unrecognized arguments: --no-such-argument", "vllm serve --help"),
        ("heads", "must be divisible by tensor parallel size", "leave this TP degree out"),
    ],
)
def test_a_failed_start_names_cause_and_remedy(
    make_spec: MakeSpec, failure: str, cause: str, remedy: str
) -> None:
    spec = make_spec("--fake-fail", failure)

    async def play() -> str:
        engine = await EngineProcess.launch(spec, CLOCK)
        with pytest.raises(EngineError) as raised:
            await engine.wait_ready()
        assert engine.exit_code == 1
        return str(raised.value)

    first, second, where, *log = asyncio.run(play()).splitlines()
    assert "exited with 1 before it was ready" in first
    assert cause in first
    assert remedy in second
    assert str(spec.log_path) in where
    assert any("vLLM API server version" in line for line in log)


def test_a_start_that_takes_too_long_is_an_error(make_spec: MakeSpec) -> None:
    spec = make_spec("--fake-start-s", "1000", start_timeout_s=0.2)

    async def play() -> None:
        engine = await EngineProcess.launch(spec, CLOCK)
        with pytest.raises(EngineError, match="is not ready after"):
            await engine.wait_ready()
        await engine.stop(0)

    asyncio.run(play())


def test_an_engine_that_dies_while_it_warms_up(make_spec: MakeSpec) -> None:
    spec = make_spec("--fake-fault", "hang=true")

    async def play() -> None:
        engine = await _started(spec)
        warming = asyncio.create_task(engine.warm_up())

        async def asked() -> bool:
            return bool((await _state(spec))["waiting"] == 1)

        await _until(asked)
        with contextlib.suppress(aiohttp.ClientError):
            await _fault(spec, exit=7)
        with pytest.raises(EngineError, match="exited with 7 during its first completion"):
            await warming

    asyncio.run(play())


def test_a_program_that_is_not_there(make_spec: MakeSpec, tmp_path: Path) -> None:
    for command in ((str(tmp_path / "no-vllm"),), (str(tmp_path),)):
        with pytest.raises(EngineError, match="name the vllm program"):
            asyncio.run(EngineProcess.launch(make_spec(command=command), CLOCK))


def test_a_port_in_use_is_refused_before_anything_starts(make_spec: MakeSpec) -> None:
    spec = make_spec()
    with socket.socket() as other:
        other.bind(("127.0.0.1", spec.port))
        other.listen()
        with pytest.raises(EngineError, match="choose another port"):
            asyncio.run(EngineProcess.launch(spec, CLOCK))
    assert not spec.log_path.exists()


def test_operator_arguments_that_are_rlgovs_own(make_spec: MakeSpec) -> None:
    with pytest.raises(ConfigError, match="--tp"):
        asyncio.run(EngineProcess.launch(make_spec("-tp", "4"), CLOCK))


def test_each_start_has_a_log_of_its_own(make_spec: MakeSpec) -> None:
    first = make_spec("--fake-fail", "oom")
    second = replace(first, arguments=("--fake-fail", "heads"))

    async def fail(spec: EngineSpec) -> None:
        engine = await EngineProcess.launch(spec, CLOCK)
        with contextlib.suppress(EngineError):
            await engine.wait_ready()

    asyncio.run(fail(first))
    asyncio.run(fail(second))
    assert "OutOfMemory" not in first.log_path.read_text()
    assert "OutOfMemory" in first.log_path.with_name("engine.log.1").read_text()


def test_healthy_and_hanging_is_not_alive(make_spec: MakeSpec) -> None:
    spec = make_spec()

    async def play() -> None:
        engine = await _started(spec)
        assert await engine.probe(PATIENCE_S)
        await _fault(spec, hang=True)
        assert not await engine.probe(0.3)
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{spec.port}/health") as answer,
        ):
            assert answer.status == 200
        await _fault(spec, reset=True)
        assert await engine.probe(PATIENCE_S)
        await engine.stop(0)
        assert not await engine.probe(PATIENCE_S)

    asyncio.run(play())


@pytest.mark.parametrize("fault", ["abort", "empty", "500", "503", "drop"])
def test_only_real_tokens_count_as_an_answer(make_spec: MakeSpec, fault: str) -> None:
    spec = make_spec()

    async def play() -> None:
        engine = await _started(spec)
        await _fault(spec, requests=fault, drop_after_tokens=1)
        assert not await engine.probe(PATIENCE_S)
        with pytest.raises(EngineError):
            await engine.warm_up()

    asyncio.run(play())


def test_an_engine_whose_api_asks_for_a_key(make_spec: MakeSpec) -> None:
    async def play(spec: EngineSpec) -> None:
        engine = await _started(spec)
        assert await engine.warm_up() > 0
        assert (await engine.sample(PATIENCE_S)).finished == 1

    asyncio.run(play(make_spec("--api-key", "a-key")))
    asyncio.run(play(make_spec(environment={"VLLM_API_KEY": "a-key"})))


def test_the_cap_by_the_plugin(make_spec: MakeSpec) -> None:
    spec = make_spec()

    async def play() -> None:
        engine = await _started(spec)
        assert await engine.set_cap(3, None) == 3
        assert (await engine.sample(PATIENCE_S)).batch_cap == 3
        assert await engine.set_cap(100, None) == 8
        assert await engine.set_cap(None, None) == 8
        assert await engine.set_cap(2, 0.2) == 2

        async def open_again() -> bool:
            return (await engine.sample(PATIENCE_S)).batch_cap == 8

        await _until(open_again)

    asyncio.run(play())


def test_without_plugin_the_page_tells_and_the_gateway_has_to_limit(make_spec: MakeSpec) -> None:
    async def play(spec: EngineSpec, note: str) -> None:
        engine = await _started(spec)
        assert await engine.plugin_info() is None
        assert engine.cap_by == "none"
        assert note in engine.note
        await engine.warm_up()
        sample = await engine.sample(PATIENCE_S)
        assert sample.source == "metrics"
        assert sample.engine_id == spec.engine_id
        assert sample.generated_tokens == 8
        with pytest.raises(RefusedError, match="let the gateway hold it"):
            await engine.set_cap(4, None)

    asyncio.run(play(make_spec(plugin=False), ""))
    asyncio.run(play(make_spec("--fake-no-plugin"), "install rlgov in vLLM's environment"))


def test_a_plugin_that_stepped_aside(make_spec: MakeSpec) -> None:
    async def play() -> None:
        engine = await _started(make_spec("--fake-fault", 'plugin="refuse-cap"'))
        assert engine.cap_by == "none"
        assert "no admission cap" in engine.note
        with pytest.raises(RefusedError, match="no admission cap"):
            await engine.set_cap(4, None)
        blind = await _started(make_spec("--fake-fault", 'plugin="blind"'))
        assert (await blind.sample(PATIENCE_S)).source == "metrics"
        await _fault(blind.spec, reset=True)
        # The plugin would tell again, but its counters are not the page's.
        assert (await blind.sample(PATIENCE_S)).source == "metrics"

    asyncio.run(play())


def test_vllms_own_runtime_configuration_where_there_is_no_plugin(make_spec: MakeSpec) -> None:
    async def play() -> None:
        engine = await _started(make_spec("--fake-runtime-config", plugin=False))
        assert engine.cap_by == "runtime_config"
        assert await engine.set_cap(3, None) == 3
        assert await engine.set_cap(None, None) == 8
        governed = await _started(make_spec("--fake-runtime-config"))
        assert governed.cap_by == "plugin"  # only its cap falls back open by itself

    asyncio.run(play())


def test_sleep_and_wake(make_spec: MakeSpec) -> None:
    async def play() -> None:
        engine = await _started(make_spec("--enable-sleep-mode"))
        await engine.sleep()
        info = await engine.plugin_info()
        assert info is not None
        assert info.asleep
        await engine.wake()
        assert await engine.probe(PATIENCE_S)
        other = await _started(make_spec())
        with pytest.raises(RefusedError, match="--enable-sleep-mode"):
            await other.sleep()

    asyncio.run(play())


@pytest.mark.parametrize("fault", ["500", "garbage"])
def test_a_broken_plugin_is_an_error_and_not_a_sample(make_spec: MakeSpec, fault: str) -> None:
    async def play() -> None:
        engine = await _started(make_spec())
        await _fault(engine.spec, plugin=fault)
        with pytest.raises(EngineError, match=engine.spec.engine_id):
            await engine.sample(PATIENCE_S)

    asyncio.run(play())


@pytest.mark.parametrize("fault", ["empty", "truncated", "html", "500", "nan"])
def test_a_broken_page_is_an_error_and_not_a_sample(make_spec: MakeSpec, fault: str) -> None:
    async def play() -> None:
        engine = await _started(make_spec(plugin=False))
        await _fault(engine.spec, metrics=fault)
        with pytest.raises(EngineError, match=engine.spec.engine_id):
            await engine.sample(PATIENCE_S)

    asyncio.run(play())


def test_slow_answers_are_not_waited_for(make_spec: MakeSpec) -> None:
    async def play() -> None:
        engine = await _started(make_spec())
        await _fault(engine.spec, plugin="slow", metrics="slow", slow_s=1000)
        with pytest.raises(EngineError, match=r"within 0\.1 s"):
            await engine.sample(0.1)
        with pytest.raises(EngineError, match=r"within 0\.1 s"):
            await engine.set_cap(4, None, timeout_s=0.1)

    asyncio.run(play())


def test_another_engine_at_the_same_place_is_noticed(make_spec: MakeSpec) -> None:
    async def play() -> None:
        engine = await _started(make_spec())
        impostor = replace(engine.spec, engine_id="another")
        adopted = EngineProcess.adopt(impostor, engine.identity, CLOCK)
        assert adopted is not None
        with pytest.raises(EngineError, match=f"another engine .{engine.spec.engine_id}"):
            await adopted.sample(PATIENCE_S)
        other_token = replace(engine.spec, token="wrong")  # noqa: S106  # of a fake
        stranger = EngineProcess.adopt(other_token, engine.identity, CLOCK)
        assert stranger is not None
        with pytest.raises(EngineError, match="token"):
            await stranger.sample(PATIENCE_S)

    asyncio.run(play())


LAUNCHER = """
import asyncio, json, sys
from dataclasses import asdict
from pathlib import Path
from rlgov.clock import SystemClock
from rlgov.engine.process import EngineProcess, EngineSpec

async def main():
    values = json.loads(sys.argv[1])
    for name in ("command", "gpu_uuids", "arguments"):
        values[name] = tuple(values[name])
    spec = EngineSpec(**{**values, "log_path": Path(values["log_path"])})
    engine = await EngineProcess.launch(spec, SystemClock())
    await engine.wait_ready()
    print(json.dumps(asdict(engine.identity)), flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_an_engine_outlives_a_killed_parent_and_is_adopted(make_spec: MakeSpec) -> None:
    spec = make_spec("--fake-token-ms", "10")
    values = json.dumps(asdict(spec), default=str)
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, values], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        identity = ProcessIdentity(**json.loads(parent.stdout.readline()))

        async def play() -> None:
            asked = asyncio.create_task(_generate(spec, 60))

            async def busy() -> bool:
                return bool((await _state(spec))["running"])

            await _until(busy)
            parent.kill()
            parent.wait()
            assert EngineProcess.adopt(spec, replace(identity, start_ticks=1), CLOCK) is None
            assert EngineProcess.adopt(spec, replace(identity, boot_id="before"), CLOCK) is None
            engine = EngineProcess.adopt(spec, identity, CLOCK)
            assert engine is not None
            await engine.wait_ready()
            assert engine.cap_by == "plugin"
            assert await engine.probe(PATIENCE_S)
            assert (await asked)["usage"]["completion_tokens"] == 60  # the crash has cost nobody a request
            await engine.stop(PATIENCE_S)
            assert not engine.alive
            assert engine.exit_code is None  # nobody told: its parent has gone
            assert _leftovers(engine) == []
            assert EngineProcess.adopt(spec, identity, CLOCK) is None

        asyncio.run(play())


def test_a_foreign_process_is_neither_adopted_nor_stopped(make_spec: MakeSpec) -> None:
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as foreign:  # noqa: S607  # any sleep does
        identity = identify(foreign.pid)
        assert identity is not None
        stale = replace(identity, start_ticks=identity.start_ticks - 5)
        spec = make_spec()
        assert EngineProcess.adopt(spec, stale, CLOCK) is None
        engine = EngineProcess(spec, stale, CLOCK)  # held since before the pid was given away
        assert not engine.alive
        assert asyncio.run(engine.stop(0.1)) is None
        assert asyncio.run(kill_family(stale, CLOCK)) == 0
        assert foreign.poll() is None
        foreign.kill()
