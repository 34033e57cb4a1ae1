from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlgov.calibration.table import ITERATIONS, POINTS, frame_of
from rlgov.characterize.measure import (
    RING_COLUMNS,
    Evidence,
    Place,
    Requests,
    closed_loop_sent_s,
    iteration_rows,
    point_row,
)
from rlgov.characterize.plan import Point, Task
from rlgov.characterize.steady import Span
from rlgov.records import Window

FIELDS: dict[str, float | None] = dict.fromkeys(Window.__dataclass_fields__, 0.0)
TASK = Task(Point("w", "l", "closed", 2, None, 1980, 8, 2), 1)
PLACE = Place("live", "m", "G", measured_clock=True)
NAN = float("nan")


def windows(n: int) -> list[Window]:
    base = Window(**FIELDS)  # type: ignore[arg-type]  # every field is a number
    return [
        replace(
            base, start_s=float(i), duration_s=1.0, output_tokens=30.0, prefill_tokens=10.0, running_mean=2.0,
            busy_fraction=0.5, kv_usage=0.25, measured_clock_mhz=1900.0, throttled_fraction=0.1,
        )
        for i in range(n)
    ]  # fmt: skip


def requests(*rows: tuple[float, float, float, float, float, bool]) -> Requests:
    sent_s, first_s, finish_s, prompt, output = np.array([row[:5] for row in rows], dtype=np.float64).T
    return Requests(sent_s, first_s, finish_s, prompt, output, np.array([row[5] for row in rows]))


# sent, first token, finish, prompt, output, failed; measured is 1..4
SOME = requests(
    (0.0, 0.5, 1.5, 100, 11, False),  # first token before, finish inside
    (1.0, 1.5, 3.5, 200, 21, False),
    (1.5, 2.5, 3.0, 300, 1, False),  # one token: no TPOT
    (2.0, NAN, 2.5, 50, 0, True),
    (3.5, 3.9, 5.0, 70, 5, False),  # finish after
    (3.6, NAN, NAN, 70, 5, False),  # never finished
)


def ring(*rows: tuple[float, float, float]) -> NDArray[np.float64]:
    """Rows of end, prompt tokens, decode tokens; the context is ten a sequence."""
    found = np.zeros((len(rows), len(RING_COLUMNS)))
    for at, (t_s, prefill, decode) in enumerate(rows):
        told = {"t_s": t_s, "step_s": 0.1, "prefill_tokens": prefill, "decode_tokens": decode}
        told |= {"context_tokens": 10 * decode + prefill}
        for name, value in told.items():
            found[at, RING_COLUMNS.index(name)] = value
    return found


def evidence(**changes: object) -> Evidence:
    base = Evidence(SOME, None, 300.0, 0.1 / 3, 2, frozenset({"power", "thermal"}))
    return replace(base, **changes)  # type: ignore[arg-type]  # of a test


def test_the_row_of_a_point() -> None:
    row = point_row(TASK, windows(6), Span(1, 4, steady=True), evidence(), PLACE)
    frame_of([row], POINTS, "row")  # every name is a column
    assert (row["requests"], row["served"], row["failed"]) == (4, 3, 1)
    assert row["prompt_tokens_mean"] == 200
    assert row["output_tokens_mean"] == 11
    assert row["ttft_p50_s"] == pytest.approx(0.5)  # of 0.5, 1.0 and 0.4: first tokens inside
    assert row["tpot_p50_s"] == pytest.approx(0.1)
    assert row["e2e_p50_s"] == pytest.approx(1.5)
    assert row["duration_s"] == 3.0
    assert row["output_tokens_per_s"] == 30.0
    assert (row["generated_tokens"], row["prefill_tokens"], row["busy_s"]) == (90.0, 30.0, 1.5)
    assert row["power_w_per_gpu"] == 50.0
    assert row["j_per_output_token"] == pytest.approx(300 / 90)
    assert row["j_per_request"] == 100.0
    assert row["energy_error"] == pytest.approx(0.1 / 3)
    assert row["throttle_reasons"] == "power+thermal"
    assert (row["steady"], row["repeat"], row["point_id"]) == (True, 1, TASK.point.point_id)
    assert "iterations" not in row
    assert "rate_per_s" not in row


def test_what_is_not_known_is_missing_and_never_zero() -> None:
    nothing = requests((0.0, NAN, NAN, 1, 1, False))
    dark = evidence(requests=nothing, energy_j=None, energy_error=None, throttle_reasons=frozenset())
    blind = replace(PLACE, measured_clock=False, gpu=None)
    row = point_row(TASK, windows(6), Span(1, 4, steady=False), dark, blind)
    absent = {
        "energy_j", "energy_error", "power_w_per_gpu", "j_per_output_token", "j_per_request", "gpu",
        "ttft_p50_s", "tpot_p99_s", "e2e_p90_s", "itl_p50_s", "prompt_tokens_mean", "measured_clock_mhz",
        "throttled_fraction", "throttle_reasons", "iterations", "context_tokens_mean",
    }  # fmt: skip
    assert absent.isdisjoint(row)
    assert (row["served"], row["failed"]) == (0, 0)
    assert frame_of([row], POINTS, "row")["energy_j"].isna().all()


def test_iterations_give_gaps_context_and_their_number() -> None:
    rows = ring((0.9, 0, 1), (1.5, 50, 2), (2.0, 0, 3), (2.5, 0, 3), (3.9, 0, 1), (4.5, 0, 1))
    row = point_row(TASK, windows(6), Span(1, 4, steady=True), evidence(iterations=rows), PLACE)
    assert row["iterations"] == 4
    assert row["context_tokens_mean"] == 10
    # Gaps of 0.6, 0.5, 0.5 and 1.4 s, one a sequence: two, three, three and one.
    assert row["itl_p50_s"] == pytest.approx(0.5)
    assert row["itl_p90_s"] == pytest.approx(1.4)
    told = list(iteration_rows(TASK, windows(6), Span(1, 4, steady=True), evidence(iterations=rows)))
    frame_of(told, ITERATIONS, "rows")
    assert [one["t_s"] for one in told] == pytest.approx([0.5, 1.0, 1.5, 2.9])
    lost = evidence(iterations=rows, iterations_dropped=3)
    assert "iterations" not in point_row(TASK, windows(6), Span(1, 4, steady=True), lost, PLACE)
    assert not list(iteration_rows(TASK, windows(6), Span(1, 4, steady=True), evidence()))


def test_blind_windows_add_no_zeros_to_means() -> None:
    seen = windows(6)
    seen[2] = replace(seen[2], blind=1.0, running_mean=0.0, output_tokens=0.0)
    row = point_row(TASK, seen, Span(1, 4, steady=False), evidence(), PLACE)
    assert row["running_mean"] == 2.0


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 6), st.lists(st.floats(0.1, 5.0), min_size=1, max_size=40))
def test_a_full_queue_is_a_closed_loop(users: int, service_s: list[float]) -> None:
    """Users that ask again at once, simulated by hand, send exactly when the full queue says they did."""
    free = [0.0] * users  # one server a user: nobody waits
    sent, finish = [], []
    for duration in service_s:
        at = min(range(users), key=free.__getitem__)
        sent.append(free[at])
        free[at] += duration
        finish.append(free[at])
    found = closed_loop_sent_s(np.array(finish), users)
    known = np.isfinite(found)
    assert np.array_equal(found[known], np.array(sent)[known])
    assert known.all()
