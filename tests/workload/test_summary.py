from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlgov.errors import ConfigError, TraceError
from rlgov.workload.commands import trace_list, trace_show, trace_synth
from rlgov.workload.readers import read_trace
from rlgov.workload.summary import as_record, plot_trace, summarize
from rlgov.workload.synthesis import SPECS, synthesize
from rlgov.workload.trace import Trace


def small(n: int = 4, *, hits: int = 0) -> Trace:
    return Trace(
        "small",
        np.arange(n, dtype=np.float64),
        np.arange(1, n + 1, dtype=np.int64) * 100,
        np.arange(1, n + 1, dtype=np.int64),
        np.full(n, hits, dtype=np.int64),
        float(n),
        ("a note",),
    )


def test_the_figures_of_a_small_trace() -> None:
    summary = summarize(small(hits=50))
    assert summary.requests == 4
    assert summary.mean_rate_per_s == 1.0
    assert summary.prompt_tokens.total == 1000
    assert summary.prompt_tokens.p50 == 250.0
    assert (summary.output_tokens.minimum, summary.output_tokens.maximum) == (1, 4)
    assert summary.prompt_tokens_per_s == 250.0
    assert summary.prefix_hit_share == 0.2
    assert summary.prompt_output_rank_correlation == pytest.approx(1.0)
    assert summary.dispersion_1s == 0.0  # one arrival every second
    assert summary.dispersion_60s is None  # shorter than two windows
    assert summary.peak_to_mean == 1.0


def test_the_peak_is_that_of_the_busiest_minute() -> None:
    arrivals = np.concatenate([np.linspace(0, 59, 6), np.linspace(60, 119, 60), np.linspace(120, 179, 6)])
    n = len(arrivals)
    ones = np.ones(n, dtype=np.int64)
    trace = Trace("p", arrivals, ones * 5, ones, ones * 0, 180.0)
    assert summarize(trace).peak_rate_per_s == 1.0
    assert summarize(trace).peak_to_mean == pytest.approx(180 / 72)


def test_the_record_is_plain_json() -> None:
    record = as_record(summarize(small()))
    assert json.loads(json.dumps(record)) == record
    assert record["notes"] == ["a note"]


def test_nothing_is_not_summarised() -> None:
    with pytest.raises(TraceError, match="no requests to summarise"):
        summarize(small().slice(3.5, 4.0))


@pytest.mark.parametrize("n", [1, 2, 50])
def test_a_plot_of_any_size_is_a_png(tmp_path: Path, n: int) -> None:
    plot_trace(small(n), tmp_path / "deep" / "t.png")
    assert (tmp_path / "deep" / "t.png").read_bytes().startswith(b"\x89PNG")


def test_equal_traces_give_equal_plots(tmp_path: Path) -> None:
    trace = synthesize(replace(SPECS["code"], duration_s=600.0), np.random.default_rng(0))
    for name in ("a", "b"):
        plot_trace(trace, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_synth_writes_what_show_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "day.csv", tmp_path / "day.png"
    written = trace_synth("day", out, seed=3, duration_s=300.0, rate_per_s=10.0)
    shown = trace_show(out, plot=plot)
    assert shown["requests"] == written["requests"] == len(read_trace(out))
    assert shown["prompt_tokens"] == written["prompt_tokens"]
    assert plot.exists()
    printed = capsys.readouterr().out
    assert f"{written['requests']:,} requests" in printed
    assert "written:" in printed
    json.dumps([written, shown])


def test_synth_is_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        trace_synth("code", tmp_path / name, seed=5, duration_s=120.0, quiet=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace_synth("day", tmp_path / "t.csv", duration_s=60.0, quiet=True)
    trace_show(tmp_path / "t.csv", from_s=10.0, to_s=50.0, quiet=True)
    assert {row["name"] for row in trace_list(quiet=True)} >= {"azure-code-2023", "burstgpt-1"}
    assert capsys.readouterr().out == ""


def test_show_cuts_a_span(tmp_path: Path) -> None:
    trace_synth("conversation", tmp_path / "t.csv", duration_s=200.0, quiet=True)
    shown = trace_show(tmp_path / "t.csv", from_s=50.0, to_s=150.0, quiet=True)
    assert shown["duration_s"] == 100.0


def test_an_unknown_spec_or_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known are conversation, code, day"):
        trace_synth("night", tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="seed"):
        trace_synth("day", tmp_path / "t.csv", seed=-1)
