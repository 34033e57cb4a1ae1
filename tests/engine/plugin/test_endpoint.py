"""The HTTP interface without a web framework: what is let in, and what is answered."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlgov
from rlgov.engine.plugin import endpoint
from rlgov.engine.plugin.endpoint import BODY_LIMIT, Api, Endpoint, Facts
from rlgov.engine.plugin.entry import Inert
from rlgov.engine.plugin.entry import endpoint as make_endpoint

TOKEN = "a-token"  # noqa: S105  # of a test
SHOWN = f"Bearer {TOKEN}"


class FakeEngine:
    """Answers as the methods in the engine's process do, and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.sample: dict[str, Any] | None = {"running": 0, "waiting": 0}
        self.asleep = False
        self.answers: dict[str, Any] = {}
        self.hang = asyncio.Event()

    async def call(self, method: str, *args: object) -> Any:
        self.calls.append((method, *args))
        if method in self.answers:
            answer = self.answers[method]
            if isinstance(answer, Exception):
                raise answer
            if answer is self.hang:
                await self.hang.wait()
            return answer
        if method == "rlgov_state":
            return {
                "sample": self.sample,
                "vllm_version": "0.32.0",
                "cap_supported": True,
                "note": "",
                "checks": {"cap": True},
                "asleep": self.asleep,
            }
        if method == "rlgov_cap":
            return {"batch_cap": args[0] or 32, "max_num_seqs": 32}
        return {"cursor": 0, "dropped": 0, "columns": [], "rows": []}

    async def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))
        self.asleep = True

    async def wake(self) -> None:
        self.calls.append(("wake",))
        self.asleep = False


def _ask(
    engine: FakeEngine,
    method: str,
    path: str,
    body: object = None,
    *,
    query: dict[str, str] | None = None,
    shown: str = SHOWN,
    token: str = TOKEN,
    can_sleep: bool = True,
) -> tuple[int, dict[str, Any]]:
    api = Api(token, engine, Facts(sleep_supported=can_sleep, checks={"utility_calls": True}))
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    return asyncio.run(api.answer(method, path, query or {}, shown, raw))


@pytest.mark.parametrize(
    "shown",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer a-toke",
        "Bearer a-tokenn",
        "bearer a-token",
        "a-token",
        "Bearer \udcff",
    ],
)
@pytest.mark.parametrize("path", ["/state", "/cap", "/no-such-path"])
def test_without_the_token_nothing_is_told_and_nothing_done(shown: str, path: str) -> None:
    engine = FakeEngine()
    status, answer = _ask(engine, "GET", path, shown=shown)
    assert status == 401
    assert set(answer) == {"error"}
    assert engine.calls == []


def test_an_engine_started_without_a_token_lets_nobody_in() -> None:
    assert _ask(FakeEngine(), "GET", "/state", token="", shown="Bearer ")[0] == 401


def test_state_joins_what_both_processes_know() -> None:
    status, answer = _ask(FakeEngine(), "GET", "/state")
    assert status == 200
    assert answer == {
        "sample": {"running": 0, "waiting": 0},
        "plugin": {
            "vllm_version": "0.32.0",
            "rlgov_version": rlgov.__version__,
            "cap_supported": True,
            "note": "",
            "checks": {"utility_calls": True, "cap": True},
            "asleep": False,
            "sleep_supported": True,
        },
    }


@pytest.mark.parametrize(("batch_cap", "lease_s"), [(4, None), (4, 2.5), (4, 3), (None, None)])
def test_a_cap_is_passed_on(batch_cap: int | None, lease_s: float | None) -> None:
    engine = FakeEngine()
    status, answer = _ask(engine, "POST", "/cap", {"batch_cap": batch_cap, "lease_s": lease_s})
    assert (status, answer) == (200, {"batch_cap": batch_cap or 32, "max_num_seqs": 32})
    assert engine.calls == [("rlgov_cap", batch_cap, lease_s)]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"batch_cap": 4, "lease_s": NaN}',
        b'{"batch_cap": 4, "lease_s": Infinity}',
        b'{"batch_cap": 4, "lease_s": 1e999}',
        b"[" * 2000,
        {"batch_cap": 4},
        {"lease_s": 4},
        {"batch_cap": 4, "lease_s": None, "force": True},
        {"batch_cap": True, "lease_s": None},
        {"batch_cap": 4.0, "lease_s": None},
        {"batch_cap": "4", "lease_s": None},
        {"batch_cap": 0, "lease_s": None},
        {"batch_cap": -1, "lease_s": None},
        {"batch_cap": 2**31, "lease_s": None},
        {"batch_cap": 4, "lease_s": 0},
        {"batch_cap": 4, "lease_s": -1.5},
        {"batch_cap": 4, "lease_s": True},
        {"batch_cap": 4, "lease_s": "2"},
    ],
)
def test_a_body_of_another_form_is_refused_before_the_engine_hears_of_it(body: object) -> None:
    engine = FakeEngine()
    status, answer = _ask(engine, "POST", "/cap", body)
    assert status == 400
    assert answer["error"]
    assert engine.calls == []


@settings(deadline=None)  # on a loaded machine one example may take long
@given(st.binary(max_size=200), st.sampled_from(["/cap", "/sleep", "/wake", "/state", "/iterations"]))
def test_no_body_makes_it_fail(body: bytes, path: str) -> None:
    method = "GET" if path in {"/state", "/iterations"} else "POST"
    status, answer = _ask(FakeEngine(), method, path, body)
    assert status == 200 or (status == 400 and answer["error"])


def test_a_large_body_is_refused() -> None:
    assert _ask(FakeEngine(), "POST", "/cap", b" " * (BODY_LIMIT + 1))[0] == 413


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/cap"), ("POST", "/state"), ("GET", "/"), ("GET", "/../state")]
)
def test_other_paths_do_not_exist(method: str, path: str) -> None:
    assert _ask(FakeEngine(), method, path)[0] == 404


def test_a_cap_the_engine_cannot_hold_is_a_conflict_with_its_reason() -> None:
    engine = FakeEngine()
    engine.answers["rlgov_cap"] = {"error": "this vLLM cannot"}
    assert _ask(engine, "POST", "/cap", {"batch_cap": 4, "lease_s": None}) == (
        409,
        {"error": "this vLLM cannot"},
    )


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "", "9" * 30, "٣"])
def test_a_cursor_is_a_whole_number(after: str) -> None:
    assert _ask(FakeEngine(), "GET", "/iterations", query={"after": after})[0] == 400


def test_iterations_start_at_the_cursor() -> None:
    engine = FakeEngine()
    assert _ask(engine, "GET", "/iterations", query={"after": "17"})[0] == 200
    assert _ask(engine, "GET", "/iterations")[0] == 200
    assert engine.calls == [("rlgov_iterations", 17), ("rlgov_iterations", 0)]


def test_parameters_nobody_knows_are_refused() -> None:
    assert _ask(FakeEngine(), "GET", "/state", query={"verbose": "1"})[0] == 400


def test_an_engine_that_cannot_sleep_says_so_and_is_not_asked() -> None:
    """vLLM answers 200 on a CPU, and does nothing."""
    engine = FakeEngine()
    for path in ("/sleep", "/wake"):
        status, answer = _ask(engine, "POST", path, {}, can_sleep=False)
        assert status == 409
        assert "--enable-sleep-mode" in answer["error"]
    assert engine.calls == []


@pytest.mark.parametrize("sample", [{"running": 1, "waiting": 0}, {"running": 0, "waiting": 2}, None])
def test_an_engine_with_requests_is_not_put_to_sleep(sample: dict[str, int] | None) -> None:
    engine = FakeEngine()
    engine.sample = sample
    assert _ask(engine, "POST", "/sleep", {"level": 1})[0] == 409
    assert ("sleep", 1) not in engine.calls


def test_sleep_and_wake() -> None:
    engine = FakeEngine()
    assert _ask(engine, "POST", "/sleep", {"level": 1}) == (200, {"asleep": True})
    assert _ask(engine, "POST", "/wake", {}) == (200, {"asleep": False})
    assert _ask(engine, "POST", "/sleep", {"level": 2})[0] == 400


def test_a_failing_engine_is_reported() -> None:
    engine = FakeEngine()
    engine.answers["rlgov_state"] = RuntimeError("engine core is dead")
    status, answer = _ask(engine, "GET", "/state")
    assert status == 503
    assert "engine core is dead" in answer["error"]


def test_a_hanging_engine_is_reported_and_may_still_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "CALL_TIMEOUT_S", 0.01)

    async def ask() -> tuple[int, dict[str, Any]]:
        engine = FakeEngine()
        engine.answers["rlgov_state"] = engine.hang
        api = Api(TOKEN, engine, Facts(sleep_supported=False, checks={}))
        answer = await api.answer("GET", "/state", {}, SHOWN, b"")
        engine.hang.set()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert [await task for task in others] == [engine.hang]  # it was not cancelled
        return answer

    status, answer = asyncio.run(ask())
    assert status == 504
    assert "hangs" in answer["error"]


def _app(*paths: str) -> Any:
    added: list[tuple[str, list[str]]] = []
    router = SimpleNamespace(add_route=lambda path, _handler, methods: added.append((path, methods)))
    return SimpleNamespace(routes=[SimpleNamespace(path=path) for path in paths], router=router, added=added)


@pytest.mark.parametrize("paths", [(), ("/v1/runtime_config",)])
def test_the_endpoint_adds_one_route_and_looks_for_vllms_own(paths: tuple[str, ...]) -> None:
    app, plugin = _app("/health", *paths), Endpoint(TOKEN)
    plugin.attach_router(app)
    assert app.added == [("/rlgov/v1/{call:path}", ["GET", "POST"])]
    calls = []

    async def call_utility_async(method: str, *args: object) -> Any:
        calls.append((method, *args))
        return await FakeEngine().call(method, *args)

    client = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=False)),
        engine_core=SimpleNamespace(call_utility_async=call_utility_async),
    )
    asyncio.run(plugin.init_state(client, None, None))
    assert plugin._api is not None
    status, answer = asyncio.run(plugin._api.answer("GET", "/state", {}, SHOWN, b""))
    assert status == 200
    assert answer["plugin"]["checks"]["runtime_config_route"] is bool(paths)
    assert calls == [("rlgov_state",)]


def test_without_its_variable_the_plugin_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLGOV_PLUGIN", raising=False)
    app, plugin = _app(), make_endpoint()
    assert isinstance(plugin, Inert)
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(None, None, None))
    assert app.added == []


def test_with_its_variable_it_takes_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLGOV_PLUGIN", "1")
    monkeypatch.setenv("RLGOV_PLUGIN_TOKEN", TOKEN)
    plugin = make_endpoint()
    assert isinstance(plugin, Endpoint)
    assert plugin.name == "rlgov"  # as VLLM_PLUGINS names it
