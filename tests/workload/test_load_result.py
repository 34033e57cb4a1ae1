from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.workload.load_result import (
    LoadResult,
    Quantiles,
    RequestResult,
    Verdict,
    concurrency_peak,
    summarize_load,
)


def _row(index: int = 0, verdict: Verdict = Verdict.COMPLETE, **changes: Any) -> RequestResult:
    usual: dict[str, Any] = {
        "intended_s": 1.0,
        "prompt_tokens_asked": 10,
        "output_tokens_asked": 5,
        "dispatched_s": 1.25,
        "sent_s": 1.5,
        "first_token_s": 2.0,
        "finished_s": 4.0,
        "prompt_tokens": 10,
        "output_tokens": 5,
        "finish_reason": "length",
        "status": 200,
    }
    return RequestResult(index=index, verdict=verdict, **(usual | changes))


def _result(rows: tuple[RequestResult, ...], **changes: Any) -> LoadResult:
    usual: dict[str, Any] = {
        "trace": "t", "url": "http://server", "model": "m", "api": "completions", "seed": 0,
        "concurrency": None, "started_s": 100.0, "started_wall_s": 1e9, "planned": len(rows), "trimmed": 0,
        "interrupted": False, "notes": ("a note",), "requests": rows,
        "summary": summarize_load(rows, slo_ttft_s=1.0, slo_tpot_s=0.5),
    }  # fmt: skip
    return LoadResult(**(usual | changes))


def test_latencies_count_from_the_intended_time() -> None:
    row = _row()
    assert row.ttft_s == 1.0
    assert row.e2e_s == 3.0
    assert row.tpot_s == 0.5  # four further tokens in two seconds
    assert row.lateness_s == 0.25


@pytest.mark.parametrize("verdict", [verdict for verdict in Verdict if verdict != Verdict.COMPLETE])
def test_only_a_complete_answer_counts_as_served(verdict: Verdict) -> None:
    summary = summarize_load([_row(), _row(1, verdict)], slo_ttft_s=9, slo_tpot_s=9)
    assert summary.within_slo == 1
    assert summary.attainment == 0.5
    assert summary.output_tokens == 5
    assert summary.tpot_s.count == summary.e2e_s.count == 1
    assert summary.verdicts == {"complete": 1, verdict: 1}
    assert not _result((_row(), _row(1, verdict))).all_complete


def test_all_is_complete_only_when_nothing_was_cut_short() -> None:
    assert _result((_row(),)).all_complete
    assert not _result((_row(),), interrupted=True).all_complete


def test_a_single_token_has_no_time_per_further_token() -> None:
    row = _row(output_tokens=1, output_tokens_asked=1)
    assert row.tpot_s is None
    assert row.meets(1.0, 0.001)


def test_goodput_counts_both_limits() -> None:
    rows = [_row(), _row(1, first_token_s=2.1), _row(2, finished_s=4.1)]
    summary = summarize_load(rows, slo_ttft_s=1.0, slo_tpot_s=0.5)
    assert summary.within_slo == 1
    assert summary.span_s == 4.1
    assert summary.goodput_per_s == pytest.approx(1 / 4.1)


def test_nothing_measured_is_none_and_not_zero() -> None:
    assert Quantiles.of([None, None]) == Quantiles(0)
    summary = summarize_load([], slo_ttft_s=1, slo_tpot_s=1)
    assert summary.ttft_s.p50 is None
    assert summary.cached_tokens is None
    assert summary.attainment == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10)), max_size=30))
def test_the_peak_is_that_of_a_count_at_every_moment(spans: list[tuple[int, int]]) -> None:
    rows = [_row(i, dispatched_s=float(a), finished_s=float(a + n)) for i, (a, n) in enumerate(spans)]
    counted = [sum(a <= at < a + n for a, n in spans) for at in range(31)]
    # one that takes no time at all still was there
    momentary = [1 for _, n in spans if n == 0]
    assert max(counted, default=0) <= concurrency_peak(rows) <= max(counted, default=0) + len(momentary)


def test_files_hold_every_request_and_replace_those_of_an_earlier_run(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    _result((_row(), _row(1), _row(2))).write(folder)
    lost = _row(1, Verdict.LOST, first_token_s=None, error="finish reason abort, really")
    files = _result((_row(), lost)).write(folder)
    with files["requests"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["verdict"] for row in rows] == ["complete", "lost"]
    assert rows[1]["first_token_s"] == ""
    assert rows[1]["error"] == "finish reason abort, really"
    assert float(rows[0]["finished_s"]) == 4.0
    summary = json.loads(files["summary"].read_text(encoding="utf-8"))
    assert summary["summary"]["verdicts"] == {"complete": 1, "lost": 1}
    assert summary["notes"] == ["a note"]
    assert sorted(path.name for path in folder.iterdir()) == ["load.json", "requests.csv"]
