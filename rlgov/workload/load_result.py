"""What came of a load run: a record a request, a summary, and the files they are written to."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

SCHEMA = "rlgov-load-1"
FREQUENT_ERRORS = 5
FINISHED_WELL = frozenset({"length", "stop"})


class Verdict(StrEnum):
    """What became of a request. Only ``complete`` counts as served."""

    COMPLETE = "complete"  # the exact tokens, with finish reason length or stop
    INEXACT = "inexact"  # a whole answer, but not of the tokens that were asked for, or without a count
    LOST = "lost"  # status 200, but aborted or empty: the server gave it up
    TRUNCATED = "truncated"  # the stream ended without [DONE]
    REJECTED = "rejected"  # any other status than 200
    FAILED = "failed"  # no connection, or an error in its place or in the stream
    TIMEOUT = "timeout"
    UNSENT = "unsent"  # too many were under way already
    CANCELLED = "cancelled"  # the run was interrupted


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One request. Times are seconds after the start of the run; None is what did not happen.

    Latencies count from ``intended_s``, when the plan wanted it sent. ``dispatched_s`` is when the
    generator got to it, ``sent_s`` when its head was written to a connection.
    """

    index: int
    intended_s: float
    verdict: Verdict
    prompt_tokens_asked: int
    output_tokens_asked: int
    dispatched_s: float | None = None
    sent_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    events: int = 0
    finish_reason: str | None = None
    status: int | None = None
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, from the intended time."""
        return None if self.first_token_s is None else self.first_token_s - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first one; None unless the answer was complete and longer than one."""
        if self.verdict != Verdict.COMPLETE or self.first_token_s is None or self.finished_s is None:
            return None
        further = (self.output_tokens or 0) - 1
        return (self.finished_s - self.first_token_s) / further if further > 0 else None

    @property
    def e2e_s(self) -> float | None:
        """Time to the end of a complete answer, from the intended time."""
        if self.verdict != Verdict.COMPLETE or self.finished_s is None:
            return None
        return self.finished_s - self.intended_s

    @property
    def lateness_s(self) -> float | None:
        """How far the generator itself was behind its plan; connecting is not in it."""
        return None if self.dispatched_s is None else self.dispatched_s - self.intended_s

    def meets(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether it was served completely and within both limits."""
        if self.verdict != Verdict.COMPLETE or self.ttft_s is None or self.ttft_s > ttft_s:
            return False
        return self.tpot_s is None or self.tpot_s <= tpot_s


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of ``count`` values; all None when there are none."""

    count: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Quantiles:
        """Quantiles by linear interpolation; None among the values are left out."""
        known = np.array([value for value in values if value is not None])
        if not known.size:
            return cls(0)
        p50, p90, p99 = np.percentile(known, [50, 90, 99]).tolist()
        return cls(known.size, float(known.mean()), p50, p90, p99, float(known.max()))


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """The figures of a run. Attainment counts every request that fell due, lost and unsent ones too."""

    requests: int
    verdicts: dict[str, int]
    span_s: float  # from the start until the last answer, and at least until the last request was due
    ttft_s: Quantiles
    tpot_s: Quantiles
    e2e_s: Quantiles
    lateness_s: Quantiles
    connect_s: Quantiles  # from dispatch until the head was written: finding or making a connection
    slo_ttft_s: float
    slo_tpot_s: float
    within_slo: int
    attainment: float  # share of requests within both limits
    goodput_per_s: float  # requests within both limits
    requests_per_s: float  # complete ones
    output_tokens_per_s: float  # of complete ones
    prompt_tokens: int  # of complete ones
    output_tokens: int
    cached_tokens: int | None  # prompt tokens the server found in its prefix cache, where it says so
    prefix_tokens_asked: int
    concurrency_peak: int
    errors: dict[str, int]  # the most frequent ones


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A whole run. ``started_s`` is its start on the machine's monotonic clock."""

    trace: str
    url: str
    model: str
    api: str
    seed: int
    concurrency: int | None
    started_s: float
    started_wall_s: float
    planned: int
    trimmed: int
    interrupted: bool
    notes: tuple[str, ...]
    summary: LoadSummary
    requests: tuple[RequestResult, ...]

    @property
    def all_complete(self) -> bool:
        """Whether every planned request was sent and served completely."""
        return not self.interrupted and self.summary.verdicts == {Verdict.COMPLETE: len(self.requests)}

    def to_json(self) -> dict[str, Any]:
        """Everything but the single requests, for load.json and ``--json``."""
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        del record["requests"]
        return {"schema": SCHEMA, **record, "notes": list(self.notes), "summary": asdict(self.summary)}

    def write(self, folder: Path) -> dict[str, Path]:
        """Write requests.csv and load.json, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {"requests": folder / "requests.csv", "summary": folder / "load.json"}
        with _replacing(paths["requests"]) as part, part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            names = [field.name for field in fields(RequestResult)]
            writer.writerow(names)
            for row in self.requests:
                writer.writerow([_cell(getattr(row, name)) for name in names])
        with _replacing(paths["summary"]) as part:
            part.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        return paths


class _replacing:  # noqa: N801  # used as a function
    """Gives a file beside ``path`` and puts it in its place when all went well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")

    def __enter__(self) -> Path:
        return self._part

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.replace(self._part, self._path)  # noqa: PTH105  # atomic on one file system
        else:
            self._part.unlink(missing_ok=True)


def _cell(value: object) -> object:
    return f"{value:.6f}" if isinstance(value, float) else value


def summarize_load(
    requests: Sequence[RequestResult], *, slo_ttft_s: float, slo_tpot_s: float, prefix_tokens_asked: int = 0
) -> LoadSummary:
    """The figures of a run from its requests."""
    complete = [row for row in requests if row.verdict == Verdict.COMPLETE]
    within = sum(row.meets(slo_ttft_s, slo_tpot_s) for row in complete)
    ends = [max(row.intended_s, row.finished_s or 0.0) for row in requests]
    span_s = max(ends, default=0.0)
    cached = [row.cached_tokens for row in requests if row.cached_tokens is not None]
    output_tokens = sum(row.output_tokens or 0 for row in complete)
    rate = 1 / span_s if span_s > 0 else 0.0
    return LoadSummary(
        requests=len(requests),
        verdicts={str(verdict): count for verdict, count in Counter(row.verdict for row in requests).items()},
        span_s=span_s,
        ttft_s=Quantiles.of(row.ttft_s for row in requests),
        tpot_s=Quantiles.of(row.tpot_s for row in requests),
        e2e_s=Quantiles.of(row.e2e_s for row in requests),
        lateness_s=Quantiles.of(row.lateness_s for row in requests),
        connect_s=Quantiles.of(
            None if row.sent_s is None or row.dispatched_s is None else row.sent_s - row.dispatched_s
            for row in requests
        ),
        slo_ttft_s=slo_ttft_s,
        slo_tpot_s=slo_tpot_s,
        within_slo=within,
        attainment=within / len(requests) if requests else 0.0,
        goodput_per_s=within * rate,
        requests_per_s=len(complete) * rate,
        output_tokens_per_s=output_tokens * rate,
        prompt_tokens=sum(row.prompt_tokens or row.prompt_tokens_asked for row in complete),
        output_tokens=output_tokens,
        cached_tokens=sum(cached) if cached else None,
        prefix_tokens_asked=prefix_tokens_asked,
        concurrency_peak=concurrency_peak(requests),
        errors=dict(Counter(row.error for row in requests if row.error).most_common(FREQUENT_ERRORS)),
    )


def concurrency_peak(requests: Sequence[RequestResult]) -> int:
    """The most requests that were under way at one moment."""
    spans = [(row.dispatched_s, row.finished_s) for row in requests]
    starts = [start_s for start_s, end_s in spans if start_s is not None and end_s is not None]
    ends = [end_s for start_s, end_s in spans if start_s is not None and end_s is not None]
    if not starts:
        return 0
    # An end goes before a start at the same moment.
    at_s = np.array(ends + starts)
    change = np.array([-1] * len(ends) + [1] * len(starts))
    return int(np.cumsum(change[np.argsort(at_s, kind="stable")]).max())
