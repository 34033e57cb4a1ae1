"""What was measured, as it is kept in ``measured.json``: enough to fit and to compare again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from rlgov.workload.trace import Trace
from tests.fidelity.compare import Latencies
from tests.fidelity.iterations import Iterations, read_iterations
from tests.fidelity.plan import Plan


@dataclass(frozen=True, slots=True)
class Request:
    """Times on the machine's monotonic clock."""

    intended_s: float
    first_token_s: float
    finished_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What spoke against a run."""

    others: float  # cores that other programs kept busy, mean
    control: float  # lone decode before and after it over that of the calibration; NaN where not taken
    late_s: float  # 99th percentile of how late the client sent

    def reasons(self) -> list[str]:
        """Why the run should not count; empty if it should."""
        found = []
        if self.others > MOST_OTHERS:
            found.append(f"other programs used {self.others:.2f} cores")
        if abs(self.control - 1.0) > MOST_DRIFT:
            found.append(f"a lone decode took {self.control - 1.0:+.0%}")
        if self.late_s > MOST_LATE_S:
            found.append(f"requests were sent up to {1e3 * self.late_s:.0f} ms late")
        return found


MOST_OTHERS = 0.10
MOST_DRIFT = 0.05
MOST_LATE_S = 0.010


@dataclass(frozen=True, slots=True)
class HoldRun:
    """A closed loop of the calibration. ``rows`` are the engine's iterations, as in the ring."""

    concurrency: int
    rows: list[tuple[float, ...]]
    requests: list[Request]
    disturbance: Disturbance

    def iterations(self, plan: Plan) -> Iterations:
        """Its iterations."""
        rows = np.array(self.rows, dtype=np.float64)
        sent = sorted(self.requests, key=lambda request: request.intended_s)
        return read_iterations(rows, [r.prompt_tokens for r in sent], plan.max_num_batched_tokens)


@dataclass(frozen=True, slots=True)
class CellRun:
    """One repeat of one cell: a trace under a cap."""

    batch_cap: int
    load: float
    rate_per_s: float
    repeat: int
    requests: list[Request]
    busy_share: float
    running_peak: int
    disturbance: Disturbance

    def latencies(self) -> Latencies:
        """As the client saw them."""
        intended, first, finished = (
            np.array([getattr(r, name) for r in self.requests])
            for name in ("intended_s", "first_token_s", "finished_s")
        )
        tokens = np.array([r.output_tokens for r in self.requests], dtype=np.float64)
        return Latencies(
            ttft_s=first - intended,
            tpot_s=np.where(tokens > 1, finished - first, np.nan) / np.maximum(tokens - 1, 1),
            e2e_s=finished - intended,
        )

    def trace(self) -> Trace:
        """What was sent."""
        intended = np.array([r.intended_s for r in self.requests])
        return Trace(
            f"cap {self.batch_cap}, load {self.load:.0%}",
            intended - intended.min(),
            np.array([r.prompt_tokens for r in self.requests], dtype=np.int64),
            np.array([r.output_tokens for r in self.requests], dtype=np.int64),
            np.zeros(len(self.requests), dtype=np.int64),
            float(np.ptp(intended)),
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything a run of the command measured."""

    machine: dict[str, str]
    plan: Plan
    shape: dict[str, int]
    kv_capacity_tokens: int
    holds: list[HoldRun]
    cells: list[CellRun]

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_bytes(_ADAPTER.dump_json(self))

    @classmethod
    def read(cls, path: Path) -> Measured:
        """Read what :meth:`write` wrote."""
        return _ADAPTER.validate_json(path.read_bytes())


_ADAPTER = TypeAdapter(Measured)


def frontends(run: HoldRun, plan: Plan) -> NDArray[np.float64]:
    """Times outside the engine's loop of each request of a hold of one at a time, shape (n, 3).

    From due to scheduled; from the end of the first iteration to the first token; from the end of the last
    iteration to the end of the answer.
    """
    rows = np.array(run.rows, dtype=np.float64)
    end_s, begin_s = rows[:, 0], rows[:, 0] - rows[:, 1]
    found = []
    for request in run.requests:
        mine = np.flatnonzero((begin_s > request.intended_s) & (end_s < request.finished_s))
        if not len(mine) or request.prompt_tokens > plan.max_num_batched_tokens:
            continue
        first, last = mine[0], mine[-1]
        found.append(
            (
                begin_s[first] - request.intended_s,
                request.first_token_s - end_s[first],
                request.finished_s - end_s[last],
            )
        )
    return np.array(found).reshape(-1, 3)
