"""Points on a simulated deployment: exact, bit-reproducible, in virtual time.

The simulator plays requests at given times; users of a closed loop wait for answers instead. Both agree where
the queue is never empty and served first come first served: then which request is next is known beforehand,
and only *when its user sent it* has to be worked out afterwards. So a closed loop of C users is played as a
queue that is always full under a cap of at most C, and request k counts from when the user before it was
answered (:func:`rlgov.characterize.measure.closed_loop_sent_s`). A TTFT of a closed loop is therefore that
of a client that asks again at once: the wait for the iteration under way and for prompts before it, and for
a free place only where C lies above the cap.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.characterize.measure import Evidence, Place, Requests, closed_loop_sent_s
from rlgov.characterize.workloads import closed_requests, open_requests
from rlgov.records import Window
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.physics import build_tables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rlgov.characterize.plan import Point, Task
    from rlgov.characterize.workloads import Lengths
    from rlgov.records import Limits
    from rlgov.simulation.profile import Profile
    from rlgov.simulation.tables import PhysicsTables
    from rlgov.workload.trace import Trace

_FIRST_ROUNDS: Final = 4  # requests a user to begin with; doubled whenever they run out


class SimulatedBench:
    """A profile as a deployment to characterise. Energy is of the serving engine's GPUs alone.

    Args:
        profile: GPU, model and engine.
        workloads: Lengths by name.
        seed: Of the campaign.
        limits: What may be asked for; the profile's if not given.
    """

    clocks_present = True
    notes: tuple[str, ...] = (
        "simulated: latencies of a closed loop are those of clients that ask again at once",
    )

    def __init__(
        self, profile: Profile, workloads: Mapping[str, Lengths], seed: int, limits: Limits | None = None
    ) -> None:
        self._profile = profile
        self._workloads = workloads
        self._seed = seed
        self._limits = profile.limits() if limits is None else limits
        self._tables = build_tables(profile)
        self._batches: dict[int, tuple[Limits, SimulationBatch]] = {}
        self.place = Place("simulated", profile.model.name, profile.gpu.name, measured_clock=True)

    @property
    def limits(self) -> Limits:
        """The profile's."""
        return self._limits

    @property
    def identity(self) -> dict[str, object]:
        """The profile and the limits."""
        text = self._profile.to_yaml()
        return {
            "profile_digest": hashlib.sha256(text.encode()).hexdigest()[:16],
            "limits": asdict(self._limits),
        }

    @property
    def versions(self) -> dict[str, str]:
        """Nothing else serves."""
        return {}

    def most_tokens(self, tp_degree: int) -> int:
        """What the KV cache holds."""
        return self._limits.kv_capacity_tokens[self._limits.tp_degrees.index(tp_degree)]

    def hold(self, task: Task, longest_s: float) -> SimulatedHold:
        """Begin a point at time 0, empty."""
        point = task.point
        lengths = self._workloads[point.workload]
        tp_index = self._limits.tp_degrees.index(point.tp_degree)
        cap = point.batch_cap if point.concurrency is None else min(point.batch_cap, point.concurrency)
        limits, batch = self._batch(cap)
        tables = replace(self._tables, allotted_gpus=point.tp_degree)
        clock_mhz = self._limits.sm_clocks_mhz[0] if point.sm_clock_mhz is None else point.sm_clock_mhz
        index = (limits.sm_clocks_mhz.index(clock_mhz), 0, tp_index)
        return SimulatedHold(batch, limits, tables, index, point, lengths, task.seed(self._seed), longest_s)

    def rest(self, duration_s: float) -> None:
        """Nothing heats up here."""

    def close(self) -> None:
        """Nothing to give back."""

    def _batch(self, cap: int) -> tuple[Limits, SimulationBatch]:
        if cap not in self._batches:
            limits = replace(self._limits, batch_caps=(cap,))
            self._batches[cap] = (limits, SimulationBatch(limits, 1, self._tables))
        return self._batches[cap]


class SimulatedHold:
    """One point while it is simulated."""

    def __init__(
        self,
        batch: SimulationBatch,
        limits: Limits,
        tables: PhysicsTables,
        index: tuple[int, int, int],
        point: Point,
        lengths: Lengths,
        seed: list[int],
        longest_s: float,
    ) -> None:
        self._batch = batch
        self._limits = limits
        self._tables = tables
        self._index = index
        self._point = point
        self._lengths = lengths
        self._seed = seed
        self._longest_s = longest_s
        self._windows: list[Window] = []
        self._rounds = _FIRST_ROUNDS
        self._load()

    def advance(self) -> Window:
        """The next window."""
        window = Window.from_row(self._batch.advance_only(0, self._index))
        users = self._point.concurrency
        if users is not None:
            while window.waiting < 1:  # the queue has run out: play it again with a longer one
                self._rounds *= 2
                self._load()
                for _ in range(len(self._windows) + 1):
                    window = Window.from_row(self._batch.advance_only(0, self._index))
            # What waits is a queue of ours. Of the users those wait that are not running, and each asks again
            # when answered.
            waiting = max(users - window.running, 0.0)
            window = replace(window, waiting=waiting, arrivals=window.served)
        self._windows.append(window)
        return window

    def evidence(self, begin_s: float, end_s: float) -> Evidence:
        """What became of the requests, and, in a second pass, every iteration of the span."""
        log = self._batch.request_log(0)
        users = self._point.concurrency
        sent_s = log.arrival_s if users is None else closed_loop_sent_s(log.finish_s, users)
        requests = Requests(
            sent_s,
            log.first_token_s,
            log.finish_s,
            log.prompt_tokens.astype(np.float64),
            log.output_tokens.astype(np.float64),
            log.refused,
        )
        held = [window for window in self._windows if begin_s <= window.start_s < end_s]
        self._load()
        self._batch.play_until(0, self._index, begin_s)
        return Evidence(
            requests=requests,
            iterations=self._batch.play_iterations(0, self._index, end_s),
            energy_j=sum(window.energy_j or 0.0 for window in held),
            energy_error=0.0,
            measured_gpus=self._point.tp_degree,
            throttle_reasons=frozenset({"power"} if any(w.throttled_fraction for w in held) else ()),
        )

    def close(self) -> None:
        """Nothing runs."""

    def _load(self) -> None:
        self._batch.load(0, self._requests(), self._tables, self._limits.service_level, self._index)

    def _requests(self) -> Trace:
        users, rate = self._point.concurrency, self._point.rate_per_s
        if users is not None:
            return closed_requests(self._lengths, users, self._rounds * users + 1, self._seed)
        return open_requests(self._lengths, rate or 0.0, self._longest_s, self._seed)
