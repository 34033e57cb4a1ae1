"""``rlgov load``: a trace's requests against a running server, and what became of them."""

from __future__ import annotations

import json as json_format
import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from rlgov.commands.output import Json, Progress, console, put_json
from rlgov.commands.traces import open_trace
from rlgov.config import LoadSettings

if TYPE_CHECKING:
    from rich.table import Table

    from rlgov.workload.load_result import LoadResult, Quantiles
    from rlgov.workload.trace import Trace
    from rlgov.workload.vllm_bench import CrossCheck

EXIT_NOT_COMPLETE = 1
EXIT_INTERRUPTED = 130


def load(*, settings: Annotated[LoadSettings, Parameter(name="*")], json: Json = False) -> int:
    """Send a trace's requests to an OpenAI-compatible server, at their times and with their token counts.

    No send waits for an answer, and latencies count from when the trace wanted the request sent. The exit
    code is 1 if any request was not served completely, 130 after Ctrl-C; what happened until then is written.

    Args:
        settings: Which requests, how fast, and where to.
        json: Report as JSON.
    """
    from rlgov.clock import SystemClock
    from rlgov.workload.load import run_load_blocking

    trace = open_trace(settings.trace, seed=settings.seed)
    clock = SystemClock()
    with Progress() as progress:
        result = run_load_blocking(trace, settings, clock, progress=progress)
    files = result.write(settings.out)
    record = result.to_json()
    if not json:
        _report(result)
    if settings.cross_check and not result.interrupted:
        checked = _cross_check(trace, settings, result)
        record["cross_check"] = checked.to_json()
        files["cross_check"] = settings.out / "cross_check.json"
        text = json_format.dumps(checked.to_json(), indent=2) + "\n"
        files["cross_check"].write_text(text, encoding="utf-8")
        if not json:
            console().print(_side_by_side(checked))
    if json:
        put_json(record)
    else:
        sys.stdout.writelines(f"{path}\n" for path in files.values())
    if result.interrupted:
        return EXIT_INTERRUPTED
    return 0 if result.all_complete else EXIT_NOT_COMPLETE


def _cross_check(trace: Trace, settings: LoadSettings, result: LoadResult) -> CrossCheck:
    from rlgov.workload.load_plan import build_plan
    from rlgov.workload.vllm_bench import cross_check, run_bench

    sys.stderr.write("the same again with vllm bench serve ...\n")
    return cross_check(result, run_bench(build_plan(trace, settings), settings, result.model))


def _report(result: LoadResult) -> None:
    summary = result.summary
    to = console()
    verdicts = ", ".join(f"{count:,} {verdict}" for verdict, count in sorted(summary.verdicts.items()))
    to.print(
        f"{result.trace} to {result.url} ({result.model}): {summary.requests:,} of {result.planned:,} "
        f"requests in {summary.span_s:,.1f} s: {verdicts or 'none'}",
        highlight=False,
        markup=False,
    )
    to.print(_latencies(result))
    to.print(
        f"within {summary.slo_ttft_s:g} s TTFT and {1000 * summary.slo_tpot_s:g} ms TPOT: "
        f"{summary.attainment:.2%}, goodput {summary.goodput_per_s:.3f} requests/s; "
        f"{summary.output_tokens_per_s:,.0f} output tokens/s; at most {summary.concurrency_peak:,} under way",
        highlight=False,
        markup=False,
    )
    for note in result.notes:
        to.print(f"note: {note}", highlight=False, markup=False)
    for error, count in summary.errors.items():
        to.print(f"{count:,} times: {error}", highlight=False, markup=False)


def _latencies(result: LoadResult) -> Table:
    from rich.table import Table

    summary = result.summary
    table = Table(box=None)
    for heading in ("milliseconds", "requests", "mean", "p50", "p90", "p99", "max"):
        table.add_column(heading, justify="left" if heading == "milliseconds" else "right")
    for name, quantiles in (
        ("TTFT", summary.ttft_s),
        ("TPOT", summary.tpot_s),
        ("end to end", summary.e2e_s),
        ("sent late by", summary.lateness_s),
        ("connecting", summary.connect_s),
    ):
        table.add_row(name, f"{quantiles.count:,}", *_milliseconds(quantiles))
    return table


def _side_by_side(checked: CrossCheck) -> Table:
    from rich.table import Table

    table = Table(box=None, title="from the real send, in milliseconds", title_justify="left")
    table.add_column("")
    for heading in (
        "requests",
        "exact",
        "TTFT p50",
        "p90",
        "p99",
        "TPOT p50",
        "p90",
        "p99",
        "late p50",
        "max",
    ):
        table.add_column(heading, justify="right")
    for name, result in (("rlgov load", checked.load), ("vllm bench serve", checked.bench)):
        values = [
            value
            for quantiles in (result.ttft_s, result.tpot_s)
            for value in (quantiles.p50, quantiles.p90, quantiles.p99)
        ]
        values += [result.lateness_s.p50, result.lateness_s.max]
        cells = ["-" if value is None else f"{1000 * value:,.2f}" for value in values]
        table.add_row(name, f"{result.requests:,}", f"{result.exact:,}", *cells)
    return table


def _milliseconds(quantiles: Quantiles) -> list[str]:
    values = (quantiles.mean, quantiles.p50, quantiles.p90, quantiles.p99, quantiles.max)
    return ["-" if value is None else f"{1000 * value:,.2f}" for value in values]
