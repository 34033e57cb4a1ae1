"""Points on a live deployment: ``rlgov serve`` with its control socket, or a vLLM that somebody else started.

The deployment is held as in governing: clocks locked and verified, the cap under a lease, a TP switch waited
for, everything given back at the end. The load comes from ``rlgov load``, a process of its own, which stamps
every request with the clock that all processes of a machine share.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.characterize.measure import Evidence, Place, Requests
from rlgov.characterize.workloads import closed_requests, open_requests
from rlgov.deployments.load_process import LoadProcess
from rlgov.errors import CharacterizationError
from rlgov.hardware.meter import ENERGY_RESOLUTION_S
from rlgov.records import Configuration
from rlgov.workload.load_result import Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from rlgov.characterize.iterations import IterationSource
    from rlgov.characterize.meter_log import LoggedGpus
    from rlgov.characterize.plan import Point, Task
    from rlgov.characterize.workloads import Lengths
    from rlgov.clock import Clock
    from rlgov.deployments.live import LiveDeployment
    from rlgov.records import Limits, Window

LOAD_FOLDER: Final = "load"
_FIRST_REQUEST_S: Final = 60.0  # a process is started for every point, on a machine that may be loaded
_SETTLE_S: Final = 30.0  # for a cap to be in force
_LEAST_CLOSED: Final = 1000  # requests of a closed loop, which goes round
_ROUNDS: Final = 20
_TOLD_ERRORS: Final = 2


class LiveBench:
    """A live deployment to characterise.

    Args:
        deployment: It, not started yet; taken over.
        gpus: Its GPUs, whose readings are kept.
        iterations: Where the engine tells its iterations, if it does.
        url: Where the load goes.
        out: Folder for what the load generator writes, one sub-folder a repetition of a point.
        workloads: Lengths by name.
        seed: Of the campaign.
        clock: The deployment's.
        place: What goes into every row.
        versions: Of the engine; another one is another campaign.
        most_tokens: That a request may have, None if the server does not tell.
        load_arguments: More flags of ``rlgov load``.
        switch_timeout_s: Longest wait for a TP switch.
    """

    def __init__(  # noqa: PLR0913  # the parts of a deployment, each replaceable by a stand-in
        self,
        deployment: LiveDeployment,
        gpus: LoggedGpus,
        iterations: IterationSource,
        *,
        url: str,
        out: Path,
        workloads: Mapping[str, Lengths],
        seed: int,
        clock: Clock,
        place: Place,
        load_arguments: tuple[str, ...] = (),
        versions: Mapping[str, str] | None = None,
        most_tokens: int | None = None,
        switch_timeout_s: float = 900.0,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.place = place
        self.versions = dict(versions or {})
        self._most_tokens = most_tokens
        self._notes = notes
        self._deployment = deployment
        self._gpus = gpus
        self._iterations = iterations
        self._url = url
        self._out = out
        self._workloads = workloads
        self._seed = seed
        self._clock = clock
        self._load_arguments = load_arguments
        self._switch_timeout_s = switch_timeout_s
        self._last: Window | None = None  # None: not started

    @property
    def limits(self) -> Limits:
        """What the deployment offers."""
        return self._deployment.limits

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know, with what went wrong last while iterations were read."""
        problem = self._iterations.problem
        return (*self._notes, f"no iterations: {problem}") if problem else self._notes

    @property
    def clocks_present(self) -> bool:
        """Whether the SM clock can be set here."""
        return self._gpus.clocks.present

    @property
    def identity(self) -> dict[str, object]:
        """Model, axes and engine, without what each start measures anew (KV capacity, switch times)."""
        limits = asdict(self.limits)
        for name in ("kv_capacity_tokens", "switch_s"):
            del limits[name]
        return {"model": self.place.model, "gpu": self.place.gpu, "limits": limits, **self.versions}

    def most_tokens(self, tp_degree: int) -> int | None:  # noqa: ARG002  # vLLM's limit is the same at each
        """The model's longest sequence, as the server tells it."""
        return self._most_tokens

    def hold(self, task: Task, longest_s: float) -> LiveHold:
        """Bring the deployment to a point, then start the load.

        Raises:
            CharacterizationError: It does not get there.
        """
        point = task.point
        asked = Configuration(
            self.limits.sm_clocks_mhz[0] if point.sm_clock_mhz is None else point.sm_clock_mhz,
            point.batch_cap,
            point.tp_degree,
        )
        self._reach(asked, point)
        seed = task.seed(self._seed)
        lengths = self._workloads[point.workload]
        flags = list(self._load_arguments)
        if point.concurrency is not None:
            n = max(_LEAST_CLOSED, _ROUNDS * point.concurrency)
            trace = closed_requests(lengths, point.concurrency, n, seed)
            flags += ["--concurrency", str(point.concurrency), "--duration-s", str(longest_s)]
        else:
            trace = open_requests(lengths, point.rate_per_s or 0.0, longest_s, seed)
        folder = self._out / f"{point.point_id}-{task.repeat}"
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that did not end
        load = LoadProcess(self._url, trace, folder, arguments=flags)
        load.start(seed[-1] % 2**32)
        return LiveHold(self, load, folder, asked, point)

    def rest(self, duration_s: float) -> None:
        """Hold the last configuration without load."""
        until_s = self._clock.monotonic_s() + duration_s
        while self._last is not None and self._clock.monotonic_s() < until_s:
            self.step(self._last.configuration)

    def close(self) -> None:
        """Give clocks and cap back."""
        try:
            self._deployment.close()
        finally:
            self._iterations.close()

    # ------------------------------------------------------------------ for a point that is held

    def step(self, asked: Configuration) -> Window:
        """One interval."""
        if self._last is None:
            self._last = self._deployment.start(self._seed)
        self._last = self._deployment.advance(asked)
        return self._last

    @property
    def gpus(self) -> LoggedGpus:
        """The GPUs and their readings."""
        return self._gpus

    @property
    def iterations(self) -> IterationSource:
        """The iterations of the serving engine."""
        return self._iterations

    @property
    def clock(self) -> Clock:
        """The deployment's."""
        return self._clock

    @property
    def end_s(self) -> float:
        """Of the last window, on the monotonic clock."""
        return self._deployment.end_s

    @property
    def last_problem(self) -> str:
        """What the deployment said last about what went wrong."""
        return self._deployment.status.last_problem

    def _reach(self, asked: Configuration, point: Point) -> None:
        begin_s = self._clock.monotonic_s()
        refused = self._deployment.status.tp_refused
        if asked.tp_degree in refused:
            msg = f"{point.label}: {refused[asked.tp_degree]}; leave this TP degree out with --tp"
            raise CharacterizationError(msg)
        while True:
            window = self.step(asked)
            waited_s = self._clock.monotonic_s() - begin_s
            there = window.tp_degree == asked.tp_degree and not window.switching and not window.blind
            if there and window.batch_cap == asked.batch_cap:
                return
            if waited_s > (_SETTLE_S if there else self._switch_timeout_s):
                msg = (
                    f"{point.label}: cap {window.batch_cap:g} at TP {window.tp_degree:g} is in force after "
                    f"{waited_s:.0f} s ({self.last_problem or 'no problem was told'}); correct that and run "
                    "the same command again, it goes on from here"
                )
                raise CharacterizationError(msg)


class LiveHold:
    """One point while it is held."""

    def __init__(
        self, bench: LiveBench, load: LoadProcess, folder: Path, asked: Configuration, point: Point
    ) -> None:
        self._bench = bench
        self._load = load
        self._folder = folder
        self._asked = asked
        self._point = point
        self._begun = False
        self._axis_s = 0.0  # the windows' time 0 on the monotonic clock
        bench.iterations.skip()

    def advance(self) -> Window:
        """The next window; waits for the first request.

        Raises:
            CharacterizationError: No request comes, or another configuration came into force.
            DeploymentError: The load generator failed.
        """
        window = self._step()
        if not self._begun:
            until_s = self._bench.clock.monotonic_s() + _FIRST_REQUEST_S
            while window.blind or not (window.running_mean or window.running or window.served):
                if self._bench.clock.monotonic_s() > until_s:
                    raise self._nothing_ran()
                window = self._step()
            self._begun = True
        if not window.blind and (window.batch_cap, window.tp_degree) != (
            self._asked.batch_cap, self._asked.tp_degree
        ):  # fmt: skip
            msg = (
                f"{self._point.label}: while it was measured, cap {window.batch_cap:g} at TP "
                f"{window.tp_degree:g} came into force "
                f"({self._bench.last_problem or 'somebody else moved it'}); "
                "run the same command again, it goes on from here"
            )
            raise CharacterizationError(msg)
        return window

    def evidence(self, begin_s: float, end_s: float) -> Evidence:
        """End the load, and read what it and the GPUs told."""
        self._bench.iterations.fetch()
        told = self._bench.iterations.take(self._axis_s)
        self._load.stop()
        span = (self._axis_s + begin_s, self._axis_s + end_s)
        metered = self._bench.gpus.between(*span, self._bench.iterations.gpu_uuids)
        requests, errors = read_requests(self._folder / "episode-0", self._axis_s)
        return Evidence(
            requests=requests,
            iterations=None if told is None else told.rows,
            energy_j=metered.energy_j,
            energy_error=None if metered.energy_j is None else ENERGY_RESOLUTION_S / (end_s - begin_s),
            measured_gpus=metered.gpus or self._point.tp_degree,
            throttle_reasons=metered.throttle_reasons,
            iterations_dropped=0 if told is None else told.dropped,
            errors=errors,
        )

    def close(self) -> None:
        """End the load; safe to call twice."""
        self._load.stop()

    def _nothing_ran(self) -> CharacterizationError:
        self._load.stop()
        errors: tuple[str, ...] = ()
        with suppress(CharacterizationError):  # it may have had no time to write anything
            _, errors = read_requests(self._folder / "episode-0", self._axis_s)
        why = "; ".join(errors) or self._bench.last_problem or "no reason was told"
        return CharacterizationError(
            f"{self._point.label}: no request ran within {_FIRST_REQUEST_S:g} s ({why}); see what the load "
            f"generator says in {self._folder}, correct that, and run the same command again, it goes on "
            "from here"
        )

    def _step(self) -> Window:
        window = self._bench.step(self._asked)
        self._axis_s = self._bench.end_s - (window.start_s + window.duration_s)
        self._bench.iterations.fetch()
        if self._load.finished:
            msg = (
                f"{self._point.label}: the load ended before the point was measured; see {self._folder}, and "
                "run the same command again, it goes on from here"
            )
            raise CharacterizationError(msg)
        return window


def read_requests(folder: Path, axis_s: float) -> tuple[Requests, tuple[str, ...]]:
    """What ``rlgov load`` wrote of its requests, on the windows' axis, and their most frequent errors.

    Requests that were under way when the load was ended count as not finished.

    Raises:
        CharacterizationError: It wrote nothing that can be read.
    """
    try:
        started_s = float(json.loads((folder / "load.json").read_text(encoding="utf-8"))["started_s"])
        with (folder / "requests.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, KeyError) as error:
        msg = f"{folder}: the load generator left no usable result ({error}); see its log there"
        raise CharacterizationError(msg) from error

    def column(name: str, *, at: float = 0.0) -> NDArray[np.float64]:
        return np.array([float(row[name]) + at if row[name] else np.nan for row in rows], dtype=np.float64)

    verdicts = [Verdict(row["verdict"]) for row in rows]
    complete = np.array([verdict is Verdict.COMPLETE for verdict in verdicts], dtype=np.bool_)
    cancelled = np.array([verdict is Verdict.CANCELLED for verdict in verdicts], dtype=np.bool_)
    offset_s = started_s - axis_s
    sent_s = column("intended_s", at=offset_s)
    finish_s = column("finished_s", at=offset_s)
    failed = ~complete & ~cancelled
    # What failed without an answer ended when it was sent, for want of a better time.
    finish_s = np.where(failed & np.isnan(finish_s), sent_s, finish_s)
    requests = Requests(
        sent_s,
        column("first_token_s", at=offset_s),
        np.where(cancelled, math.nan, finish_s),
        column("prompt_tokens"),
        column("output_tokens"),
        failed,
    )
    errors = Counter(row["error"] for row in rows if row["error"])
    return requests, tuple(error for error, _ in errors.most_common(_TOLD_ERRORS))
