"""The engines of one stack: launched, adopted, read and stopped one by one, each noted before it exists."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from rlgov.engine.diagnosis import failure
from rlgov.engine.gateway.gateway import Upstream
from rlgov.engine.process import EngineProcess, EngineSpec
from rlgov.engine.samples import EngineInfo, EngineSample
from rlgov.engine.stack_settings import SLEEP_ARGUMENT
from rlgov.engine.switch.feasibility import free_gpus, pool_gpus
from rlgov.engine.switch.journal import EngineRecord
from rlgov.engine.switch.leftovers import kill_leftovers, processes_of
from rlgov.engine.switch.machine import Strategy
from rlgov.errors import EngineError, RlgovError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rlgov.clock import Clock
    from rlgov.engine.process import PluginInfo
    from rlgov.engine.stack_settings import Offer, StackSettings

LOG = logging.getLogger(__name__)
HOST = "127.0.0.1"  # engines are reached through the gateway alone
STOP_MARGIN_S = 30.0  # vLLM's own work after its last request, before it is killed
KEPT_LOGS = 20
BATCHED_TOKENS_ARGUMENT = "--max-num-batched-tokens"


class Phase(StrEnum):
    """Of an engine's life, as samples.EngineInfo tells it."""

    STARTING = "starting"
    WARMING = "warming"
    ACTIVE = "active"
    DRAINING = "draining"
    ASLEEP = "asleep"
    STOPPING = "stopping"
    FAILED = "failed"


READABLE = frozenset({Phase.WARMING, Phase.ACTIVE, Phase.DRAINING})


@dataclass
class Engine:
    """One engine as the stack knows it."""

    spec: EngineSpec
    process: EngineProcess | None = None
    phase: Phase = Phase.STARTING
    plugin: PluginInfo | None = None
    note: str = ""
    cap_by: str = "none"
    hung: bool = False

    @property
    def engine_id(self) -> str:
        """Another one for every launch."""
        return self.spec.engine_id

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.alive

    @property
    def upstream(self) -> Upstream:
        """Where the gateway finds it."""
        return Upstream(self.spec.engine_id, self.spec.host, self.spec.port)

    @property
    def running(self) -> EngineProcess:
        """Its process. Raises EngineError before the launch."""
        if self.process is None:
            raise EngineError(f"engine {self.engine_id} has not been launched yet; wait until it is ready")
        return self.process

    def obituary(self) -> str | None:
        """Why its process has gone, from its log; None while it lives, and before the launch."""
        if self.process is None or self.process.alive:
            return None
        code = self.process.exit_code
        ended = "ended" if code is None else f"ended with exit code {code}"
        return headline(failure(f"engine {self.engine_id} {ended}", self.spec.log_path))

    def info(self) -> EngineInfo:
        """What others are told about it."""
        return EngineInfo(
            engine_id=self.engine_id,
            tp_degree=self.spec.tp_degree,
            gpu_uuids=self.spec.gpu_uuids,
            phase=self.phase.value,
            url=f"http://{self.spec.host}:{self.spec.port}",
            pid=self.process.identity.pid if self.process is not None else None,
            version=self.plugin.vllm_version if self.plugin is not None else None,
            cap_by=self.cap_by,
            note=self.note,
        )


class Fleet:
    """All engines of a stack.

    Args:
        settings: Of the stack.
        offered: Degrees and strategy.
        clock: For the engines' own timing.
        noted: Called after every change, and before an engine is launched: writes the state down.
    """

    def __init__(
        self, settings: StackSettings, offered: Offer, clock: Clock, noted: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._offered = offered
        self._clock = clock
        self._noted = noted
        self._pool = pool_gpus(offered.tp_degrees, settings.gpu_uuids)
        self.pooled = offered.strategy is Strategy.SLEEP  # engines of other degrees are kept asleep
        self.engines: dict[str, Engine] = {}
        self.kv_capacity_tokens: dict[int, int] = {}

    def records(self) -> tuple[EngineRecord, ...]:
        """For the state file."""
        return tuple(
            EngineRecord(engine.spec, engine.process.identity if engine.process else None, engine.phase.value)
            for engine in self.engines.values()
        )

    def find_asleep(self, degree: int) -> Engine | None:
        """The sleeping engine of a degree, if it lives."""
        for engine in self.engines.values():
            if engine.spec.tp_degree == degree and engine.phase is Phase.ASLEEP and engine.alive:
                return engine
        return None

    def gpus_for(self, degree: int) -> tuple[str, ...] | None:
        """GPUs that nobody uses, for one more engine; None if too few are free."""
        busy = [uuid for engine in self.engines.values() for uuid in engine.spec.gpu_uuids]
        return free_gpus(degree, self._settings.gpu_uuids, busy) if self._settings.gpu_uuids else ()

    def place(self, degree: int) -> tuple[str, ...]:
        """GPUs for an engine: free ones first, else those of its place in the pool."""
        free = None if self.pooled else self.gpus_for(degree)
        return self._pool[degree] if free is None else free

    def specify(self, degree: int) -> EngineSpec:
        """How an engine of a degree is started; another port, id and token each time."""
        settings = self._settings
        arguments = settings.arguments
        if not _given(arguments, BATCHED_TOKENS_ARGUMENT):
            arguments += (BATCHED_TOKENS_ARGUMENT, str(settings.max_num_batched_tokens))
        if self.pooled and SLEEP_ARGUMENT not in arguments:
            arguments += (SLEEP_ARGUMENT,)
        identifier = f"tp{degree}-{secrets.token_hex(4)}"
        return EngineSpec(
            engine_id=identifier,
            command=settings.command,
            model=settings.model,
            tp_degree=degree,
            gpu_uuids=self.place(degree) if settings.gpu_uuids else (),
            host=HOST,
            port=_free_port(),
            max_num_seqs=settings.max_num_seqs,
            arguments=arguments,
            environment=dict(settings.environment),
            log_path=settings.run / f"engine-{identifier}.log",
            token=secrets.token_hex(16),
            plugin=settings.plugin,
            start_timeout_s=settings.timing.start_timeout_s,
            shutdown_timeout_s=settings.timing.shutdown_timeout_s,
        )

    def compatible(self, spec: EngineSpec) -> bool:
        """Whether an engine of an earlier run was started as this run would start it."""
        ours = self._settings
        return (
            spec.model == ours.model
            and spec.command == ours.command
            and spec.tp_degree in self._offered.tp_degrees
            and set(spec.gpu_uuids) <= set(ours.gpu_uuids)
            and bool(spec.gpu_uuids) == bool(ours.gpu_uuids)
            and spec.max_num_seqs == ours.max_num_seqs
            and spec.plugin == ours.plugin
            and spec.environment == dict(ours.environment)
            and set(ours.arguments) <= set(spec.arguments)
        )

    async def launch(self, degree: int) -> Engine:
        """Start the process of a new engine. Raises EngineError, with nothing left behind."""
        _prune_logs(self._settings.run)
        engine = Engine(self.specify(degree))
        self.engines[engine.engine_id] = engine
        self._noted()
        try:
            engine.process = await EngineProcess.launch(engine.spec, self._clock)
        except BaseException:
            kill_leftovers(engine.spec)
            self.forget(engine)
            raise
        self._noted()
        return engine

    def adopt(self, record: EngineRecord) -> Engine | None:
        """Take over an engine of an earlier run; None if its process has gone."""
        identity = record.identity
        if identity is None:
            identity = next(iter(processes_of(record.spec)), None)
        process = EngineProcess.adopt(record.spec, identity, self._clock) if identity is not None else None
        if process is None:
            return None
        engine = Engine(record.spec, process, Phase(record.phase))
        self.engines[engine.engine_id] = engine
        return engine

    async def ready(self, engine: Engine) -> None:
        """Wait until an engine is healthy, and learn what it can do. Raises EngineError."""
        await engine.running.wait_ready()
        await self.inspect(engine)
        self.set_phase(engine, Phase.WARMING)

    async def inspect(self, engine: Engine) -> None:
        """Learn what an engine can do."""
        engine.plugin = await engine.running.plugin_info()
        engine.cap_by = engine.running.cap_by if engine.running.cap_by != "none" else "gateway"
        engine.note = engine.running.note

    async def warm_up(self, engine: Engine) -> None:
        """A real completion. Raises EngineError when it does not come."""
        timing = self._settings.timing
        try:
            async with asyncio.timeout(timing.warm_up_timeout_s):
                took_s = await engine.running.warm_up()
        except TimeoutError:
            raise EngineError(
                f"engine {engine.engine_id} answers its health check but gave no completion within "
                f"{timing.warm_up_timeout_s:g} s; look at {engine.spec.log_path}"
            ) from None
        LOG.info("engine %s: first completion after %.1f s", engine.engine_id, took_s)
        self.set_phase(engine, Phase.WARMING)
        await self._learn_capacity(engine)

    async def _learn_capacity(self, engine: Engine) -> None:
        try:
            sample = await engine.running.sample(self._settings.timing.sample_timeout_s)
        except (RlgovError, OSError, TimeoutError):
            return  # the estimate stays
        if sample.kv_capacity_tokens:
            self.kv_capacity_tokens[engine.spec.tp_degree] = sample.kv_capacity_tokens

    async def sleep(self, engine: Engine) -> None:
        """Put an engine to sleep. Raises EngineError where it will not."""
        async with asyncio.timeout(self._settings.timing.sleep_timeout_s):
            await engine.running.sleep()
        self.set_phase(engine, Phase.ASLEEP)

    async def wake(self, engine: Engine) -> None:
        """Wake an engine. Raises EngineError where it will not."""
        self.set_phase(engine, Phase.STARTING)
        async with asyncio.timeout(self._settings.timing.sleep_timeout_s):
            await engine.running.wake()

    async def drain(self, engine: Engine, dispatched: Callable[[], int]) -> None:
        """Wait until an engine has nothing left to do.

        Args:
            engine: That gets no new requests any more.
            dispatched: Requests the gateway has sent to it and not finished.

        Raises:
            EngineError: It still had some after the bound; they go on.
        """
        timing = self._settings.timing
        self.set_phase(engine, Phase.DRAINING)
        deadline_s = self._clock.monotonic_s() + timing.drain_timeout_s
        while True:
            left: object = dispatched()
            if not left:
                left = await self._left(engine)
                if left == 0:
                    return
            if self._clock.monotonic_s() >= deadline_s:
                raise EngineError(
                    f"{left} requests still run after {timing.drain_timeout_s:g} s; "
                    "a longer --drain-timeout-s would wait for them"
                )
            await asyncio.sleep(timing.poll_s)

    async def _left(self, engine: Engine) -> int | str:
        try:
            sample = await engine.running.sample(self._settings.timing.sample_timeout_s)
        except (RlgovError, OSError, TimeoutError) as error:
            return f"an unknown number of ({error})"
        return sample.running + sample.waiting

    async def stop(self, engine: Engine, grace_s: float | None = None) -> int:
        """End an engine: it may finish its requests within the shutdown timeout, then it is killed.

        Args:
            engine: Which nobody routes to any more.
            grace_s: Instead of the shutdown timeout.

        Returns:
            Processes that had to be killed because they were left over.
        """
        wait_s = self._settings.timing.shutdown_timeout_s + STOP_MARGIN_S if grace_s is None else grace_s
        self.set_phase(engine, Phase.STOPPING)
        try:
            if engine.process is not None:
                await engine.process.stop(wait_s)
        finally:
            left = kill_leftovers(engine.spec)
            if left:
                LOG.warning("engine %s: %d processes were left over and were killed", engine.engine_id, left)
            self.forget(engine)
        return left

    def forget(self, engine: Engine) -> None:
        """An engine is no more."""
        self.engines.pop(engine.engine_id, None)
        self._noted()

    def changed(self) -> None:
        """Something about an engine changed elsewhere."""
        self._noted()

    def set_phase(self, engine: Engine, phase: Phase) -> None:
        """Note what an engine is about."""
        if engine.phase is not phase:
            engine.phase = phase
            self._noted()

    async def read(self, engine: Engine) -> EngineSample | str:
        """One sample of an engine within the bound, or why there is none."""
        try:
            async with asyncio.timeout(self._settings.timing.sample_timeout_s):
                return await engine.running.sample(self._settings.timing.sample_timeout_s)
        except TimeoutError:
            return f"no answer within {self._settings.timing.sample_timeout_s:g} s"
        except (RlgovError, OSError) as error:
            return str(error) or type(error).__name__


def headline(message: str) -> str:
    """A failure in one line: the cause, the remedy, where the log is, without the log's end."""
    lines = [line for line in message.splitlines() if not line.startswith("  ")]
    return " ".join(lines).removesuffix(", which ends with")


def _given(arguments: tuple[str, ...], flag: str) -> bool:
    return any(argument == flag or argument.startswith(f"{flag}=") for argument in arguments)


def _prune_logs(run: Path) -> None:
    """Forget the logs of long ago: every launch writes one of its own."""
    logs = sorted(run.glob("engine-*.log"), key=lambda path: path.stat().st_mtime)
    for path in logs[:-KEPT_LOGS]:
        path.unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
