"""The load generator: a plan's requests at their times, whatever the server does.

In an open loop no send ever waits for an answer, and every latency counts from the time the plan wanted
the request sent. A server that stalls therefore shows its stall in every request that fell due meanwhile,
instead of slowing the generator down ("coordinated omission").
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import sys
import threading
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import TYPE_CHECKING

from rlgov.errors import ConfigError
from rlgov.workload.load_client import LoadClient
from rlgov.workload.load_plan import build_plan
from rlgov.workload.load_prompts import BodyBuilder
from rlgov.workload.load_result import LoadResult, RequestResult, Verdict, summarize_load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rlgov.clock import Clock
    from rlgov.config import LoadSettings
    from rlgov.workload.load_plan import LoadPlan, PlannedRequest
    from rlgov.workload.trace import Trace

LEAD_S = 0.2  # between the first body built and the start of the run
AHEAD_BODIES = 512
AHEAD_BYTES = 64_000_000
QUIET_S = 0.003  # a body is built ahead only when nothing falls due within this
FINE_S = 0.0005  # timers are rounded to a millisecond; closer to a send the loop is polled instead
BURST = 8  # sends before the streams have their turn
PROGRESS_S = 0.5
NEVER = 2**31 - 1  # collections of the middle generation before a full one


async def run_load(
    trace: Trace,
    settings: LoadSettings,
    clock: Clock,
    *,
    progress: Callable[[int, int, str], None] | None = None,
    stop: asyncio.Event | None = None,
) -> LoadResult:
    """Send a trace's requests and wait for their answers.

    Args:
        trace: The requests; ``settings`` say which slice and how fast.
        settings: Where to, and how.
        clock: A clock that runs with the event loop; it stamps every time.
        progress: Called now and then with finished requests, planned ones, and a word on them.
        stop: When it is set, nothing more is sent, and what is under way is given up.

    Raises:
        ConfigError: The variable that should hold the API key is not set.
        DeploymentError: The server does not tell its model, and none is named.
        TraceError: The slice is empty.
    """
    plan = build_plan(trace, settings)
    key = _api_key(settings)
    run_id = f"load-{int(clock.wall_s() * 1000):x}"
    async with LoadClient(settings, clock, key, run_id) as client:
        model = settings.model or await client.first_model()
        run = _Run(plan, settings, clock, client, BodyBuilder.for_plan(settings, model, plan))
        interrupted = await run.until(stop or asyncio.Event(), progress)
    rows = tuple(sorted(run.rows, key=lambda row: row.index))
    return LoadResult(
        trace=plan.trace,
        url=settings.url,
        model=model,
        api=settings.api,
        seed=settings.seed,
        concurrency=settings.concurrency,
        started_s=run.start_s,
        started_wall_s=clock.wall_s() - (clock.monotonic_s() - run.start_s),
        planned=len(plan),
        trimmed=plan.trimmed,
        interrupted=interrupted,
        notes=plan.notes,
        summary=summarize_load(
            rows,
            slo_ttft_s=settings.slo_ttft_s,
            slo_tpot_s=settings.slo_tpot_s,
            prefix_tokens_asked=int(plan.prefix_tokens.sum()),
        ),
        requests=rows,
    )


def run_load_blocking(
    trace: Trace,
    settings: LoadSettings,
    clock: Clock,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> LoadResult:
    """:func:`run_load` on a uvloop event loop of its own.

    SIGINT and SIGTERM end it early, with a result; so does the end of standard input where that is asked for.
    """
    import uvloop  # noqa: PLC0415  # of the live extra; who brings an event loop does without

    raise_file_limit()

    async def main() -> LoadResult:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        # Elsewhere than in the main thread Python delivers no signals.
        here = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if here else ()
        for number in signals:
            loop.add_signal_handler(number, stop.set)
        with _at_end_of_input(loop, stop) if settings.end_with_input else nullcontext():
            try:
                return await run_load(trace, settings, clock, progress=progress, stop=stop)
            finally:
                for number in signals:
                    loop.remove_signal_handler(number)

    with _short_pauses(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


@contextmanager
def _at_end_of_input(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> Iterator[None]:
    """Sets ``stop`` when nobody holds the other end of standard input any more."""
    handle = sys.stdin.fileno()

    def read() -> None:
        if not os.read(handle, 4096):
            loop.remove_reader(handle)
            stop.set()

    loop.add_reader(handle, read)
    try:
        yield
    finally:
        loop.remove_reader(handle)


@contextmanager
def _short_pauses() -> Iterator[None]:
    """No full garbage collections: with thousands of streams each stops every send for tens of milliseconds.

    Young objects are still collected, and requests leave next to no cycles behind.
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(thresholds[0], thresholds[1], NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def raise_file_limit() -> None:
    """Allow as many open connections as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _api_key(settings: LoadSettings) -> str | None:
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise ConfigError(
            f"environment variable {settings.api_key_env} is not set; put the server's API key there"
        )
    return key


@dataclass(slots=True)
class _Run:
    """One run while it goes."""

    plan: LoadPlan
    settings: LoadSettings
    clock: Clock
    client: LoadClient
    builder: BodyBuilder
    rows: list[RequestResult] = field(default_factory=list)
    under_way: set[asyncio.Task[None]] = field(default_factory=set)
    start_s: float = 0.0
    bad: int = 0
    ending: bool = False
    fault: BaseException | None = None  # an error of this program in the task of a request

    async def until(self, stop: asyncio.Event, progress: Callable[[int, int, str], None] | None) -> bool:
        """Run to the end, or until ``stop``; tells whether it was stopped."""
        work = asyncio.ensure_future(self._closed_loop() if self.settings.concurrency else self._open_loop())
        stopped = asyncio.ensure_future(stop.wait())
        telling = asyncio.ensure_future(self._tell(progress)) if progress else None
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            interrupted = not work.done()
            if not interrupted:
                work.result()  # raises what went wrong in here
        finally:
            self.ending = True
            others = [task for task in (work, stopped, telling) if task is not None]
            tasks = [*others, *self.under_way]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if progress and not interrupted:
            progress(len(self.rows), len(self.rows), self._words())
        return interrupted

    async def _tell(self, progress: Callable[[int, int, str], None]) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            progress(min(len(self.rows), len(self.plan)), len(self.plan), self._words())

    def _words(self) -> str:
        bad = f", {self.bad} not served" if self.bad else ""
        return f"{len(self.under_way)} under way{bad}"

    async def _open_loop(self) -> None:
        bodies = self._bodies(self.plan)
        ahead: deque[tuple[PlannedRequest, bytes]] = deque()
        ahead_bytes = 0
        first = next(bodies, None)
        if first is not None:
            ahead.append(first)
        self.start_s = self.clock.monotonic_s() + LEAD_S
        more, in_a_row = True, 0
        while ahead:
            request, body = ahead[0]
            wait_s = self.start_s + request.at_s - self.clock.monotonic_s()
            if wait_s <= 0:
                ahead.popleft()
                ahead_bytes -= len(body)
                self._start(request, body)
                if not ahead and (built := next(bodies, None)) is not None:
                    ahead.append(built)
                    ahead_bytes += len(built[1])
                in_a_row += 1
                if in_a_row % BURST == 0:  # streams go on, even when the plan is faster than this machine
                    await asyncio.sleep(0)
            elif more and wait_s > QUIET_S and len(ahead) < AHEAD_BODIES and ahead_bytes < AHEAD_BYTES:
                built = next(bodies, None)
                more = built is not None
                if built is not None:
                    ahead.append(built)
                    ahead_bytes += len(built[1])
                await asyncio.sleep(0)  # streams go on
            else:
                await asyncio.sleep(wait_s - FINE_S if wait_s > FINE_S else 0)
        if self.under_way:
            await asyncio.wait(self.under_way)
        if self.fault is not None:
            raise self.fault

    def _bodies(self, requests: Iterable[PlannedRequest]) -> Iterator[tuple[PlannedRequest, bytes]]:
        return ((request, self.builder.build(request)) for request in requests)

    def _start(self, request: PlannedRequest, body: bytes) -> None:
        if len(self.under_way) >= self.settings.max_outstanding:
            self._take(
                RequestResult(
                    index=request.index,
                    intended_s=request.at_s,
                    verdict=Verdict.UNSENT,
                    prompt_tokens_asked=request.prompt_tokens,
                    output_tokens_asked=request.output_tokens,
                    error=f"{self.settings.max_outstanding} requests were under way (max_outstanding)",
                )
            )
            return
        task = asyncio.get_running_loop().create_task(self._send(request, body, request.at_s))
        self.under_way.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.under_way.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self.fault = fault

    async def _send(self, request: PlannedRequest, body: bytes, intended_s: float) -> None:
        self._take(await self.client.send(request, body, self.start_s, intended_s))

    def _take(self, row: RequestResult) -> None:
        self.rows.append(row)
        self.bad += row.verdict != Verdict.COMPLETE

    async def _closed_loop(self) -> None:
        """Each of so many users sends the next request as soon as his last one is answered."""
        rounds = repeat(self.plan) if self.settings.duration_s is not None else (self.plan,)
        numbered = enumerate(chain.from_iterable(rounds))
        requests = (replace(request, index=index) for index, request in numbered)
        self.start_s = self.clock.monotonic_s()
        end_s = None if self.settings.duration_s is None else self.start_s + self.settings.duration_s

        async def user() -> None:
            for request in requests:
                now_s = self.clock.monotonic_s()
                if self.ending or (end_s is not None and now_s >= end_s):
                    return
                body = self.builder.build(request)
                await self._send(request, body, self.clock.monotonic_s() - self.start_s)

        loop = asyncio.get_running_loop()
        for _ in range(self.settings.concurrency or 1):
            self.under_way.add(loop.create_task(user()))
        done, _ = await asyncio.wait(self.under_way)
        for task in done:
            task.result()
