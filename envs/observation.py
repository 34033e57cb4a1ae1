"""What a policy sees: a fixed table of features, the same in training, replay and service.

Everything is relative to the deployment's limits and to the SLO of the episode, so that one policy
serves several loads and several SLO scales. Bounds are fixed (there is no running normaliser to lose)
and every value is finite, whatever the window holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.errors import ConfigError
from rlgov.records import WINDOW_FIELDS, Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.records import Limits

OBSERVATION_SCHEMA: Final = 1
"""Raised whenever :data:`FEATURES` changes meaning, order or bounds; bundles carry it."""

AVERAGE_TAUS_S: Final = (4.0, 30.0, 240.0)
"""Time constants of the moving averages: fast, slow, very slow."""

MISS_TAUS_S: Final = (30.0, 240.0)
"""Time constants of the recent share of missed requests; each is one of AVERAGE_TAUS_S."""

TP_RECENCY_S: Final = 120.0
"""Half-way point of ``tp_recency``; the guard's default dwell time."""

LATENCY_RATIO_LIMIT: Final = 4.0
"""Latencies are shown up to this many times their limit."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One column of the observation. ``unit`` names the transform of the underlying quantity."""

    name: str
    unit: str
    low: float
    high: float
    meaning: str


@dataclass(frozen=True, slots=True)
class _Log:
    """``log1p(value / scale) - centre``, bounded above at ``log1p(ceiling / scale) - centre``.

    The scales and ceilings are absolute (no profile's capacity enters): a feature keeps its meaning
    when a policy moves to another deployment. The centre only brings usual values near zero.
    """

    name: str
    unit: str
    scale: float
    ceiling: float
    centre: float
    meaning: str

    @property
    def feature(self) -> Feature:
        high = math.log1p(self.ceiling / self.scale) - self.centre
        unit = f"log1p({self.unit} / {self.scale:g})" + (f" - {self.centre:g}" if self.centre else "")
        return Feature(self.name, unit, 0.0 - self.centre, round(high, 6), self.meaning)


_SPEEDS = tuple(zip(("fast", "slow", "very_slow"), AVERAGE_TAUS_S, strict=True))

# Columns in the order in which the encoder computes them: averages by (speed, quantity), then the
# other logarithmic ones, then ratios, then flags.
_AVERAGES: tuple[_Log, ...] = tuple(
    _Log(f"{name}_{speed}", f"{unit}/s", scale, ceiling, centre, f"{meaning}, averaged over {tau_s:g} s")
    for speed, tau_s in _SPEEDS
    for name, unit, scale, ceiling, centre, meaning in (
        ("arrivals", "requests", 0.1, 1e3, 3.0, "arriving requests"),
        ("prompt_tokens", "tokens", 100.0, 1e6, 4.0, "prompt tokens of arriving requests"),
        ("output_tokens", "tokens", 50.0, 1e6, 3.0, "generated tokens"),
    )
)
_MISSES: tuple[_Log, ...] = tuple(
    _Log(f"miss_share_{speed}", "share", 0.01, 1.0, 0.0, f"SLO misses per arrival over the last {tau_s:g} s")
    for speed, tau_s in zip(("slow", "very_slow"), MISS_TAUS_S, strict=True)
)
_COUNTS: tuple[_Log, ...] = (
    _Log("running", "requests", 1.0, 4096.0, 3.0, "running requests at the end of the window"),
    _Log("running_mean", "requests", 1.0, 4096.0, 3.0, "running requests, time average over the window"),
    _Log("waiting", "requests", 1.0, 4096.0, 0.0, "waiting requests"),
    _Log("waiting_tokens", "tokens", 500.0, 1e6, 0.0, "prompt tokens still to be computed"),
    _Log("overdue", "requests", 1.0, 4096.0, 0.0, "requests past their TTFT limit without a first token"),
    _Log("preemptions", "requests", 1.0, 4096.0, 0.0, "preemptions in the window"),
    _Log("batch_cap", "requests", 1.0, 4096.0, 4.0, "batch cap in force"),
)
_COUNT_COLUMNS = (
    Column.RUNNING,
    Column.RUNNING_MEAN,
    Column.WAITING,
    Column.WAITING_TOKENS,
    Column.OVERDUE,
    Column.PREEMPTIONS,
    Column.BATCH_CAP,
)
_OBJECTIVES: tuple[_Log, ...] = (
    _Log("ttft_limit", "s", 0.1, 60.0, 2.4, "the SLO: time to first token"),
    _Log("tpot_limit", "s", 0.01, 2.0, 2.1, "the SLO: time per output token"),
)
_LOGS = (*_AVERAGES, *_MISSES, *_COUNTS, *_OBJECTIVES)

_TTFT, _TPOT, _CAP, _CLOCK, _POWER, _ONE = range(6)  # what a ratio is divided by
# name, unit, column, divisor, upper bound, meaning
_RATIOS: tuple[tuple[str, str, Column, int, float, str], ...] = (
    (
        "oldest_wait",
        "1/TTFT limit",
        Column.OLDEST_WAIT_S,
        _TTFT,
        LATENCY_RATIO_LIMIT,
        "age of the oldest request without a first token",
    ),
    (
        "ttft_p50",
        "1/TTFT limit",
        Column.TTFT_P50_S,
        _TTFT,
        LATENCY_RATIO_LIMIT,
        "median TTFT of the window; 0 when none",
    ),
    (
        "ttft_p99",
        "1/TTFT limit",
        Column.TTFT_P99_S,
        _TTFT,
        LATENCY_RATIO_LIMIT,
        "p99 TTFT of the window; 0 when none",
    ),
    (
        "itl_mean",
        "1/TPOT limit",
        Column.ITL_MEAN_S,
        _TPOT,
        LATENCY_RATIO_LIMIT,
        "mean gap between tokens; 0 when none",
    ),
    (
        "tpot_p50",
        "1/TPOT limit",
        Column.TPOT_P50_S,
        _TPOT,
        LATENCY_RATIO_LIMIT,
        "median TPOT of finished requests; 0 when none",
    ),
    (
        "tpot_p99",
        "1/TPOT limit",
        Column.TPOT_P99_S,
        _TPOT,
        LATENCY_RATIO_LIMIT,
        "p99 TPOT of finished requests; 0 when none",
    ),
    ("cap_use", "1/batch cap", Column.RUNNING, _CAP, 2.0, "running requests over the batch cap in force"),
    ("clock", "1/highest clock", Column.SM_CLOCK_MHZ, _CLOCK, 1.0, "clock asked for"),
    (
        "measured_clock",
        "1/highest clock",
        Column.MEASURED_CLOCK_MHZ,
        _CLOCK,
        1.0,
        "clock measured, after throttling",
    ),
    ("power", "1/TDP of all GPUs", Column.ENERGY_J, _POWER, 1.5, "mean power of the window"),
    ("busy", "share", Column.BUSY_FRACTION, _ONE, 1.0, "share of the window in which the engine iterated"),
    ("kv_usage", "share", Column.KV_USAGE, _ONE, 1.0, "KV blocks in use"),
    ("throttled", "share", Column.THROTTLED_FRACTION, _ONE, 1.0, "share of the window below the asked clock"),
    ("switching", "flag", Column.SWITCHING, _ONE, 1.0, "1 while a TP switch is in progress"),
)
_TP_POSITIONS = (1, 2, 4, 8)
_NONE_FLAGS = (
    ("no_first_token", "1 when no first token fell in the window (TTFT unknown)"),
    ("no_finish", "1 when no request finished in the window (TPOT unknown)"),
    ("no_token_gap", "1 when no token was decoded in the window (token gap unknown)"),
)
_NONE_COLUMNS = (Column.TTFT_P99_S, Column.TPOT_P99_S, Column.ITL_MEAN_S)

FEATURES: Final[tuple[Feature, ...]] = (
    *(log.feature for log in _LOGS),
    *(Feature(name, unit, 0.0, high, meaning) for name, unit, _, _, high, meaning in _RATIOS),
    *(Feature(name, "flag", 0.0, 1.0, meaning) for name, meaning in _NONE_FLAGS),
    Feature(
        "tp_recency",
        f"t / (t + {TP_RECENCY_S:g} s)",
        0.0,
        1.0,
        "time since the last TP switch; 1 when there was none",
    ),
    Feature("tp_share", "1/allotted GPUs", 0.0, 1.0, "GPUs of the engine that takes new requests"),
    *(
        Feature(f"tp_is_{k}", "flag", 0.0, 1.0, f"1 when the TP degree in force is {k}")
        for k in _TP_POSITIONS
    ),
)
"""The observation table, in column order."""

LOW: Final = np.array([f.low for f in FEATURES], dtype=np.float32)
HIGH: Final = np.array([f.high for f in FEATURES], dtype=np.float32)
LOW.setflags(write=False)
HIGH.setflags(write=False)

# Columns gathered from a window row in one call, in feature order.
_RATE_COLUMNS = (Column.ARRIVALS, Column.PROMPT_TOKENS, Column.OUTPUT_TOKENS, Column.MISSES)
_RATE_CEILING_PER_S = 1e7  # keeps an absurd count from poisoning the averages for good
_GATHERED = np.array(
    [*_RATE_COLUMNS, *_COUNT_COLUMNS, *(column for _, _, column, _, _, _ in _RATIOS)], dtype=np.intp
)
_R, _C = len(_RATE_COLUMNS), len(_COUNT_COLUMNS)
_A, _M = len(_AVERAGES), len(_MISSES)
_AVERAGED = len(_AVERAGES) // len(AVERAGE_TAUS_S)
_L = len(_LOGS)
_Q = len(_RATIOS)
_MIN_DURATION_S = 1e-6
_ABSURD = 1e15  # infinities come down to this before they can meet each other


class ObservationEncoder:
    """Turns ``n`` window rows into ``n`` observations; keeps the moving averages of each.

    A blind row, or one without energy, carries nothing that may be used: its averages stay as they are and
    the last observation of that row is repeated (zeros within bounds before the first one).

    Args:
        limits: What the deployment allows; normalises clock, power and TP.
        n: Number of deployments encoded side by side.
    """

    def __init__(self, limits: Limits, n: int) -> None:
        if n < 1:
            msg = f"an encoder serves at least one deployment, got n={n}"
            raise ConfigError(msg)
        self.n = n
        self._alpha_floor = 1.0 - np.exp(-limits.interval_s / np.array(AVERAGE_TAUS_S))
        self._miss_speeds = np.array([AVERAGE_TAUS_S.index(tau_s) for tau_s in MISS_TAUS_S], dtype=np.intp)
        self._average = np.zeros((n, len(AVERAGE_TAUS_S), _R))
        self._windows = np.zeros(n)  # windows averaged so far
        self._since_switch_s = np.full(n, np.inf)
        self._tp_degree = np.zeros(n)

        self._raw = np.zeros((n, len(_GATHERED)))
        self._raw_rates = self._raw[:, :_R]
        self._raw_counts = self._raw[:, _R : _R + _C]
        self._raw_ratios = self._raw[:, _R + _C :]
        self._x = np.zeros((n, len(FEATURES)))
        self._x_averages = self._x[:, :_A].reshape(n, len(AVERAGE_TAUS_S), _AVERAGED)
        self._x_misses = self._x[:, _A : _A + _M]
        self._x_counts = self._x[:, _A + _M : _A + _M + _C]
        self._x_objectives = self._x[:, _A + _M + _C : _L]
        self._x_logs = self._x[:, :_L]
        self._x_ratios = self._x[:, _L : _L + _Q]
        self._x_none = self._x[:, _L + _Q : _L + _Q + len(_NONE_FLAGS)]
        first = _L + _Q + len(_NONE_FLAGS)
        self._x_recency = self._x[:, first]
        self._x_tp_share = self._x[:, first + 1]
        self._x_tp_is = self._x[:, first + 2 :]

        self._log_scale = np.array([1.0 / log.scale for log in _LOGS])
        self._log_centre = np.array([log.centre for log in _LOGS])
        self._low = LOW.astype(np.float64)
        self._high = HIGH.astype(np.float64)
        self._divisor_of = np.array([kind for _, _, _, kind, _, _ in _RATIOS], dtype=np.intp)
        self._divisors = np.ones((n, 6))
        self._divisors[:, _CLOCK] = limits.sm_clocks_mhz[0]
        self._full_power_w = limits.tdp_w * limits.allotted_gpus
        self._allotted_gpus = float(limits.allotted_gpus)
        self._tp_positions = np.array(_TP_POSITIONS, dtype=np.float64)
        self._none_columns = np.array(_NONE_COLUMNS, dtype=np.intp)
        self._last = np.clip(np.zeros((n, len(FEATURES)), dtype=np.float32), LOW, HIGH)

    def reset(self, which: NDArray[np.bool_]) -> None:
        """Forget the past of the rows in ``which`` (shape (n,)); a new episode begins there."""
        self._average[which] = 0.0
        self._windows[which] = 0.0
        self._since_switch_s[which] = np.inf
        self._tp_degree[which] = 0.0
        self._last[which] = np.clip(0.0, LOW, HIGH)

    def encode(self, rows: NDArray[np.float64], service_levels: NDArray[np.float64]) -> NDArray[np.float32]:
        """Observations of shape (n, len(FEATURES)); advances the moving averages by one window.

        Args:
            rows: One window row each, shape (n, len(WINDOW_FIELDS)), NaN for "nothing to measure".
            service_levels: ``[ttft_s, tpot_s]`` of each row's episode, shape (n, 2).
        """
        if rows.shape != (self.n, len(WINDOW_FIELDS)):
            msg = f"expected rows of shape {(self.n, len(WINDOW_FIELDS))}, got {rows.shape}"
            raise ConfigError(msg)
        blind = (rows[:, Column.BLIND] != 0.0) | np.isnan(rows[:, Column.ENERGY_J])
        some_blind = bool(blind.any())
        raw = self._raw
        np.take(rows, _GATHERED, axis=1, out=raw, mode="clip")
        np.fmax(raw, 0.0, out=raw)  # NaN and negative numbers become 0; "none" has its own flags
        np.minimum(raw, _ABSURD, out=raw)
        duration_s = np.minimum(np.fmax(rows[:, Column.DURATION_S], _MIN_DURATION_S), _ABSURD)

        self._update_averages(duration_s, ~blind if some_blind else None)
        np.copyto(self._x_averages, self._average[:, :, :_AVERAGED])
        slow = self._average[:, self._miss_speeds]
        np.divide(slow[:, :, 3], slow[:, :, 0] + _MIN_DURATION_S, out=self._x_misses)
        np.copyto(self._x_counts, self._raw_counts)
        np.copyto(self._x_objectives, service_levels)
        logs = self._x_logs
        np.multiply(logs, self._log_scale, out=logs)
        np.log1p(logs, out=logs)
        np.subtract(logs, self._log_centre, out=logs)

        divisors = self._divisors
        divisors[:, _TTFT : _TPOT + 1] = service_levels
        np.fmax(raw[:, _R + _C - 1], 1.0, out=divisors[:, _CAP])
        np.multiply(duration_s, self._full_power_w, out=divisors[:, _POWER])
        np.divide(self._raw_ratios, divisors.take(self._divisor_of, axis=1), out=self._x_ratios)
        np.isnan(rows.take(self._none_columns, axis=1), out=self._x_none)
        self._update_switch(rows, duration_s, ~blind if some_blind else None)

        np.maximum(self._x, self._low, out=self._x)
        np.minimum(self._x, self._high, out=self._x)
        observation = self._x.astype(np.float32)
        if some_blind:
            observation[blind] = self._last[blind]
        self._last = observation
        return observation.copy()

    def _update_averages(self, duration_s: NDArray[np.float64], seen: NDArray[np.bool_] | None) -> None:
        # A plain mean at first, an exponential average once enough windows are in: no start-up bias.
        rates = np.minimum(self._raw_rates / duration_s[:, None], _RATE_CEILING_PER_S)
        count = self._windows + 1.0
        alpha = np.maximum(self._alpha_floor, (1.0 / count)[:, None])
        step = alpha[:, :, None] * (rates[:, None, :] - self._average)
        if seen is None:
            self._average += step
            self._windows = count
        else:
            self._average[seen] += step[seen]
            self._windows[seen] = count[seen]

    def _update_switch(
        self, rows: NDArray[np.float64], duration_s: NDArray[np.float64], seen: NDArray[np.bool_] | None
    ) -> None:
        tp_degree = np.fmax(rows[:, Column.TP_DEGREE], 0.0)
        changed = (tp_degree != self._tp_degree) & (self._tp_degree > 0.0)
        changed |= rows[:, Column.SWITCHING] > 0.0
        since_s = self._since_switch_s + duration_s
        since_s[changed] = 0.0
        if seen is None:
            self._since_switch_s = since_s
            self._tp_degree = tp_degree
        else:
            np.copyto(self._since_switch_s, since_s, where=seen)
            np.copyto(self._tp_degree, tp_degree, where=seen)
        # 1 - tau / (t + tau) equals t / (t + tau) and is defined at t = inf ("never").
        np.subtract(1.0, TP_RECENCY_S / (since_s + TP_RECENCY_S), out=self._x_recency)
        np.divide(tp_degree, self._allotted_gpus, out=self._x_tp_share)
        np.equal(tp_degree[:, None], self._tp_positions, out=self._x_tp_is)


def observation_table() -> str:
    """The feature table as Markdown, for documentation."""
    lines = ["| # | name | unit | low | high | meaning |", "|---|---|---|---|---|---|"]
    for i, f in enumerate(FEATURES):
        lines.append(f"| {i} | `{f.name}` | {f.unit} | {f.low:g} | {f.high:g} | {f.meaning} |")
    return "\n".join(lines)
