from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from rlgov.errors import CalibrationError
from rlgov.simulation.physics import build_tables, iteration_time_s
from tests.fakes.tiny_model import Shape
from tests.fidelity import __main__ as command
from tests.fidelity.analyse import analyse, calibrate, rates_per_s
from tests.fidelity.compare import Comparison, Latencies, compare, distance, judge
from tests.fidelity.fit import IterationFit, fit_iterations
from tests.fidelity.iterations import Floats, Iterations, read_iterations
from tests.fidelity.machine import Usage
from tests.fidelity.measured import CellRun, Disturbance, HoldRun, Measured, Request, frontends
from tests.fidelity.plan import Plan
from tests.fidelity.profile import cpu_profile
from tests.fidelity.report import write_report
from tests.fidelity.simulate import Frontend, simulate

SHAPE = Shape(hidden=64, layers=4, heads=2, kv_heads=2, intermediate=128)
PLAN = Plan(batch_caps=(8, 4, 2), duration_s=20.0, repeats=2)
TRUTH = IterationFit(
    batches=(1, 2, 4, 8),
    alone_s=(0.0066, 0.0070, 0.0078, 0.0100),
    context_tokens=(100.0, 100.0, 100.0, 100.0),
    context_s=1e-6,
    prompts_s=1.5e-3,
    prompt_s=1.2e-4,
    pair_s=8e-8,
    base_s=0.0061,
    sequence_s=0.00048,
    rows=1,
    stalled=0,
    error=0.0,
    bias=0.0,
)
OUTSIDE = Frontend(before_s=0.002, first_s=0.001, last_s=0.0015)
CALM = Disturbance(0.0, 1.0, 0.0)


def _hold(concurrency: int, rounds: int = 40) -> HoldRun:
    """What a closed loop gives where :data:`TRUTH` is true; its users go in step."""
    rng = np.random.default_rng(concurrency)
    now_s = 100.0
    rows: list[tuple[float, ...]] = []
    answered: list[Request] = []
    for _ in range(rounds):
        prompts = rng.integers(8, 401, concurrency).tolist()
        output = int(rng.integers(4, 60))
        due_s, now_s, first_s = now_s, now_s + OUTSIDE.before_s, 0.0
        left, done = list(prompts), 0
        while left or output > 1:
            prefill, pairs, earlier = 0, 0.0, 0.0
            while left and prefill < PLAN.max_num_batched_tokens:
                tokens = min(left[0] - done, PLAN.max_num_batched_tokens - prefill)
                pairs += tokens * done + tokens * (tokens + 1) / 2
                earlier += done
                prefill, done = prefill + tokens, done + tokens
                if done == left[0]:
                    left, done = left[1:], 0
            # Nobody decodes before all prompts are done: simpler than vLLM, and enough here.
            decodes = 0 if prefill else concurrency
            context = 0 if prefill else sum(prompts) + concurrency * 10
            known = _iteration(decodes, context, prefill, pairs)
            step_s = float(TRUTH.predict_s(known)[0]) * float(rng.normal(1.0, 0.01))
            now_s += step_s
            total = context + decodes + prefill + earlier
            rows.append((now_s, step_s, concurrency, 0, prefill, decodes, total))
            if prefill:
                first_s = now_s
            else:
                output -= 1
        end_s = now_s + OUTSIDE.last_s
        answered += [Request(due_s, first_s + OUTSIDE.first_s, end_s, prompt, 30) for prompt in prompts]
        now_s = end_s + 0.01
    return HoldRun(concurrency, rows, answered, CALM)


def _iteration(decodes: float, context: float, prefill: float, pairs: float) -> Iterations:
    return Iterations(*(np.array([float(v)]) for v in (0, 0, 0, decodes, prefill, context, pairs)))


def _measured(*, slower: float = 1.0) -> Measured:
    """A whole measurement in which the engine is the simulator, its cells ``slower`` than its calibration."""
    holds = [_hold(concurrency) for concurrency in PLAN.concurrencies()]
    machine = {"processor": "none", "cores": "0", "apart": "", "load at the beginning": "0"}
    measured = Measured(machine, PLAN, asdict(SHAPE), 50_000, holds, [])
    profile = cpu_profile(TRUTH, SHAPE, PLAN, 50_000)
    for number, place in enumerate(rates_per_s(calibrate(measured), PLAN)):
        trace = PLAN.trace(place[2], number)
        truth = simulate(profile, trace, place[0], OUTSIDE)
        answered = [
            Request(1000.0 + a, 1000.0 + a + slower * t, 1000.0 + a + slower * e, int(p), int(o))
            for a, t, e, p, o in zip(trace.arrival_s, truth.ttft_s, truth.e2e_s, trace.prompt_tokens,
                                     trace.output_tokens, strict=True)
        ]  # fmt: skip
        measured.cells.extend(
            CellRun(*place, repeat, answered, 0.5, 1, CALM) for repeat in range(PLAN.repeats)
        )
    return measured


@pytest.fixture(scope="module")
def measured() -> Measured:
    return _measured()


# Iterations ----------------------------------------------------------------------------------------


def _rows(*rows: tuple[float, ...]) -> Floats:
    return np.array(rows, dtype=np.float64)


def test_the_time_between_two_iterations_counts_unless_there_was_nothing_to_do() -> None:
    rows = _rows(
        (1.010, 0.010, 1, 0, 0, 1, 21),
        (1.0205, 0.010, 1, 0, 0, 1, 22),
        (1.031, 0.010, 1, 0, 0, 1, 23),
        (5.000, 0.010, 1, 0, 0, 1, 24),
    )

    found = read_iterations(rows)

    np.testing.assert_allclose(found.wall_s[1:3], 0.0105)
    assert found.wall_s[3] == pytest.approx(0.010, abs=0.0011)
    np.testing.assert_allclose(found.context_tokens, [20, 21, 22, 23])


def test_prompts_are_found_again_in_the_order_in_which_they_were_sent() -> None:
    rows = _rows(
        (1.0, 0.1, 2, 0, 70, 0, 70),  # 30 and 40
        (1.1, 0.1, 3, 0, 98, 2, 98 + 72),  # the first 98 of 120: with two decodes that is the limit
        (1.2, 0.1, 4, 0, 72, 2, 120 + 50 + 74),  # the rest, and 50
        (1.3, 0.1, 4, 0, 0, 4, 72 + 4 + 170),
    )

    found = read_iterations(rows, prompts=[30, 40, 120, 50], budget_tokens=100)

    np.testing.assert_allclose(found.pairs, [465 + 820, 98 * 99 / 2, 22 * 98 + 22 * 23 / 2 + 1275, 0])
    np.testing.assert_allclose(found.context_tokens, [0, 70, 72, 242])


def test_requests_that_overtook_each_other_are_found_too() -> None:
    rows = _rows((1.0, 0.1, 1, 0, 40, 0, 40), (1.1, 0.1, 3, 0, 50, 1, 91), (1.2, 0.1, 3, 0, 9, 3, 103))

    found = read_iterations(rows, prompts=[30, 40, 20, 9], budget_tokens=100)

    np.testing.assert_allclose(found.pairs, [820, 465 + 210, 45])


def test_prompts_that_were_never_sent_make_the_rest_unknown() -> None:
    rows = _rows((1.0, 0.1, 1, 0, 41, 0, 41), (1.1, 0.1, 1, 0, 30, 0, 30), (1.2, 0.1, 1, 0, 0, 1, 31))

    found = read_iterations(rows, prompts=[30, 40], budget_tokens=100)

    np.testing.assert_allclose(found.pairs, [np.nan, np.nan, 0])
    np.testing.assert_allclose(found.context_tokens, [np.nan, np.nan, 30])


# Fit -----------------------------------------------------------------------------------------------


def test_the_fit_finds_what_made_the_iterations(measured: Measured) -> None:
    fit = calibrate(measured).fit

    assert dict(zip(fit.batches, fit.alone_s, strict=True))[8] == pytest.approx(0.0100, rel=0.02)
    assert fit.context_s == pytest.approx(TRUTH.context_s, rel=0.1)
    assert fit.prompts_s == pytest.approx(TRUTH.prompts_s, rel=0.15)
    assert fit.prompt_s == pytest.approx(TRUTH.prompt_s, rel=0.02)
    assert fit.pair_s == pytest.approx(TRUTH.pair_s, rel=0.1)
    assert fit.error < 0.02


def test_stalled_iterations_do_not_move_the_fit(measured: Measured) -> None:
    rows = Iterations.joined([run.iterations(PLAN) for run in measured.holds])
    late = np.random.default_rng(1).random(len(rows)) < 0.02
    rows.wall_s[late] += 0.2

    fit = fit_iterations(rows)

    assert fit.stalled > 0.9 * late.sum()
    assert fit.alone_s[0] == pytest.approx(TRUTH.alone_s[0], rel=0.02)


def test_too_little_to_fit_is_said(measured: Measured) -> None:
    lone = [run.iterations(PLAN) for run in measured.holds if run.concurrency == 1]

    with pytest.raises(CalibrationError, match="1 batch sizes"):
        fit_iterations(Iterations.joined(lone))


@pytest.mark.parametrize("work", [(1, 50, 0, 0), (3, 500, 0, 0), (8, 900, 120, 7260), (0, 0, 300, 45150)])
def test_the_simulator_takes_the_fitted_time_for_an_iteration(work: tuple[int, int, int, int]) -> None:
    tables = build_tables(cpu_profile(TRUTH, SHAPE, PLAN, 50_000))
    decodes, context, prefill, pairs = work
    rows = _iteration(decodes, context, prefill, pairs)

    assert iteration_time_s(tables, 0, 0, *work) == pytest.approx(float(TRUTH.predict_s(rows)[0]), rel=1e-9)


def test_the_profile_has_the_engines_room() -> None:
    profile = cpu_profile(TRUTH, SHAPE, PLAN, 50_000)

    assert profile.limits().kv_capacity_tokens == (50_000,)
    assert profile.limits().batch_caps == (8, 4, 2)


def test_the_time_outside_the_engine_is_found(measured: Measured) -> None:
    lone = measured.holds[0]

    np.testing.assert_allclose(
        np.median(frontends(lone, PLAN), axis=0),
        [OUTSIDE.before_s, OUTSIDE.first_s, OUTSIDE.last_s],
        atol=1e-6,
    )


# Comparison ----------------------------------------------------------------------------------------


def test_an_engine_that_is_the_simulator_is_met(measured: Measured) -> None:
    analysis = analyse(measured)

    assert len(analysis.cells) == 9
    assert {(v.metric, v.percent) for v in analysis.verdicts} == {
        (m, q) for m in ("ttft", "tpot", "e2e") for q in (50, 99)
    }
    assert all(v.met for v in analysis.verdicts), analysis.verdicts


def test_an_engine_that_got_slower_after_its_calibration_is_missed() -> None:
    verdicts = analyse(_measured(slower=1.25)).verdicts

    assert not any(v.met for v in verdicts)
    assert all(v.median_error == pytest.approx(0.2, abs=0.03) for v in verdicts)


def test_the_measurement_survives_its_file(measured: Measured, tmp_path: Path) -> None:
    measured.write(tmp_path / "measured.json")

    assert Measured.read(tmp_path / "measured.json") == measured


def test_the_report_holds_every_cell(measured: Measured, tmp_path: Path) -> None:
    paths = {path.name: path for path in write_report(measured, analyse(measured), tmp_path)}

    assert len(paths["cells.csv"].read_text(encoding="utf-8").splitlines()) == 1 + 9 * 6
    assert paths["fidelity.png"].stat().st_size > 10_000
    table = paths["fidelity.md"].read_text(encoding="utf-8")
    assert "cap" in table
    assert "bar" in table


def _latencies(scale: float) -> Latencies:
    values = scale * np.arange(1.0, 102.0)
    return Latencies(values, values, values)


def test_the_error_is_relative_to_the_median_repeat() -> None:
    found = compare((8, 0.5, 3.0), [_latencies(1.0), _latencies(1.1), _latencies(3.0)], _latencies(0.99))

    assert all(c.measured_s == pytest.approx(1.1 * (51 if c.percent == 50 else 100)) for c in found)
    assert all(c.error == pytest.approx(-0.1) for c in found)
    assert all(c.spread == pytest.approx(3.0 / 1.1 - 1) for c in found)


def test_a_verdict_is_the_median_of_the_absolute_errors() -> None:
    def cell(simulated_s: float) -> Comparison:
        return Comparison(8, 0.5, 3.0, 10, "ttft", 50, 1.0, simulated_s, 0.0)

    (verdict,) = judge([cell(0.96), cell(1.04), cell(2.0)])

    assert verdict.median_error == pytest.approx(0.04)
    assert verdict.largest_error == pytest.approx(1.0)
    assert verdict.met


def test_distance_of_distributions() -> None:
    one = np.arange(100.0)

    assert distance(one, one) == 0.0
    assert distance(one, one + 1000) == 1.0
    assert distance(one, one + 25) == pytest.approx(0.25)


def test_calibration_and_comparison_draw_different_traffic() -> None:
    first, second = PLAN.trace(5.0, 0), PLAN.trace(5.0, 1)

    assert not np.array_equal(first.prompt_tokens[:20], second.prompt_tokens[:20])
    assert PLAN.trace(5.0, 0).arrival_s.tolist() == first.arrival_s.tolist()
    assert not np.array_equal(first.prompt_tokens[:20], PLAN.calibration(1).prompt_tokens[:20])


# Machine and command -------------------------------------------------------------------------------


def test_what_others_use_is_what_is_not_ours() -> None:
    assert Usage(110.0, 57.0, 12.0).others_since(Usage(100.0, 50.0, 2.0)) == pytest.approx(0.3)
    assert Usage(101.0, 60.0, 12.0).others_since(Usage(100.0, 50.0, 2.0)) == 0.0


@pytest.mark.parametrize(
    ("disturbance", "word"),
    [(Disturbance(0.5, 1.0, 0.0), "other programs"), (Disturbance(0.0, 1.2, 0.0), "lone decode"),
     (Disturbance(0.0, 1.0, 0.1), "late")],
)  # fmt: skip
def test_a_disturbed_run_says_why(disturbance: Disturbance, word: str) -> None:
    assert word in disturbance.reasons()[0]
    assert not CALM.reasons()


def test_without_vllm_the_command_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fidelity", "--out", str(tmp_path), "--vllm", str(tmp_path / "none")])

    assert command.main() == 2
    assert "make vllm" in capsys.readouterr().err


def test_check_fails_on_a_missed_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _measured(slower=1.25).write(tmp_path / "measured.json")
    monkeypatch.setattr(sys, "argv", ["fidelity", "--out", str(tmp_path), "--again"])
    assert command.main() == 0

    monkeypatch.setattr(sys, "argv", ["fidelity", "--out", str(tmp_path), "--again", "--check"])
    assert command.main() == 1
