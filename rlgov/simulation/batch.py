"""N simulated deployments stepped in one compiled call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlgov.errors import ConfigError
from rlgov.records import WINDOW_FIELDS, Column
from rlgov.simulation import kernel, layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.records import Limits, ServiceLevel
    from rlgov.simulation.tables import PhysicsTables
    from rlgov.workload.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class RequestLog:
    """What became of each request of a run, arrays of shape (n,) in order of arrival.

    ``first_token_s`` and ``finish_s`` are NaN where that never happened. ``missed`` holds the verdicts
    reached so far; a request that is still without one at the end is for the reader to judge.
    """

    arrival_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    missed: NDArray[np.bool_]
    refused: NDArray[np.bool_]

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """Time to first token, NaN where there was none."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> NDArray[np.float64]:
        """Mean time per output token after the first; NaN for unfinished or one-token requests."""
        gaps = np.where(self.output_tokens > 1, self.output_tokens - 1, np.nan)
        return (self.finish_s - self.first_token_s) / gaps


class SimulationBatch:
    """N independent simulations over one action table.

    Axis indices are those of ``limits``: (clock, cap, TP), 0 fastest. Each simulation has its own
    physics, trace and SLO, given with :meth:`load`.
    """

    def __init__(self, limits: Limits, n: int, tables: PhysicsTables, *, capacity: int = 1024) -> None:
        self.limits = limits
        self.n = n
        self._capacity = capacity
        self._interval_ps = round(limits.interval_s * layout.PS_PER_S)
        grid = tables.grid_clocks_mhz
        clocks = np.array(limits.sm_clocks_mhz, dtype=np.int64)
        self._grid_index = np.searchsorted(grid, clocks)
        if not np.array_equal(grid[np.minimum(self._grid_index, grid.size - 1)], clocks):
            msg = f"clocks {limits.sm_clocks_mhz} MHz are not all among the card's supported clocks"
            raise ConfigError(msg)
        if tuple(tables.tp_degrees.tolist()) != limits.tp_degrees:
            degrees = tables.tp_degrees.tolist()
            msg = f"the physics is of TP degrees {degrees}, the limits say {limits.tp_degrees}"
            raise ConfigError(msg)
        covered = tables.decode_memory_s.shape[1] - 1
        if limits.batch_caps[0] > covered:
            msg = f"the physics covers batches up to {covered}, the cap is {limits.batch_caps[0]}"
            raise ConfigError(msg)
        if limits.batch_caps[0] > tables.max_num_batched_tokens:
            msg = "the batch cap must not exceed max_num_batched_tokens"
            raise ConfigError(msg)
        self._caps = np.array(limits.batch_caps, dtype=np.int64)
        self._batch = layout.allocate_batch(n, capacity, limits.batch_caps[0])
        self._physics = layout.allocate_physics(n, tables)
        self._rows = np.zeros((n, len(WINDOW_FIELDS)))
        self._lengths = np.zeros(n, dtype=np.int64)

    def load(
        self,
        i: int,
        trace: Trace,
        tables: PhysicsTables,
        service_level: ServiceLevel,
        start: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """Begin simulation ``i`` anew at axis indices ``start``, empty, at time 0."""
        count = len(trace)
        if count > self._capacity:
            self._grow(max(count, 2 * self._capacity))
        requests = self._batch.requests[i]
        requests[:count, layout.R_ARRIVAL] = np.floor(trace.arrival_s * layout.PS_PER_S + 0.5)
        requests[:count, layout.R_PROMPT] = trace.prompt_tokens
        requests[:count, layout.R_OUTPUT] = trace.output_tokens
        requests[:count, layout.R_HIT] = trace.prefix_hit_tokens
        self._lengths[i] = count
        layout.store_physics(self._physics, i, tables)
        layout.store_constants(self._batch, i, tables)
        clock, cap, tp = start
        kernel.reset_one(
            self._batch,
            self._physics,
            i,
            count,
            self._grid_index[clock],
            self._caps[cap],
            tp,
            round(service_level.ttft_s * layout.PS_PER_S),
            round(service_level.tpot_s * layout.PS_PER_S),
        )

    def _grow(self, capacity: int) -> None:
        grown = layout.allocate_requests(self.n, capacity)
        grown[:, : self._capacity] = self._batch.requests
        self._batch = self._batch._replace(requests=grown)
        self._capacity = capacity

    def advance(self, index: NDArray[np.int64], *, jump: bool = True) -> NDArray[np.float64]:
        """Hold axis indices ``index`` of shape (N, 3) for one interval.

        Returns the N window rows (:class:`rlgov.records.Column`); the array is overwritten by the next
        call. ``jump=False`` runs every iteration by itself, for benchmarks and tests.
        """
        kernel.advance_all(
            self._batch,
            self._physics,
            self._grid_index[index[:, 0]],
            self._caps[index[:, 1]],
            np.ascontiguousarray(index[:, 2]),
            self._interval_ps,
            self._rows,
            jump,
        )
        return self._rows

    def advance_only(self, i: int, index: tuple[int, int, int], *, jump: bool = True) -> NDArray[np.float64]:
        """:meth:`advance` for simulation ``i`` alone; returns its row."""
        row: NDArray[np.float64] = self._rows[i]
        kernel.advance_one(
            self._batch,
            self._physics,
            i,
            self._grid_index[index[0]],
            self._caps[index[1]],
            index[2],
            self._interval_ps,
            row,
            jump,
        )
        return row

    def advance_windows(self, i: int, index: NDArray[np.int64], *, jump: bool = True) -> NDArray[np.float64]:
        """Play simulation ``i`` alone through ``index`` of shape (W, 3), one setting a window.

        Returns the rows of shape (W, columns): a whole trace in one compiled call.
        """
        rows = np.zeros((index.shape[0], self._rows.shape[1]))
        kernel.advance_windows(
            self._batch,
            self._physics,
            i,
            self._grid_index[index[:, 0]],
            self._caps[index[:, 1]],
            np.ascontiguousarray(index[:, 2]),
            self._interval_ps,
            rows,
            jump,
        )
        return rows

    def play_iterations(self, i: int, index: tuple[int, int, int], until_s: float) -> NDArray[np.float64]:
        """Play simulation ``i`` alone up to ``until_s``, one iteration after another.

        Holds one setting, with no TP switch in progress. Slower than windows, and ends in the same state.

        Returns:
            Rows of shape (iterations, 8): end of the iteration, its duration, requests running in it and
            waiting behind it, prompt tokens and decode tokens computed, tokens attended to by what decodes,
            and the share of KV blocks in use at its end. As the plugin tells them of a real engine.
        """
        until_ps = round(until_s * layout.PS_PER_S)
        rows: list[tuple[float, ...]] = []
        while (now_ps := int(self._batch.ints[i, layout.S_NOW])) < until_ps:
            engine = self._batch.engines[i, self._batch.ints[i, layout.S_ACTIVE]]
            if engine[layout.E_FLYING]:
                begin_ps = int(engine[layout.E_FLY_END] - engine[layout.E_FLY_FULL])
            else:
                begin_ps = now_ps
                self._play_ps(i, index, 1)  # forms the next iteration, if there is one
                if not engine[layout.E_FLYING]:
                    self._play_ps(i, index, min(self._next_arrival_ps(i), until_ps) - now_ps - 1)
                    continue
            end_ps = int(engine[layout.E_FLY_END])
            prefill, decodes = int(engine[layout.E_FLY_TOKENS]), int(engine[layout.E_FLY_DECODES])
            context, running = int(engine[layout.E_FLY_CONTEXT]), int(engine[layout.E_RUNNING])
            waiting = self._rows[i, Column.WAITING]
            now_ps = int(self._batch.ints[i, layout.S_NOW])
            row = self._play_ps(i, index, min(end_ps, until_ps) - now_ps)
            if end_ps <= until_ps:
                kv_usage = float(row[Column.KV_USAGE])
                rows.append(
                    (
                        end_ps / layout.PS_PER_S,
                        (end_ps - begin_ps) / layout.PS_PER_S,
                        float(running),
                        float(waiting),
                        float(prefill),
                        float(decodes),
                        float(context),
                        kv_usage,
                    )
                )
        return np.array(rows, dtype=np.float64).reshape(len(rows), 8)

    def play_until(self, i: int, index: tuple[int, int, int], until_s: float) -> None:
        """Hold one setting up to ``until_s``, as one window of whatever length."""
        clock, cap = self._grid_index[index[0]], self._caps[index[1]]
        left_ps = round(until_s * layout.PS_PER_S) - int(self._batch.ints[i, layout.S_NOW])
        if left_ps > 0:
            kernel.advance_one(
                self._batch, self._physics, i, clock, cap, index[2], left_ps, self._rows[i], True  # noqa: FBT003  # compiled: no keywords
            )  # fmt: skip

    def _play_ps(self, i: int, index: tuple[int, int, int], duration_ps: int) -> NDArray[np.float64]:
        row: NDArray[np.float64] = self._rows[i]
        if duration_ps > 0:
            clock, cap = self._grid_index[index[0]], self._caps[index[1]]
            kernel.advance_one(
                self._batch, self._physics, i, clock, cap, index[2], duration_ps, row, False  # noqa: FBT003  # compiled: no keywords
            )  # fmt: skip
        return row

    def _next_arrival_ps(self, i: int) -> int:
        engine = self._batch.engines[i, self._batch.ints[i, layout.S_ACTIVE]]
        at = int(engine[layout.E_NEXT])
        known = at < min(int(engine[layout.E_END]), int(self._lengths[i]))
        return int(self._batch.requests[i, at, layout.R_ARRIVAL]) if known else int(layout.NEVER)

    @property
    def now_s(self) -> NDArray[np.float64]:
        """Time of each simulation, shape (N,)."""
        return self._batch.ints[:, layout.S_NOW] / layout.PS_PER_S

    @property
    def unfinished(self) -> NDArray[np.int64]:
        """Requests, arrived or to come, that are not served or refused yet, shape (N,)."""
        ints = self._batch.ints
        return self._lengths - ints[:, layout.S_SERVED] - ints[:, layout.S_REJECTED]

    @property
    def iterations(self) -> NDArray[np.int64]:
        """Iterations completed since the start, shape (N,)."""
        return self._batch.ints[:, layout.S_ITERATIONS].copy()

    @property
    def tp_switches(self) -> NDArray[np.int64]:
        """TP switches begun since the start, shape (N,)."""
        return self._batch.ints[:, layout.S_SWITCHES].copy()

    def times_ps(self, i: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Exact first-token and finish times of simulation ``i``, -1 where there is none."""
        n = int(self._lengths[i])
        requests = self._batch.requests[i, :n]
        return requests[:, layout.R_FIRST].copy(), requests[:, layout.R_FINISH].copy()

    def request_log(self, i: int) -> RequestLog:
        """What became of each request of simulation ``i`` so far."""
        requests = self._batch.requests[i, : int(self._lengths[i])]

        def seconds(column: int) -> NDArray[np.float64]:
            ps = requests[:, column]
            return np.where(ps < 0, np.nan, ps / layout.PS_PER_S)

        return RequestLog(
            seconds(layout.R_ARRIVAL),
            seconds(layout.R_FIRST),
            seconds(layout.R_FINISH),
            requests[:, layout.R_PROMPT].copy(),
            requests[:, layout.R_OUTPUT].copy(),
            requests[:, layout.R_MISSED].astype(np.bool_),
            requests[:, layout.R_STATE] == layout.REJECTED,
        )
