"""A fake vLLM server as a real process: ``engine.py serve MODEL --port N [--fake-...]``.

It answers as vLLM 0.32 does where rlgov looks: health, models, completions and chat completions (streamed
or not, prompts as text or token ids), metrics, the rlgov plugin's calls, and what SIGTERM does to requests
in flight with and without ``--shutdown-timeout``. ``POST /fake/fault`` makes it misbehave (see
engine_faults.py), ``GET /fake/state`` tells what it was asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by its path, from anywhere

from rlgov.clock import SystemClock
from tests.fakes.engine_answer import Answer, RequestError, Served, read_body
from tests.fakes.engine_faults import fail_at_start, faults_from, parse_arguments
from tests.fakes.engine_metrics import MetricsPage
from tests.fakes.engine_model import FakeEngine, Pace

PLUGIN = "/rlgov/v1/"


class Server:
    """The HTTP side of one fake engine."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.options = parse_arguments(arguments)
        self.faults = faults_from(self.options)
        names = self.options.served_model_name or [self.options.model]
        self.model_names: list[str] = names
        self.clock = SystemClock()
        self.engine = FakeEngine(
            os.environ.get("RLGOV_ENGINE_ID") or uuid.uuid4().hex,
            Pace(
                token_s=self.options.fake_token_ms / 1000,
                prefill_token_s=self.options.fake_prefill_us / 1e6,
                max_num_seqs=self.options.max_num_seqs,
                kv_capacity_tokens=self.options.fake_kv_tokens,
            ),
            self.clock,
        )
        self.page = MetricsPage(self.engine, names[0])
        self.served = Served(
            self.engine,
            self.faults,
            self.clock,
            names,
            self.options.max_model_len,
            self.options.fake_eos_after,
        )
        self.stale_page = b""
        self.asked: Counter[str] = Counter()
        self.children: list[subprocess.Popen[bytes]] = []
        self.stopping = asyncio.Event()
        self.signals: list[int] = []

    # Which calls there are.

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self.guard], client_max_size=64 * 2**20)
        app.router.add_get("/health", self.health)
        app.router.add_get("/ping", self.health)
        app.router.add_get("/version", self.version)
        app.router.add_get("/openapi.json", self.openapi)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.completions)
        app.router.add_post("/fake/fault", self.set_fault)
        app.router.add_get("/fake/state", self.fake_state)
        if self.options.fake_runtime_config:
            app.router.add_patch("/v1/runtime_config", self.runtime_config)
        if os.environ.get("RLGOV_PLUGIN") == "1" and not self.options.fake_no_plugin:
            app.router.add_get(PLUGIN + "state", self.plugin_state)
            app.router.add_post(PLUGIN + "cap", self.plugin_cap)
            app.router.add_post(PLUGIN + "sleep", self.plugin_sleep)
            app.router.add_post(PLUGIN + "wake", self.plugin_wake)
            app.router.add_get(PLUGIN + "iterations", self.plugin_iterations)
        return app

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked[f"{request.method} {request.path}"] += 1
        sent = request.headers.get("Authorization", "")
        keys = self.options.api_key or [k for k in [os.environ.get("VLLM_API_KEY")] if k]
        if keys and request.path.startswith("/v1") and sent not in {f"Bearer {key}" for key in keys}:
            return web.json_response({"error": "Unauthorized"}, status=401)
        if request.path.startswith(PLUGIN):
            if sent != f"Bearer {os.environ.get('RLGOV_PLUGIN_TOKEN', '')}":
                return web.json_response({"error": "wrong or missing token"}, status=401)
            if (answer := await self._plugin_fault(request)) is not None:
                return answer
        try:
            return await handler(request)  # type: ignore[no-any-return]  # aiohttp leaves the handler untyped
        except RequestError as error:
            return error.response()

    async def _plugin_fault(self, request: web.Request) -> web.Response | None:
        fault = self.faults.plugin
        if fault == "slow":
            await asyncio.sleep(self.faults.slow_s)
        if fault == "missing":
            return web.json_response({"detail": "Not Found"}, status=404)
        if fault == "500":
            return web.json_response({"error": "internal error"}, status=500)
        if fault == "garbage":
            return web.Response(text="<html>not what you asked for</html>", content_type="text/html")
        if fault == "refuse-cap" and request.path.endswith("/cap"):
            return web.json_response({"error": "this scheduler has no admission cap"}, status=409)
        return None

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self.faults.health == "ok" else 503)

    async def version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def openapi(self, request: web.Request) -> web.Response:
        paths: dict[str, dict[str, Any]] = {}
        for route in request.app.router.routes():
            path = route.resource.canonical if route.resource else ""
            paths.setdefault(path, {})[route.method.lower()] = {}
        return web.json_response({"openapi": "3.1.0", "info": {"title": "fake"}, "paths": paths})

    async def models(self, _request: web.Request) -> web.Response:
        data = [
            {"id": name, "object": "model", "owned_by": "vllm", "max_model_len": self.options.max_model_len}
            for name in self.model_names
        ]
        return web.json_response({"object": "list", "data": data})

    async def metrics(self, _request: web.Request) -> web.StreamResponse:
        page = self.page.render()
        fault = self.faults.metrics
        if fault == "stale":
            page = self.stale_page = self.stale_page or page
        elif fault == "slow":
            await asyncio.sleep(self.faults.slow_s)
        elif fault == "500":
            return web.Response(status=500, text="Internal Server Error")
        elif fault == "html":
            return web.Response(text="<html><body>Bad gateway</body></html>", content_type="text/html")
        elif fault == "empty":
            page = b""
        elif fault == "truncated":
            page = page[: page.index(b"vllm:generation_tokens_total{")]
        elif fault == "nan":
            lines = page.split(b"\n")
            page = b"\n".join(
                line.rpartition(b" ")[0] + b" NaN" if line.startswith(b"vllm:num_requests") else line
                for line in lines
            )
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=page, headers=headers)

    # Generation.

    async def completions(self, request: web.Request) -> web.StreamResponse:
        fault = self.faults.take_request_fault()
        if fault == "500":
            raise RequestError(500, "EngineCore encountered an issue. See stack trace for the root cause.")
        if fault == "503":
            raise RequestError(503, "The server is overloaded.")
        if fault == "silent":
            await asyncio.sleep(self.faults.slow_s)
        answer = Answer(self.served, request, fault, await read_body(request))
        return await answer.respond()

    # The plugin.

    async def plugin_state(self, _request: web.Request) -> web.Response:
        refused = self.faults.plugin == "refuse-cap"
        plugin = {
            "vllm_version": "0.32.0",
            "rlgov_version": "fake",
            "cap_supported": not refused,
            "note": "this scheduler has no admission cap" if refused else "",
            "checks": {"version": True},
            "asleep": self.engine.asleep,
            "sleep_supported": self.options.enable_sleep_mode,
        }
        blind = self.faults.plugin == "blind"
        sample = None if blind else dataclasses.asdict(self.engine.sample())
        return web.json_response({"sample": sample, "plugin": plugin})

    async def plugin_cap(self, request: web.Request) -> web.Response:
        body = await read_body(request)
        if set(body) != {"batch_cap", "lease_s"}:
            raise RequestError(400, f"batch_cap and lease_s are what can be asked for, not {sorted(body)}")
        cap = self.engine.set_cap(body["batch_cap"], body["lease_s"])
        return web.json_response({"batch_cap": cap, "max_num_seqs": self.options.max_num_seqs})

    async def runtime_config(self, request: web.Request) -> web.Response:
        body = await read_body(request)
        cap = self.engine.set_cap(body["max_num_running_seqs"], None)
        return web.json_response({"max_num_running_seqs": cap})

    async def plugin_sleep(self, _request: web.Request) -> web.Response:
        return await self._set_asleep(asleep=True)

    async def plugin_wake(self, _request: web.Request) -> web.Response:
        return await self._set_asleep(asleep=False)

    async def _set_asleep(self, *, asleep: bool) -> web.Response:
        if not self.options.enable_sleep_mode:
            return web.json_response({"error": "started without --enable-sleep-mode"}, status=409)
        if asleep and not self.engine.idle:
            return web.json_response({"error": "requests are running"}, status=409)
        await asyncio.sleep(self.options.fake_wake_s)
        self.engine.asleep = asleep
        self.engine.wake()
        return web.json_response({"asleep": asleep})

    async def plugin_iterations(self, request: web.Request) -> web.Response:
        return web.json_response(self.engine.iterations(int(request.query.get("after", "0"))))

    # What tests ask.

    async def set_fault(self, request: web.Request) -> web.Response:
        changes = await read_body(request)
        if "exit" in changes:
            os._exit(changes["exit"])
        try:
            if changes.pop("reset", False):
                self.faults.update(dataclasses.asdict(type(self.faults)()))
            self.faults.update(changes)
        except ValueError as error:
            raise RequestError(400, str(error)) from None
        self.engine.frozen = self.faults.hang
        self.engine.wake()
        return web.json_response(dataclasses.asdict(self.faults))

    async def fake_state(self, _request: web.Request) -> web.Response:
        names = ("CUDA_VISIBLE_DEVICES", "VLLM_PLUGINS", "VLLM_SERVER_DEV_MODE")
        wanted = {k: v for k, v in os.environ.items() if k.startswith("RLGOV_") or k in names}
        return web.json_response(
            {
                "pid": os.getpid(),
                "arguments": self.arguments,
                "environment": wanted,
                "asked": dict(self.asked),
                "children": [child.pid for child in self.children],
                "signals": self.signals,
                "tp_degree": self.options.tensor_parallel_size,
                "running": len(self.engine.running),
                "waiting": len(self.engine.waiting),
                "draining": self.engine.draining,
                "asleep": self.engine.asleep,
            }
        )

    # The process.

    def start_children(self) -> None:
        """Processes that outlive a killed API server, as EngineCore and the workers may."""
        for number in range(self.options.fake_children):
            own_session = self.options.fake_detached_child and number == 0
            self.children.append(
                subprocess.Popen(["sleep", "100000"], start_new_session=own_session)  # noqa: S607  # any sleep does
            )

    def end_children(self) -> None:
        """As the API server does when its engine has drained."""
        for child in self.children:
            child.kill()
            child.wait()

    def on_signal(self, number: int) -> None:
        """SIGTERM and SIGINT."""
        self.signals.append(number)
        _log(f"[shutdown] API server: shutdown triggered by signal {number}")
        if not self.faults.ignore_sigterm:
            self.stopping.set()

    async def drain(self) -> None:
        """With a shutdown timeout let requests finish; without, or when it is over, abort them."""
        engine = self.engine
        engine.draining = True
        timeout_s = self.options.shutdown_timeout
        _log(f"[shutdown] mode={'drain' if timeout_s else 'abort'} timeout={timeout_s}s")
        if timeout_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    while not engine.idle or self.faults.drain == "stuck":
                        engine.moved.clear()
                        await engine.moved.wait()
        engine.abort_all()

    async def serve(self) -> None:
        """Start, serve until a signal, drain, stop."""
        options = self.options
        if options.fake_fail:
            fail_at_start(options.fake_fail)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))  # early, as vLLM does: it listens only when it is ready
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.on_signal, number)
        self.start_children()
        self.engine.frozen = self.faults.hang
        runner = web.AppRunner(self.application(), handler_cancellation=True, shutdown_timeout=5.0)
        iterating: asyncio.Task[None] | None = None
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), options.fake_start_s)
            if self.stopping.is_set():
                return
            iterating = asyncio.create_task(self.engine.run())
            await runner.setup()
            await web.SockSite(runner, listener, backlog=2048).start()
            _log(f"Application startup complete on port {listener.getsockname()[1]}")
            if options.fake_exit_after_s is not None:
                loop.call_later(options.fake_exit_after_s, os._exit, 1)
            await self.stopping.wait()
            await self.drain()
            if self.faults.drain == "hollow":
                self.end_children()
                await asyncio.Event().wait()
        finally:
            await runner.cleanup()
            if iterating is not None:
                iterating.cancel()
            listener.close()
            self.end_children()


def _log(line: str) -> None:
    print(f"INFO [fake] {line}", file=sys.stderr, flush=True)  # noqa: T201  # a server's log


async def _main(arguments: list[str]) -> None:
    await Server(arguments).serve()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
