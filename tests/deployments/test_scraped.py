"""Windows from a metrics page alone: how near they come to the truth, and when they are blind."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlgov.deployments.scraped import ScrapedWindows
from rlgov.engine.samples import EngineSample, Histogram
from rlgov.engine.telemetry.scraper import Reading
from rlgov.errors import DeploymentError
from rlgov.hardware.meter import GpuReading, MeterReading
from rlgov.records import Column, ServiceLevel, Window
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.workload.synthesis import SPECS, synthesize
from tests.fakes.measurements import NO_METER, meter
from tests.fakes.measurements import sample as plain_sample

PROFILE = load_profile("h100-qwen3-32b")
LIMITS = PROFILE.limits()
TABLES = build_tables(PROFILE)
ASKED = LIMITS.fastest
FINE = (*np.geomspace(1e-3, 200.0, 400).tolist(), math.inf)
BOUNDS = (0.5, 1.0, 2.0, math.inf)
LEVEL = ServiceLevel(ttft_s=1.0, tpot_s=0.1)


def read(sample: EngineSample | None, *, blind: bool = False, failure: str = "") -> Reading:
    return Reading(sample, 0.0, blind, stalled=False, failures=0, failure=failure)


def histogram(values: NDArray[np.float64], bounds: tuple[float, ...]) -> Histogram:
    counts = tuple(np.searchsorted(np.sort(values), bounds, side="right").astype(float).tolist())
    return Histogram(bounds, counts, float(values.sum()), float(values.size))


def sample(
    at_s: float,
    *,
    ttft_s: tuple[float, ...] = (),
    tpot_s: tuple[float, ...] = (),
    waiting: int = 0,
    name: str = "e@1",
    **values: float,
) -> EngineSample:
    blank = plain_sample(at_s, name, **values)
    return replace(
        blank,
        source="metrics",
        waiting=waiting,
        busy_s=None,
        running_s=None,
        waiting_tokens=None,
        failed=float(values.get("failed", 0.0)),
        histograms={
            "ttft_s": histogram(np.array(ttft_s), BOUNDS),
            "tpot_s": histogram(np.array(tpot_s), (0.05, 0.1, 0.2, math.inf)),
            "token_gap_s": histogram(np.array([]), BOUNDS),
        },
    )


def begun(first: EngineSample | None, reading: MeterReading = NO_METER) -> ScrapedWindows:
    windows = ScrapedWindows()
    windows.start(read(first), 10.0, reading, LIMITS.with_service_level(LEVEL))
    return windows


def step(windows: ScrapedWindows, seen: EngineSample | None, at_s: float) -> Window:
    return windows.next(read(seen), at_s, NO_METER, ASKED)


# --------------------------------------------------------------------------- misses and the queue


def test_late_first_tokens_slow_finishes_and_failures_are_misses() -> None:
    windows = begun(sample(10.0))
    after = sample(
        11.0,
        ttft_s=(0.4, 1.5, 9.0),
        tpot_s=(0.04, 0.15),
        finished=2.0,
        failed=1.0,
        prompt_tokens=90.0,
    )
    window = step(windows, after, 11.0)
    assert window.misses == pytest.approx(2 + 1 + 1)
    assert (window.arrivals, window.served, window.prompt_tokens) == (3, 2, 90)
    assert (window.blind, window.energy_j, window.overdue) == (0, None, 0)
    assert window.ttft_p99_s == 2.0  # the last bound: it is at least that
    assert window.tpot_p50_s == pytest.approx(0.05)


def test_a_limit_within_a_bucket_gives_a_fraction() -> None:
    windows = begun(sample(10.0))
    loose = LIMITS.with_service_level(ServiceLevel(ttft_s=1.25, tpot_s=0.1))
    windows.start(read(sample(10.0)), 10.0, NO_METER, loose)
    window = step(windows, sample(11.0, ttft_s=(1.2,)), 11.0)
    assert window.misses == pytest.approx(0.75)


def test_who_waits_too_long_is_a_miss_when_the_limit_passes_and_not_again_at_the_first_token() -> None:
    windows = begun(sample(10.0))
    queued = step(windows, sample(10.5, waiting=2), 10.5)
    assert (queued.arrivals, queued.misses, queued.waiting) == (2, 0, 2)
    assert queued.oldest_wait_s == pytest.approx(0.25)  # they came within the last half second
    late = step(windows, sample(11.5, waiting=2), 11.5)
    assert (late.arrivals, late.misses, late.overdue) == (0, 2, 2)
    one = step(windows, sample(12.0, waiting=1, ttft_s=(1.75,)), 12.0)
    assert (one.misses, one.overdue) == (0, 1)
    done = step(windows, sample(12.5, ttft_s=(1.75, 2.25)), 12.5)
    assert (done.misses, done.overdue, done.oldest_wait_s, done.waiting) == (0, 0, 0, 0)


def test_requests_that_leave_the_queue_without_a_token_are_forgotten() -> None:
    windows = begun(sample(10.0, waiting=5))
    gone = step(windows, sample(11.0, waiting=0), 11.0)
    assert (gone.arrivals, gone.overdue, gone.misses) == (0, 0, 0)
    assert step(windows, sample(14.0, waiting=0), 14.0).overdue == 0


def test_a_preempted_request_that_waits_again_is_no_arrival() -> None:
    windows = begun(sample(10.0))
    window = step(windows, sample(11.0, waiting=1, preemptions=1.0), 11.0)
    assert (window.arrivals, window.preemptions, window.waiting) == (0, 1, 1)


def test_versions_without_a_tpot_histogram_use_the_gaps_between_tokens() -> None:
    def old(at_s: float, *gap_s: float, finished: float = 0.0) -> EngineSample:
        seen = sample(at_s, finished=finished)
        gaps = histogram(np.array(gap_s), (0.05, 0.1, 0.2, math.inf))
        return replace(
            seen, histograms={"ttft_s": seen.histograms["ttft_s"], "token_gap_s": gaps}, token_gaps=gaps.count
        )

    window = step(begun(old(10.0)), old(11.0, 0.04, 0.04, 0.04, 0.15, finished=8.0), 11.0)
    assert window.misses == pytest.approx(2.0)


# --------------------------------------------------------------------------- blind


def test_without_a_new_scrape_a_window_is_blind_and_nothing_is_lost() -> None:
    first, second = sample(10.0), sample(11.9, ttft_s=(0.4, 5.0), generated_tokens=20.0)
    windows = begun(first)
    same = step(windows, first, 11.0)
    assert (same.blind, same.arrivals) == (1, 0)
    assert "not newer" in windows.blind_because
    window = step(windows, second, 12.0)
    assert (window.blind, window.arrivals, window.output_tokens, window.misses) == (0, 2, 20, 1)
    assert (window.start_s, window.duration_s) == (1, 1)
    assert window.age_s == pytest.approx(0.1)


def test_a_blind_scraper_and_a_restart_are_blind() -> None:
    windows = begun(sample(10.0))
    window = windows.next(read(sample(10.5), blind=True, failure="refused"), 11.0, NO_METER, ASKED)
    assert (window.blind, windows.blind_because) == (1, "refused")
    restarted = sample(12.0, name="e@2", ttft_s=(0.1,) * 5)
    assert step(windows, restarted, 12.0).blind == 1
    assert "restarted" in windows.blind_because
    window = step(windows, sample(13.0, name="e@2", ttft_s=(0.1,) * 6), 13.0)
    assert (window.blind, window.arrivals) == (0, 1)


def test_an_episode_may_begin_before_anything_could_be_read() -> None:
    windows = begun(None)
    assert step(windows, None, 11.0).blind == 1
    assert step(windows, sample(12.0), 12.0).blind == 1
    assert step(windows, sample(13.0), 13.0).blind == 0


def test_a_meter_that_fails_leaves_the_counts_for_the_next_window() -> None:
    def gpu(energy_j: float | None) -> GpuReading:
        return GpuReading("g", energy_j, 300.0, 1500)

    windows = begun(sample(10.0), meter(10.0, gpu(100.0)))
    window = windows.next(read(sample(11.0, ttft_s=(5.0,))), 11.0, meter(11.0, gpu(None)), ASKED)
    assert (window.blind, window.misses, window.energy_j) == (1, 0, None)
    windows.next(read(None), 12.0, meter(12.0, gpu(200.0)), ASKED)
    window = windows.next(read(sample(13.0, ttft_s=(5.0, 0.1))), 13.0, meter(13.0, gpu(450.0)), ASKED)
    assert (window.blind, window.misses, window.arrivals, window.energy_j) == (0, 1, 2, 250)


def test_order_of_use() -> None:
    with pytest.raises(DeploymentError, match="call start"):
        step(ScrapedWindows(), None, 1.0)
    with pytest.raises(DeploymentError, match="cannot end"):
        step(begun(None), None, 10.0)


# --------------------------------------------------------------------------- against the simulator


@given(rate_per_s=st.floats(2.0, 16.0), seed=st.integers(0, 100), clock=st.integers(0, 9))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_over_an_episode_they_tell_the_simulators_story(rate_per_s: float, seed: int, clock: int) -> None:
    spec = replace(SPECS["conversation"], rate_per_s=rate_per_s, duration_s=40.0)
    trace = synthesize(spec, np.random.default_rng(seed))
    level = LIMITS.service_level
    batch = SimulationBatch(LIMITS, 1, TABLES)
    batch.load(0, trace, TABLES, level, (clock, 0, 0))
    windows = ScrapedWindows()
    rows, ours = [], []
    gaps = gap_s = generated = 0.0
    windows.start(read(page(batch, 0.0, 0, 0, 0.0, 0.0, 0.0)), 0.0, NO_METER, LIMITS)
    for _ in range(60):
        row = batch.advance_only(0, (clock, 0, 0)).copy()
        at_s = float(batch.now_s[0])
        first_tokens = np.sum(batch.request_log(0).first_token_s <= at_s)
        generated += row[Column.OUTPUT_TOKENS]
        if not np.isnan(row[Column.ITL_MEAN_S]):
            decoded = row[Column.OUTPUT_TOKENS]
            gaps += decoded
            gap_s += decoded * row[Column.ITL_MEAN_S]
        running, waiting = int(row[Column.RUNNING]), int(row[Column.WAITING])
        seen = page(batch, at_s, running, waiting, generated, gaps, gap_s)
        assert seen.histograms["ttft_s"].count == first_tokens
        rows.append(row)
        ours.append(windows.next(read(seen), at_s, NO_METER, ASKED).to_row())
    theirs, mine = np.array(rows), np.array(ours)

    def totals(column: Column) -> tuple[float, float]:
        return float(mine[:, column].sum()), float(theirs[:, column].sum())

    for column in (Column.SERVED, Column.OUTPUT_TOKENS):
        assert totals(column)[0] == totals(column)[1]
    np.testing.assert_array_equal(mine[:, Column.RUNNING], theirs[:, Column.RUNNING])
    np.testing.assert_array_equal(mine[:, Column.WAITING], theirs[:, Column.WAITING])
    told, true = totals(Column.ARRIVALS)
    in_prefill = LIMITS.batch_caps[0]
    assert true - in_prefill <= told <= true
    told, true = totals(Column.MISSES)
    assert told >= true * 0.97 - 2  # a bucket's width of doubt, and prompts that are under way at the end
    log = batch.request_log(0)
    twice = np.sum((log.ttft_s > level.ttft_s) & (log.tpot_s > level.tpot_s))
    assert told <= true * 1.03 + 2 + twice
    assert np.abs(mine[:, Column.OVERDUE] - theirs[:, Column.OVERDUE]).max() <= max(8, 2 * rate_per_s)
    wait = np.abs(mine[:, Column.OLDEST_WAIT_S] - theirs[:, Column.OLDEST_WAIT_S])
    assert np.median(wait) <= LIMITS.interval_s


def page(
    batch: SimulationBatch,
    at_s: float,
    running: int,
    waiting: int,
    generated: float,
    gaps: float,
    gap_s: float,
) -> EngineSample:
    log = batch.request_log(0)
    begun_ = log.first_token_s <= at_s
    done = log.finish_s <= at_s
    blank = plain_sample(
        at_s, "e@1", running=running, generated_tokens=generated, token_gaps=gaps, token_gap_s=gap_s
    )
    return replace(
        blank,
        source="metrics",
        waiting=waiting,
        finished=float(done.sum()),
        failed=0.0,
        prompt_tokens=float(log.prompt_tokens[begun_].sum()),
        busy_s=None,
        running_s=None,
        waiting_tokens=None,
        histograms={
            "ttft_s": histogram(log.ttft_s[begun_], FINE),
            "tpot_s": histogram(np.nan_to_num(log.tpot_s[done]), FINE),
            "token_gap_s": Histogram(FINE, (gaps,) * len(FINE), gap_s, gaps),
        },
    )
