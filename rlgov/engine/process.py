"""One ``vllm serve`` as a process of its own: launched or found again, asked, and stopped without leftovers.

An engine outlives the rlgov that launched it: it leads a session of its own and writes its log to a file, so
that a crash of rlgov ends no request, and the next rlgov adopts what still serves.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from rlgov.engine.arguments import api_key, command_line, process_environment
from rlgov.engine.client import (
    CALL_S,
    EngineClient,
    NoSuchCallError,
    PluginInfo,
    RefusedError,
    UnreachableError,
)
from rlgov.engine.diagnosis import failure, rotate
from rlgov.engine.identity import ProcessIdentity, family, identify, is_helper, is_running, send_signal
from rlgov.engine.spawn import check_port, kill_family, spawn
from rlgov.engine.spec import EngineSpec
from rlgov.errors import EngineError

if TYPE_CHECKING:
    from rlgov.clock import Clock
    from rlgov.engine.samples import EngineIterations, EngineSample

__all__ = ["EngineProcess", "EngineSpec", "PluginInfo", "ProcessIdentity", "kill_family"]

POLL_S = 0.05
SLOWEST_POLL_S = 0.5  # of /health while the engine loads its model
WARM_UP_TOKENS = 8
SLEEP_S = 120.0  # weights of tens of GB go through the host's memory
LEFTOVER_S = 3.0  # for helpers that tidy up after the API server has gone, before they are killed
END_S = 2.0
HOLLOW_S = 10.0  # an API server whose engine has gone may still be handing out the last answers
PLUGIN_RACE_S = 10.0


class EngineProcess:
    """One engine. Made by :meth:`launch` or :meth:`adopt`; holds nothing open, so there is nothing to close.

    Attributes:
        spec: What was launched.
        identity: Which process it is: the API server, which leads the engine's session.
        note: Why the plugin is not in use, where it was asked for; empty otherwise.
    """

    def __init__(self, spec: EngineSpec, identity: ProcessIdentity, clock: Clock) -> None:
        self.spec = spec
        self.identity = identity
        self.note = ""
        self._clock = clock
        self._status: int | None = None
        self._cap_by: str | None = None
        self._plugin = spec.plugin
        self._plugin_samples = spec.plugin
        self._stopping = False
        self._client = EngineClient(
            host=spec.host,
            port=spec.port,
            token=spec.token,
            api_key=api_key(spec),
            engine_id=spec.engine_id,
            clock=clock,
        )

    @classmethod
    async def launch(cls, spec: EngineSpec, clock: Clock) -> Self:
        """Start an engine; it is not ready yet.

        Raises:
            ConfigError: An argument is rlgov's own.
            EngineError: The port is taken, or the program cannot be run.
        """
        command = command_line(spec)
        environment = process_environment(spec)
        check_port(spec)
        rotate(spec.log_path)
        pid = spawn(spec, command, environment)
        identity = identify(pid)
        if identity is None:  # our own child stays visible until we ask for its exit status
            raise EngineError(f"/proc does not show process {pid}: rlgov needs Linux with /proc mounted")
        return cls(spec, identity, clock)

    @classmethod
    def adopt(cls, spec: EngineSpec, identity: ProcessIdentity, clock: Clock) -> Self | None:
        """Take over an engine of an earlier rlgov. None if it has gone; its pid may be another's now."""
        return cls(spec, identity, clock) if is_running(identity) else None

    @property
    def alive(self) -> bool:
        """Whether the API server's process lives. This reaps it when it has ended."""
        if self._status is not None:
            return False
        if is_running(self.identity):
            return True
        now = identify(self.identity.pid)
        if now == self.identity:  # a zombie, ours or another parent's
            with suppress(ChildProcessError):
                pid, status = os.waitpid(self.identity.pid, os.WNOHANG)
                self._status = status if pid else None
        return False

    @property
    def exit_code(self) -> int | None:
        """As of subprocess: negative for a signal. None while it lives, and where rlgov is not its parent."""
        if self.alive or self._status is None:
            return None
        return os.waitstatus_to_exitcode(self._status)

    @property
    def cap_by(self) -> str:
        """Who holds the batch cap: "plugin", "runtime_config" (vLLM itself) or "none"; known once ready."""
        return self._cap_by or "none"

    async def wait_ready(self) -> None:
        """Wait until ``/health`` says 200, and find out what the engine can do.

        Raises:
            EngineError: It has exited or takes too long: with the telling line of its log, the remedy where
                one is known, and the log's end. Or another engine answers at its port.
        """
        started_s = self._clock.monotonic_s()
        pause_s = POLL_S
        while not await self._client.healthy():
            self._check_alive("before it was ready")
            waited_s = self._clock.monotonic_s() - started_s
            if waited_s >= self.spec.start_timeout_s:
                raise EngineError(self._failure(f"is not ready after {waited_s:.0f} s"))
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.3, SLOWEST_POLL_S)
        self._check_alive("when it became ready; another server answers at its port")
        await self.plugin_info()

    async def warm_up(self) -> float:
        """Have the first completion done before traffic comes: it may take half a minute.

        Returns:
            Seconds it took.

        Raises:
            EngineError: It exits, does not answer within the start timeout, or drops the request.
        """
        started_s = self._clock.monotonic_s()
        asked = asyncio.create_task(self._client.complete(WARM_UP_TOKENS, self.spec.start_timeout_s))
        try:
            while not asked.done():
                await asyncio.wait({asked}, timeout=SLOWEST_POLL_S)
                if not asked.done():
                    self._check_alive("during its first completion")
            try:
                await asked
            except UnreachableError:
                # Its connections break a moment before it has ended.
                await self._wait_gone([self.identity], END_S)
                self._check_alive("during its first completion")
                raise
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        return self._clock.monotonic_s() - started_s

    async def probe(self, timeout_s: float) -> bool:
        """Whether a request of one token is answered in time.

        It queues behind other requests like any other: False of an engine that is full says little; then look
        at the progress of its counters. Never ask an engine that sleeps. One that is being stopped is not
        asked at all: a request that reaches vLLM late in its shutdown is never answered, and keeps it from
        ending.
        """
        if self._stopping:
            return False
        try:
            await self._client.complete(1, timeout_s)
        except EngineError:
            return False
        return True

    async def sample(self, timeout_s: float) -> EngineSample:
        """Gauges and counters: the plugin's, or the metrics page's without one. Raises EngineError."""
        if self._plugin_samples:
            try:
                sample = (await self._client.plugin_state(timeout_s)).sample
            except NoSuchCallError as error:
                self._step_back(error)
            else:
                if sample is not None:
                    return sample
                self._plugin_samples = False  # for good: counters of plugin and page must not be mixed
        return await self._client.metrics_sample(timeout_s)

    async def iterations(self, after: int) -> EngineIterations:
        """Iterations after a cursor, from the plugin. Raises EngineError, also where there is none."""
        return await self._client.plugin_iterations(after)

    async def plugin_info(self) -> PluginInfo | None:
        """What the plugin says about itself; None without plugin. Also finds out who can hold the batch cap.

        Raises:
            EngineError: The engine cannot be reached, or its answer is not understood.
        """
        info = None
        if self._plugin:
            try:
                async for attempt in AsyncRetrying(  # health may be there before every route is
                    retry=retry_if_exception_type(UnreachableError),
                    stop=stop_after_delay(PLUGIN_RACE_S),
                    wait=wait_fixed(POLL_S),
                    reraise=True,
                ):
                    with attempt:
                        info = (await self._client.plugin_state()).plugin
            except NoSuchCallError as error:
                self._step_back(error)
        if info is not None and info.note:
            self.note = info.note
        if info is not None and info.cap_supported:
            # Before vLLM's own call: only the plugin's cap falls back open by itself when rlgov dies.
            self._cap_by = "plugin"
        else:
            self._cap_by = "runtime_config" if await self._client.has_runtime_config() else "none"
        return info

    async def set_cap(self, batch_cap: int | None, lease_s: float | None, timeout_s: float = CALL_S) -> int:
        """Limit how many requests run at once; None restores the engine's maximum.

        Args:
            batch_cap: Requests; a cap above the maximum is the maximum.
            lease_s: The cap falls back to the maximum if it is not set again within this time. vLLM's own
                call knows no lease: there the caller has to restore it.
            timeout_s: Seconds to wait for the answer.

        Returns:
            The cap in force.

        Raises:
            RefusedError: The engine cannot limit them; the gateway can.
            EngineError: It cannot be reached.
        """
        if self._cap_by is None:
            await self.plugin_info()
        if self._cap_by == "plugin":
            return await self._client.set_plugin_cap(batch_cap, lease_s, timeout_s)
        if self._cap_by == "runtime_config":
            largest = self.spec.max_num_seqs
            wanted = largest if batch_cap is None else min(batch_cap, largest)
            return await self._client.set_runtime_cap(wanted, timeout_s)
        why = self.note or "it runs without rlgov's plugin"
        raise RefusedError(
            f"engine {self.spec.engine_id} cannot hold a batch cap ({why}): let the gateway hold it"
        )

    async def sleep(self) -> None:
        """Free most GPU memory, keeping the process. Nothing may run. Raises EngineError, RefusedError."""
        await self._client.set_asleep(asleep=True, timeout_s=SLEEP_S)

    async def wake(self) -> None:
        """Undo :meth:`sleep`. Raises EngineError, RefusedError."""
        await self._client.set_asleep(asleep=False, timeout_s=SLEEP_S)

    async def stop(self, grace_s: float) -> int | None:
        """End the engine, and leave no process of it behind.

        SIGTERM goes to the API server alone, which lets requests in flight finish within the shutdown
        timeout; what lives after ``grace_s``, or after the API server's end, is killed: its session and
        descendants. An API server that outlives its engine waits for a client for ever: it is killed, too.

        Args:
            grace_s: Longer than the shutdown timeout, or requests are lost; 0 kills at once.

        Returns:
            The exit code, None if unknown.

        Raises:
            EngineError: Processes of it cannot be killed: they hang in the kernel or a driver.
        """
        self._stopping = True
        known = family(self.identity, self._mark)
        if grace_s > 0 and send_signal(self.identity, signal.SIGTERM):
            await self._wait_ended(known, grace_s)
            if not self.alive:
                await self._wait_gone(family(self.identity, self._mark), LEFTOVER_S)
        await kill_family(self.identity, self._clock, mark=self._mark, known=known)
        return self.exit_code

    @property
    def _mark(self) -> str:
        return f"RLGOV_ENGINE_ID={self.spec.engine_id}"

    def _step_back(self, error: NoSuchCallError) -> None:
        self._plugin = self._plugin_samples = False
        self.note = f"rlgov's plugin is not loaded; install rlgov in vLLM's environment ({error})"

    def _check_alive(self, when: str) -> None:
        if not self.alive:
            code = "" if self.exit_code is None else f" with {self.exit_code}"
            killed = self.exit_code == -signal.SIGKILL
            hint = " (killed: see the kernel's log whether the machine ran out of memory)" if killed else ""
            raise EngineError(self._failure(f"exited{code}{hint} {when}"))

    def _failure(self, what: str) -> str:
        name = f"engine {self.spec.engine_id} ({self.spec.model}, TP {self.spec.tp_degree})"
        return failure(f"{name} {what}", self.spec.log_path)

    async def _wait_ended(self, known: list[ProcessIdentity], grace_s: float) -> None:
        """Wait until the API server has ended, for ``grace_s``, or until only its shell is left."""
        engine = [one for one in known if one != self.identity and not is_helper(one)]
        now_s = self._clock.monotonic_s()
        until_s = now_s + grace_s
        hollow_s = now_s
        while self.alive and now_s < until_s:
            if not engine or any(map(is_running, engine)):
                hollow_s = now_s
            elif now_s - hollow_s >= HOLLOW_S:
                return
            await asyncio.sleep(POLL_S)
            now_s = self._clock.monotonic_s()

    async def _wait_gone(self, processes: list[ProcessIdentity], timeout_s: float) -> bool:
        until_s = self._clock.monotonic_s() + timeout_s
        while any(map(is_running, processes)):
            if self._clock.monotonic_s() >= until_s:
                return False
            await asyncio.sleep(POLL_S)
        return True
