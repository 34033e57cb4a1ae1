"""What ``rlgov trace show | fetch | synth`` do: print for people, return plain values for JSON."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from rlgov.errors import ConfigError
from rlgov.workload.fetch import CATALOGUE, ignore_progress
from rlgov.workload.fetch import fetch_trace as _fetch_trace
from rlgov.workload.readers import read_trace, write_trace
from rlgov.workload.summary import TraceSummary, as_record, plot_trace, summarize
from rlgov.workload.synthesis import SPECS, synthesize

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import TextIO

    from rlgov.workload.fetch import PublicTrace
    from rlgov.workload.readers import Failed, Kind


def trace_show(
    file: str | Path,
    *,
    kind: Kind = "auto",
    failed: Failed | None = None,
    plot: str | Path | None = None,
    from_s: float = 0.0,
    to_s: float | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Summarise a trace file and, with ``plot``, write its picture there as PNG."""
    trace = read_trace(file, kind=kind, failed=failed)
    if from_s or to_s is not None:
        trace = trace.slice(from_s, trace.duration_s if to_s is None else to_s)
    summary = summarize(trace)
    record = as_record(summary) | {"file": str(file), "plot": None if plot is None else str(plot)}
    if plot is not None:
        plot_trace(trace, plot)
    if not quiet:
        _print_summary(summary)
        if plot is not None:
            _say(f"plot: {plot}")
    return record


def trace_fetch(
    name: str,
    *,
    directory: str | Path = "traces",
    catalogue: Mapping[str, PublicTrace] = CATALOGUE,
    quiet: bool = False,
) -> dict[str, Any]:
    """Download a public trace of the catalogue."""
    if quiet:
        fetched = _fetch_trace(name, directory, catalogue=catalogue, progress=ignore_progress)
    else:
        with _Bar(name, sys.stderr) as bar:
            fetched = _fetch_trace(name, directory, catalogue=catalogue, progress=bar)
    entry = catalogue[name]
    if not quiet:
        state = "downloaded" if fetched.downloaded else "already there"
        _say(f"{fetched.path} ({fetched.size_bytes:,} bytes, {state})")
        if fetched.verified:
            _say(f"sha256 {fetched.sha256} (as expected)")
        else:
            _say(f"WARNING: unverified, no known hash to check against; sha256 {fetched.sha256}")
        _say(f"licence {entry.licence}; please cite {entry.citation}")
    return {
        "name": name,
        "path": str(fetched.path),
        "size_bytes": fetched.size_bytes,
        "sha256": fetched.sha256,
        "verified": fetched.verified,
        "downloaded": fetched.downloaded,
        "url": entry.url,
        "licence": entry.licence,
        "citation": entry.citation,
    }


def trace_list(
    *, catalogue: Mapping[str, PublicTrace] = CATALOGUE, quiet: bool = False
) -> list[dict[str, Any]]:
    """The traces that :func:`trace_fetch` knows."""
    rows = [
        {"name": t.name, "kind": t.kind, "licence": t.licence, "url": t.url, "sha256": t.sha256}
        for t in catalogue.values()
    ]
    if not quiet:
        table = Table(box=None)
        for heading in ("name", "kind", "licence", "hash"):
            table.add_column(heading, no_wrap=True)
        for row in rows:
            known = "known" if row["sha256"] else "UNVERIFIED"
            table.add_row(row["name"], row["kind"], row["licence"], known)
        Console().print(table)
    return rows


def trace_synth(  # noqa: PLR0913  # one argument a flag of the command
    spec: str,
    out: str | Path,
    *,
    seed: int = 0,
    duration_s: float | None = None,
    rate_per_s: float | None = None,
    low: float | None = None,
    high: float | None = None,
    phase: float | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a synthetic trace as tidy CSV. Settings left out are those of the named spec."""
    if spec not in SPECS:
        msg = f"unknown synthetic trace {spec!r}; known are {', '.join(SPECS)}"
        raise ConfigError(msg)
    if seed < 0:
        msg = f"seed must be 0 or above, got {seed}"
        raise ConfigError(msg)
    base = SPECS[spec]
    settings = replace(
        base,
        duration_s=base.duration_s if duration_s is None else duration_s,
        rate_per_s=base.rate_per_s if rate_per_s is None else rate_per_s,
        low=base.low if low is None else low,
        high=base.high if high is None else high,
        phase=base.phase if phase is None else phase,
    )
    trace = synthesize(settings, np.random.default_rng(seed))
    summary = summarize(trace)
    write_trace(trace, out)
    if not quiet:
        _print_summary(summary)
        _say(f"written: {out}")
    return as_record(summary) | {"file": str(out), "seed": seed}


class _Bar:
    """A progress bar on a terminal; elsewhere one line for every tenth."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self._name = name
        self._stream = stream
        self._bar: tqdm[Any] | None = None
        self._next_tenth = 1

    def __enter__(self) -> _Bar:  # noqa: PYI034  # private and final
        if self._stream.isatty():
            self._bar = tqdm(desc=self._name, unit="B", unit_scale=True, file=self._stream)
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done_bytes: int, total_bytes: int | None) -> None:
        if self._bar is not None:
            self._bar.total = total_bytes
            self._bar.update(done_bytes - self._bar.n)
        elif total_bytes and done_bytes * 10 >= total_bytes * self._next_tenth:
            self._next_tenth = done_bytes * 10 // total_bytes + 1
            self._stream.write(f"{self._name}: {done_bytes:,} of {total_bytes:,} bytes\n")


def _say(line: str) -> None:
    Console(soft_wrap=True, highlight=False, markup=False).print(line)


def _print_summary(summary: TraceSummary) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{summary.name}: {summary.requests:,} requests in {summary.duration_s:,.1f} s, "
        f"mean {summary.mean_rate_per_s:.3f}/s, busiest minute {summary.peak_rate_per_s:.3f}/s "
        f"({summary.peak_to_mean:.2f} times the mean)"
    )
    table = Table(box=None)
    table.add_column("tokens")
    headings = ("mean", "min", "p10", "p50", "p90", "p99", "max", "per second")
    for heading in headings:
        table.add_column(heading, justify="right")
    for which, tokens, per_s in (
        ("prompt", summary.prompt_tokens, summary.prompt_tokens_per_s),
        ("output", summary.output_tokens, summary.output_tokens_per_s),
    ):
        values = (tokens.mean, tokens.minimum, tokens.p10, tokens.p50, tokens.p90, tokens.p99, tokens.maximum)
        table.add_row(which, *(f"{value:,.0f}" for value in values), f"{per_s:,.0f}")
    console.print(table)
    dispersions = (
        ("1 s", summary.dispersion_1s),
        ("10 s", summary.dispersion_10s),
        ("60 s", summary.dispersion_60s),
    )
    shown = ", ".join(f"{value:.2f} at {window}" for window, value in dispersions if value is not None)
    if shown:
        console.print(f"burstiness (variance over mean of arrivals, 1 is Poisson): {shown}")
    if summary.prefix_hit_share:
        console.print(f"prefix cache: {summary.prefix_hit_share:.1%} of prompt tokens found there")
    for note in summary.notes:
        console.print(f"note: {note}")
