"""Lowest clock that meets the SLO (B5): EcoFreq of VoltanaLLM, its rules in their order.

Any waiting request takes the highest clock. Otherwise the recent batch size, context and prompt tokens
go through the calibrated latency tables, and the lowest clock whose predicted TPOT and TTFT stay within
the limits is taken. After five seconds without traffic the clock drops to the lowest.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from rlgov.agents.baselines.clock_rule import ClockRule, moving_average
from rlgov.agents.baselines.space import Choice, Family, Real, clock_index, clocks_dimension, fixed_dimensions
from rlgov.errors import ConfigError
from rlgov.records import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.agents.baselines.space import Dimension, Parameters, PolicyContext, Value
    from rlgov.records import Configuration, Limits
    from rlgov.simulation.tables import PhysicsTables

PREFILL_SHARE_MAX = 0.95  # keeps the predicted gap between tokens finite when prompts saturate the engine


@dataclass(frozen=True, slots=True)
class EcoFreqSettings:
    """``margin`` widens both limits (negative: keeps a reserve); 0.35 was the authors' demo."""

    margin: float = 0.0
    waiting_allowed: float = 0.0  # more waiting requests than this take the highest clock
    prompt_factor: float = 2.0  # prompt assumed next, over the recent mean: prompts are heavy-tailed
    weight: float = 0.3  # of the newest window in the moving averages of prompts
    min_clock_mhz: int = 0  # never below, idle time apart: the lowest clock need not be the cheapest
    batch_cap: int | None = None
    tp_degree: int | None = None
    guarded: bool = False
    idle_after_s: float | None = 5.0


class EcoFreqPolicy(ClockRule):
    """Predicts by the same tables the simulator runs on, so its model is as good as models get."""

    def __init__(self, settings: EcoFreqSettings, tables: PhysicsTables) -> None:
        super().__init__(
            "ecofreq",
            batch_cap=settings.batch_cap,
            tp_degree=settings.tp_degree,
            guarded=settings.guarded,
            idle_after_s=settings.idle_after_s,
        )
        self.settings = settings
        self._tables = tables
        self.time_scale = 1.0
        """Every predicted time is multiplied by this: what adaptation has found of the deployment."""
        self._grid: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._capacity_tokens: NDArray[np.float64] = np.zeros(0)
        self._slowest = 0
        self._prompt_tokens: NDArray[np.float64] = np.zeros(0)
        self._prefill_per_s: NDArray[np.float64] = np.zeros(0)

    def _begin(self, limits: Limits, n: int) -> None:
        tables = self._tables
        if tuple(tables.tp_degrees.tolist()) != limits.tp_degrees:
            degrees = tables.tp_degrees.tolist()
            msg = f"ecofreq: tables are for TP {degrees}, limits for {limits.tp_degrees}; use one profile"
            raise ConfigError(msg)
        grid = np.searchsorted(tables.grid_clocks_mhz, limits.sm_clocks_mhz)
        if grid.max() >= tables.grid_clocks_mhz.size or np.any(
            tables.grid_clocks_mhz[grid] != limits.sm_clocks_mhz
        ):
            msg = (
                f"ecofreq: clocks {limits.sm_clocks_mhz} MHz are not all on the tables' grid; use one profile"
            )
            raise ConfigError(msg)
        self._grid = grid.astype(np.int64)
        self._capacity_tokens = np.asarray(limits.kv_capacity_tokens, dtype=np.float64)
        self._slowest = clock_index(limits, self.settings.min_clock_mhz)
        self._prompt_tokens = np.full(n, np.nan)
        self._prefill_per_s = np.full(n, np.nan)

    def predict(
        self,
        rows: NDArray[np.float64],
        prompt_tokens: NDArray[np.float64],
        prefill_per_s: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Gap between tokens and TTFT of the next request, each (n, clocks) in seconds.

        Args:
            rows: window rows.
            prompt_tokens: (n,) length of the next prompt.
            prefill_per_s: (n,) rate at which prompt tokens are computed.
        """
        tables, grid = self._tables, self._grid
        degrees = np.asarray(self.limits.tp_degrees)
        at = np.clip(np.searchsorted(-degrees, -rows[:, Column.TP_DEGREE]), 0, degrees.size - 1)
        batch = np.clip(
            np.rint(np.nan_to_num(rows[:, Column.RUNNING_MEAN])), 0, tables.decode_memory_s.shape[1] - 1
        )
        batch = batch.astype(np.int64)
        context = np.nan_to_num(rows[:, Column.KV_USAGE]) * self._capacity_tokens[at]
        memory_scale, compute_scale = tables.memory_scale[grid], tables.compute_scale[grid]
        memory_s = tables.decode_memory_s[at, batch] + tables.kv_memory_s[at] * context
        compute_s = tables.decode_compute_s[at, batch] + tables.kv_compute_s[at] * context
        work_s = np.outer(memory_s, memory_scale) + np.outer(compute_s, compute_scale)
        decode_s = np.maximum(tables.host_s[at, None], work_s) + tables.decode_comm_s[at, batch, None]
        decode_s *= self.time_scale
        # a prompt of P tokens attends to about P^2 / 2 pairs, P / 2 a token
        token_compute_s = tables.prefill_compute_s[at] + tables.attention_compute_s[at] * prompt_tokens / 2
        token_s = (
            np.outer(tables.prefill_memory_s[at], memory_scale)
            + np.outer(token_compute_s, compute_scale)
            + tables.prefill_comm_s[at, None]
        ) * self.time_scale
        share = np.minimum(prefill_per_s[:, None] * token_s, PREFILL_SHARE_MAX)
        queue_tokens = np.nan_to_num(rows[:, Column.WAITING_TOKENS]) + prompt_tokens
        # the next request waits for the iteration in flight, then shares its own with the decodes
        ttft_s = (
            np.nan_to_num(rows[:, Column.OLDEST_WAIT_S])[:, None]
            + 2 * decode_s
            + queue_tokens[:, None] * token_s
        )
        return decode_s / (1 - share), ttft_s

    def _clock(self, rows: NDArray[np.float64], blind: NDArray[np.bool_]) -> NDArray[np.int64]:
        settings, level = self.settings, self.limits.service_level
        arrivals = rows[:, Column.ARRIVALS]
        # no arrival, no prompt length: NaN, which the average skips
        mean_prompt = np.where(arrivals >= 1, rows[:, Column.PROMPT_TOKENS] / np.maximum(arrivals, 1), np.nan)
        self._prompt_tokens = moving_average(self._prompt_tokens, mean_prompt, settings.weight, blind)
        rate = rows[:, Column.PREFILL_TOKENS] / rows[:, Column.DURATION_S]
        self._prefill_per_s = moving_average(self._prefill_per_s, rate, settings.weight, blind)
        itl_s, ttft_s = self.predict(
            rows,
            settings.prompt_factor * np.nan_to_num(self._prompt_tokens),
            np.nan_to_num(self._prefill_per_s),
        )
        allowed = 1 + settings.margin
        meets = (itl_s <= level.tpot_s * allowed) & (ttft_s <= level.ttft_s * allowed)
        lowest = meets.shape[1] - 1 - np.argmax(meets[:, ::-1], axis=1)
        clock = np.where(meets.any(axis=1), np.minimum(lowest, self._slowest), 0)
        return np.where(rows[:, Column.WAITING] > settings.waiting_allowed, 0, clock).astype(np.int64)


def _space(limits: Limits) -> tuple[Dimension, ...]:
    return (
        Real("margin", -0.7, 0.35),
        Choice("waiting_allowed", (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)),
        Real("prompt_factor", 0.5, 6.0, log_scale=True),
        Real("weight", 0.05, 1.0, log_scale=True),
        clocks_dimension("min_clock_mhz", limits),
        *fixed_dimensions(limits),
        Choice("idle_after_s", (None, 15.0, 5.0)),
    )


def _defaults(limits: Limits) -> dict[str, Value]:
    chosen = EcoFreqSettings(
        min_clock_mhz=limits.sm_clocks_mhz[-1], batch_cap=limits.batch_caps[0], tp_degree=limits.tp_degrees[0]
    )
    return {field.name: getattr(chosen, field.name) for field in fields(EcoFreqSettings)}


def _build(parameters: Parameters, context: PolicyContext) -> EcoFreqPolicy:
    if context.tables is None:
        msg = "ecofreq predicts latency by a profile's physics tables; give the context its tables"
        raise ConfigError(msg)
    chosen = FAMILY.complete(parameters, context.limits)
    return EcoFreqPolicy(EcoFreqSettings(**chosen), context.tables)  # type: ignore[arg-type]  # values come from the fields' own space


def _near_static(limits: Limits, configuration: Configuration) -> dict[str, Value]:
    return {
        **_defaults(limits),
        "min_clock_mhz": configuration.sm_clock_mhz,
        "batch_cap": configuration.batch_cap,
        "tp_degree": configuration.tp_degree,
    }


FAMILY = Family("ecofreq", _space, _defaults, _build, _near_static)
