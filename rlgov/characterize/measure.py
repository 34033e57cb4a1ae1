"""From what was seen while a point was held to its row in the table. Pure.

What counts in the measured span: a TTFT when the first token came in it; TPOT, end-to-end time, lengths and
``served`` when the last token came in it; a gap between tokens when it ended in it. While serving is steady
that is the same distribution as over the requests that arrive in the span, and nothing is cut off at its end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rlgov.calibration.table import ITERATIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from rlgov.characterize.plan import Task
    from rlgov.characterize.steady import Span
    from rlgov.records import Window

RING_COLUMNS: Final = (
    "t_s",
    "step_s",
    "running",
    "waiting",
    "prefill_tokens",
    "decode_tokens",
    "context_tokens",
    "kv_usage",
)
"""Columns of a row of iterations, as the plugin gives them; ``t_s`` is on the windows' axis."""


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """Requests of a point, arrays of shape (n,); times on the windows' axis, NaN for what did not happen.

    ``sent_s`` is when the request was due. ``failed`` are those that ended in any other way than with every
    token.
    """

    sent_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.float64]
    output_tokens: NDArray[np.float64]
    failed: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What a point left behind besides its windows."""

    requests: Requests
    iterations: NDArray[np.float64] | None  # (n, len(RING_COLUMNS)); None where the engine does not tell
    energy_j: float | None  # of the measured span
    energy_error: float | None  # relative
    measured_gpus: int  # that the energy is of
    throttle_reasons: frozenset[str]
    iterations_dropped: int = 0  # rows the engine forgot before they were asked for
    errors: tuple[str, ...] = ()  # what requests failed with, the most frequent first


@dataclass(frozen=True, slots=True)
class Place:
    """What is the same for every point of a campaign."""

    source: str
    model: str
    gpu: str | None
    measured_clock: bool  # whether windows hold a clock that was measured


def span_s(windows: Sequence[Window], span: Span) -> tuple[float, float]:
    """Begin and end of a span on the windows' axis."""
    first, last = windows[span.begin], windows[span.end - 1]
    return first.start_s, last.start_s + last.duration_s


def point_row(
    task: Task, seen: Sequence[Window], span: Span, evidence: Evidence, place: Place
) -> dict[str, Any]:
    """The row of one repetition; what is not known is left out."""
    point, windows = task.point, seen[span.begin : span.end]
    begin_s, end_s = span_s(seen, span)
    duration_s = end_s - begin_s
    clear = [window for window in windows if not window.blind]
    generated = math.fsum(window.output_tokens for window in clear)
    latencies, served = _latencies(evidence.requests, begin_s, end_s)
    energy_j = evidence.energy_j
    row: dict[str, Any] = {
        "point_id": point.point_id,
        "repeat": task.repeat,
        "workload": point.workload,
        "mode": point.mode,
        "concurrency": point.concurrency,
        "rate_per_s": point.rate_per_s,
        "sm_clock_mhz": point.sm_clock_mhz,
        "batch_cap": point.batch_cap,
        "tp_degree": point.tp_degree,
        "allotted_gpus": evidence.measured_gpus,
        "duration_s": duration_s,
        "steady": span.steady,
        **latencies,
        **_engine_figures(evidence, begin_s, end_s),
        "output_tokens_per_s": generated / duration_s,
        "running_mean": _mean(clear, [window.running_mean for window in clear]),
        "kv_usage_mean": _mean(clear, [window.kv_usage for window in clear]),
        "busy_s": math.fsum(window.busy_fraction * window.duration_s for window in clear),
        "prefill_tokens": math.fsum(window.prefill_tokens for window in clear),
        "generated_tokens": generated,
        "gpu": place.gpu,
        "model": place.model,
        "source": place.source,
    }
    if place.measured_clock:
        row["measured_clock_mhz"] = _mean(windows, [window.measured_clock_mhz for window in windows])
        row["throttled_fraction"] = _mean(windows, [window.throttled_fraction for window in windows])
        row["throttle_reasons"] = "+".join(sorted(evidence.throttle_reasons)) or "none"
    if energy_j is not None:
        row |= {
            "energy_j": energy_j,
            "energy_error": evidence.energy_error,
            "power_w_per_gpu": energy_j / duration_s / evidence.measured_gpus,
            "j_per_output_token": energy_j / generated if generated > 0 else None,
            "j_per_request": energy_j / served if served else None,
        }
    return {name: value for name, value in row.items() if not _missing(value)}


def iteration_rows(
    task: Task, seen: Sequence[Window], span: Span, evidence: Evidence
) -> Iterable[dict[str, Any]]:
    """The iterations of the measured span, for the table of iterations; times from its beginning."""
    if evidence.iterations is None:
        return
    begin_s, end_s = span_s(seen, span)
    names = [column.name for column in ITERATIONS][2:]
    for values in _within(evidence.iterations, begin_s, end_s).tolist():
        told = dict(zip(RING_COLUMNS, values, strict=True))
        told["t_s"] -= begin_s
        yield {"point_id": task.point.point_id, "repeat": task.repeat} | {name: told[name] for name in names}


def closed_loop_sent_s(finish_s: NDArray[np.float64], concurrency: int) -> NDArray[np.float64]:
    """When each request of a queue that is always full would have been sent by ``concurrency`` users.

    Requests are served first come first served, so a user's next request is the one that follows: request
    k is sent when the (k - concurrency + 1)-th request finishes. Shape (n,), NaN for those never sent.
    """
    n = finish_s.size
    sent_s = np.full(n, np.nan)
    sent_s[:concurrency] = 0.0
    done = np.sort(finish_s[np.isfinite(finish_s)])[: max(n - concurrency, 0)]
    sent_s[concurrency : concurrency + done.size] = done
    return sent_s


def _latencies(requests: Requests, begin_s: float, end_s: float) -> tuple[dict[str, Any], int]:
    def inside(at_s: NDArray[np.float64]) -> NDArray[np.bool_]:
        return (at_s > begin_s) & (at_s <= end_s)

    good = ~requests.failed
    begun = good & inside(requests.first_token_s)
    done = good & inside(requests.finish_s)
    served = int(done.sum())
    further = requests.output_tokens - 1
    several = done & (further > 0)
    row: dict[str, Any] = {
        "requests": int(inside(requests.sent_s).sum()),
        "served": served,
        "failed": int((requests.failed & inside(requests.finish_s)).sum()),
    }
    if served:
        prompts = requests.prompt_tokens[done]
        row["prompt_tokens_mean"] = float(prompts.mean())
        row["prompt_pairs_mean"] = float((prompts * (prompts + 1) / 2).mean())
        row["output_tokens_mean"] = float(requests.output_tokens[done].mean())
    row |= quantiles("ttft", (requests.first_token_s - requests.sent_s)[begun])
    row |= quantiles("tpot", (requests.finish_s - requests.first_token_s)[several] / further[several])
    row |= quantiles("e2e", (requests.finish_s - requests.sent_s)[done])
    return row, served


def quantiles(name: str, values: NDArray[np.float64]) -> dict[str, float]:
    """The three columns of one latency; none where there is no value."""
    if not values.size:
        return {}
    found = np.percentile(values, (50, 90, 99)).tolist()
    return {f"{name}_p{q}_s": value for q, value in zip((50, 90, 99), found, strict=True)}


def _gaps(iterations: NDArray[np.float64], begin_s: float, end_s: float) -> dict[str, float]:
    """Gaps between tokens: from the end of one iteration to the next, one a sequence decoded in it."""
    if len(iterations) <= 1:
        return {}
    at_s = iterations[1:, RING_COLUMNS.index("t_s")]
    gap_s = np.diff(iterations[:, RING_COLUMNS.index("t_s")])
    tokens = np.rint(iterations[1:, RING_COLUMNS.index("decode_tokens")]).astype(np.int64)
    kept = (at_s > begin_s) & (at_s <= end_s) & (tokens > 0)
    if not kept.any():
        return {}
    order = np.argsort(gap_s[kept], kind="stable")
    reached = np.cumsum(tokens[kept][order])
    ranks = [np.searchsorted(reached, share * reached[-1], side="left") for share in (0.5, 0.9, 0.99)]
    found = gap_s[kept][order][ranks].tolist()
    return {f"itl_p{q}_s": value for q, value in zip((50, 90, 99), found, strict=True)}


def _within(iterations: NDArray[np.float64], begin_s: float, end_s: float) -> NDArray[np.float64]:
    at_s = iterations[:, RING_COLUMNS.index("t_s")]
    return iterations[(at_s > begin_s) & (at_s <= end_s)]


def _engine_figures(evidence: Evidence, begin_s: float, end_s: float) -> dict[str, float | None]:
    """What the iterations tell: how many, gaps between tokens, and the context of a decoding sequence."""
    if evidence.iterations is None:
        return {}
    within = _within(evidence.iterations, begin_s, end_s)
    column = {name: within[:, i] for i, name in enumerate(RING_COLUMNS)}
    # Where prompts are computed, too, their tokens are among those attended to.
    pure = (column["prefill_tokens"] == 0) & (column["decode_tokens"] > 0)
    decoded = float(column["decode_tokens"][pure].sum())
    return {
        # Rows that were forgotten would be missing from the count.
        "iterations": None if evidence.iterations_dropped else float(len(within)),
        "context_tokens_mean": float(column["context_tokens"][pure].sum()) / decoded if decoded else None,
        **_gaps(evidence.iterations, begin_s, end_s),
    }


def _mean(windows: Sequence[Window], values: Sequence[float]) -> float | None:
    total_s = math.fsum(window.duration_s for window in windows)
    if total_s <= 0:
        return None
    return math.fsum(v * w.duration_s for v, w in zip(values, windows, strict=True)) / total_s


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
