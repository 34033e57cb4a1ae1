"""The report of small tables whose answers are known."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.calibration.table import POINTS, SCHEMA, RunHeader, frame_of, write_header, write_points
from rlgov.characterize.drawing import Drawing, Gap
from rlgov.characterize.figures import batches_figure, clocks_figure, parallel_figure
from rlgov.characterize.findings import best_configurations, clock_pair, front, rank_correlations, variety
from rlgov.characterize.fronts import fronts_figure, pair_figure
from rlgov.characterize.matrices import best_figure, correlation_finding, correlations_figure
from rlgov.characterize.page import MISSING, significant
from rlgov.characterize.report import write_characterization_report
from rlgov.characterize.tables import Results, results_of
from rlgov.errors import CharacterizationError

CLOCKS = (1980, 1530, 1080)
CAPS = (64, 16)
DEGREES = (4, 1)
WORKLOADS = ("short-in/short-out", "long-in/long-out")
SLO_S = 0.04


def header(**changes: Any) -> RunHeader:
    known: dict[str, Any] = {
        "schema": SCHEMA,
        "rlgov_version": "0",
        "deployment": "live",
        "profile": "",
        "model": "M <7B> & sons",
        "gpu": "GPU",
        "seed": 0,
        "points": 1,
        "digest": "0" * 12,
        "settings": {"out": "/somewhere/private", "repeats": 1},
        "limits": {"service_level": {"ttft_s": 1.0, "tpot_s": SLO_S}, "tdp_w": 700.0},
        "versions": {"python": "3"},
        "notes": (),
    }
    return RunHeader(**(known | changes))


def point(
    clock: int | None, cap: int, degree: int, workload: str, repeat: int = 0, rate: float | None = None
) -> dict[str, Any]:
    """A point of simple physics: a time a step that falls with clock and GPUs, power that grows with both."""
    x = (clock or CLOCKS[0]) / CLOCKS[0]
    heavy = 2.0 if workload.startswith("long") else 1.0
    step_s = heavy * (0.010 + 0.0002 * cap / x) / degree**0.7
    tokens_per_s = cap / step_s
    power_w = 100.0 + 500.0 * x**3
    wobble = 1.0 + 0.01 * repeat
    energy = power_w * degree / tokens_per_s * wobble
    load = f"{cap} users" if rate is None else f"{rate}/s"
    return {
        "point_id": f"{workload} {load} {clock} {cap} {degree}",
        "repeat": repeat,
        "workload": workload,
        "mode": "closed" if rate is None else "open",
        "concurrency": cap if rate is None else None,
        "rate_per_s": rate,
        "sm_clock_mhz": clock,
        "batch_cap": cap,
        "tp_degree": degree,
        "allotted_gpus": degree,
        "duration_s": 60.0,
        "steady": True,
        "served": 100,
        "failed": 0,
        **{f"ttft_p{q}_s": 0.1 * heavy / x for q in (50, 90, 99)},
        **{f"tpot_p{q}_s": step_s for q in (50, 90, 99)},
        **{f"e2e_p{q}_s": 100 * step_s for q in (50, 90, 99)},
        "output_tokens_per_s": tokens_per_s,
        "power_w_per_gpu": power_w * wobble,
        "energy_j": 60.0 * power_w * degree,
        "energy_error": 0.02,
        "j_per_output_token": energy,
        "j_per_request": 64 * energy,
        "running_mean": float(cap),
        "model": "M",
        "gpu": "GPU",
        "source": "live",
    }


def grid(
    clocks: tuple[int | None, ...] = CLOCKS,
    caps: tuple[int, ...] = CAPS,
    degrees: tuple[int, ...] = DEGREES,
    workloads: tuple[str, ...] = WORKLOADS,
    repeats: int = 2,
) -> list[dict[str, Any]]:
    return [
        point(clock, cap, degree, workload, repeat)
        for workload in workloads
        for degree in degrees
        for cap in caps
        for clock in clocks
        for repeat in range(repeats)
    ]


def results(rows: list[dict[str, Any]], **changes: Any) -> Results:
    told = header(**({"points": len(rows)} | changes))
    return results_of(told, frame_of(rows, POINTS, "test"))


def run_folder(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    write_header(folder, header(**({"points": len(rows)} | changes)))
    write_points(folder, frame_of(rows, POINTS, "test"))
    return folder


class Page(HTMLParser):
    """What is on a page: text, images, ids, links, and whether every element is closed."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.external: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(told)
        if told.get("id"):
            self.ids.append(str(told["id"]))
        for name in ("src", "href"):
            value = told.get(name)
            if value and value.startswith("#"):
                self.links.append(value[1:])
            elif value and not value.startswith("data:"):
                self.external.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_page_holds_every_figure_and_needs_nothing_else(tmp_path: Path) -> None:
    files = write_characterization_report(run_folder(tmp_path, grid()))

    assert files[0] == tmp_path / "report.html"
    text = files[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.external == []
    assert set(page.links) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    figures = files[1:]
    assert sorted(figures) == sorted((tmp_path / "figures").iterdir())
    assert len(figures) == 3 * len(WORKLOADS) + 4
    shown = {base64.b64decode(str(image["src"]).partition(",")[2]) for image in page.images}
    assert shown == {path.read_bytes() for path in figures}
    assert {path.stem for path in figures} <= set(page.ids)
    assert all(image["alt"] for image in page.images)
    assert "M &lt;7B&gt; &amp; sons" in text  # a name cannot become markup
    assert "/somewhere/private" not in text


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    write_characterization_report(run_folder(tmp_path, poor()))
    files = write_characterization_report(run_folder(tmp_path, poor(clocks=(1980,))))

    assert sorted(files[1:]) == sorted((tmp_path / "figures").iterdir())


def test_two_reports_of_one_run_are_equal(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, poor(degrees=(1,)))
    first = write_characterization_report(folder)[0].read_bytes()

    assert write_characterization_report(folder)[0].read_bytes() == first


def test_only_a_simulated_run_says_simulated(tmp_path: Path) -> None:
    rows = grid(repeats=1)
    simulated = [row | {"source": "simulated"} for row in rows]
    page = write_characterization_report(
        run_folder(tmp_path, simulated, deployment="simulated", profile="p")
    )[0].read_text(encoding="utf-8")
    assert "SIMULATED, not measured: profile p" in page

    for drawing in every_drawing(results(simulated, deployment="simulated", profile="p")):
        assert isinstance(drawing, Drawing)
        assert any("SIMULATED" in text.get_text() for text in drawing.figure.texts), drawing.name
    for drawing in every_drawing(results(rows)):
        assert isinstance(drawing, Drawing)
        assert not any("SIMULATED" in text.get_text() for text in drawing.figure.texts), drawing.name


def every_drawing(told: Results) -> list[Drawing | Gap]:
    best = best_configurations(told)
    return [
        *(draw(told, told.workloads[0]) for draw in (clocks_figure, batches_figure, parallel_figure)),
        fronts_figure(told),
        best_figure(told, best, variety(told, best)),
        correlations_figure(told, rank_correlations(told)),
        pair_figure(told, clock_pair(told)),
    ]


def test_repeats_are_merged_with_their_spread() -> None:
    told = results(grid(repeats=3))

    rows = told.rows[told.rows["point_id"] == told.points["point_id"].iloc[0]]
    merged = told.points.iloc[0]
    energy = rows["j_per_output_token"]
    assert merged["j_per_output_token"] == pytest.approx(energy.mean())
    assert merged["j_per_output_token_error"] == pytest.approx(np.hypot(energy.std(), 0.02 * energy.mean()))
    assert merged["tpot_p99_s_error"] == pytest.approx(0.0)
    assert merged["power_w"] == pytest.approx(4 * rows["power_w_per_gpu"].mean())


def test_one_repeat_of_a_meter_without_error_has_no_known_error() -> None:
    told = results([row | {"energy_error": 0.0} for row in grid(repeats=1)])

    assert told.points["j_per_output_token_error"].isna().all()
    assert any("measured once" in line for line in told.missing())


def test_the_best_configuration_is_recomputed_by_hand() -> None:
    told = results(grid())
    best = best_configurations(told)

    assert len(best) == len(WORKLOADS) * len(CAPS)
    for _, row in best.iterrows():
        cap, workload = int(row["concurrency"]), str(row["workload"])
        energy = {
            (clock, degree): np.mean(
                [point(clock, cap, degree, workload, r)["j_per_output_token"] for r in (0, 1)]
            )
            for clock in CLOCKS
            for degree in DEGREES
        }
        holding = {
            key: value
            for key, value in energy.items()
            if point(key[0], cap, key[1], workload)["tpot_p99_s"] <= SLO_S
        }
        least = min(holding, key=lambda key: holding[key])
        assert (row["sm_clock_mhz"], row["tp_degree"]) == least
        assert row["j_per_output_token"] == pytest.approx(holding[least])
        assert row["holding"] == len(holding)
        assert row["highest"] == pytest.approx(energy[1980, 4] / holding[least])
    assert (best["holding"] < len(CLOCKS) * len(DEGREES)).any()  # the SLO does decide something


def test_the_table_on_the_page_says_what_was_computed(tmp_path: Path) -> None:
    rows = grid()
    page = Page(write_characterization_report(run_folder(tmp_path, rows))[0].read_text(encoding="utf-8"))

    for value in best_configurations(results(rows))["j_per_output_token"]:
        assert significant(value, 4) in page.cells
    for row in rows[::2]:
        assert significant(row["output_tokens_per_s"]) in page.cells


def test_a_point_that_breaks_the_slo_fails_requests_or_wavers_is_never_the_best() -> None:
    fine = point(1980, 16, 4, WORKLOADS[0])
    late: tuple[dict[str, Any], ...] = ({"tpot_p99_s": 0.06}, {"ttft_p99_s": 1.1}, {"ttft_p99_s": None})
    changes = (*late, {"failed": 2}, {"steady": False})
    cheap = [point(1530, 16, 4, WORKLOADS[0]) | {"j_per_output_token": 1e-3} | change for change in changes]
    rows = [fine] + [row | {"point_id": str(i)} for i, row in enumerate(cheap)]
    best = best_configurations(results(rows))

    assert list(best["sm_clock_mhz"]) == [1980.0]
    assert list(best["holding"]) == [1]
    assert list(best["measured"]) == [5]  # the one that is not steady is not usable at all


def test_what_differs_only_in_chance_is_equally_good() -> None:
    rows = []
    for clock, factors in ((1980, (1.0, 1.0)), (1530, (1.10, 0.95)), (1080, (1.10, 1.11))):
        rows += [
            point(clock, 16, 4, WORKLOADS[0], r) | {"j_per_output_token": factor, "energy_error": 0.0}
            for r, factor in enumerate(factors)
        ]
    best = best_configurations(results(rows))

    assert list(best["sm_clock_mhz"]) == [1980.0]
    assert list(best["as_good"]) == [1]


def test_one_setting_for_all_is_told_with_its_price() -> None:
    rows = [
        point(clock, 16, 4, workload) | {"j_per_output_token": energy}
        for workload, energies in zip(WORKLOADS, ((1.0, 1.5), (3.0, 2.0)), strict=True)
        for clock, energy in zip((1980, 1080), energies, strict=True)
    ]
    told = results(rows)
    found = variety(told, best_configurations(told))

    assert found is not None
    assert (found.cases, found.distinct) == (2, 2)
    assert found.one_for_all is not None
    assert found.one_for_all.label == "1980 MHz, TP 4"
    assert found.one_for_all.median_excess == pytest.approx(0.25)
    assert found.one_for_all.worst_excess == pytest.approx(0.5)


def test_rank_correlations_are_one_where_orders_agree_and_minus_one_where_they_are_opposed() -> None:
    rows = [
        point(clock, 16, 1, WORKLOADS[0])
        | {
            "j_per_output_token": 1.0 + i,
            "power_w_per_gpu": 100.0 * 2**i,
            "output_tokens_per_s": 1000.0 - 100 * i,
            "ttft_p99_s": 0.5,
        }
        for i, clock in enumerate((1980, 1530, 1080, 600))
    ]
    table = rank_correlations(results(rows))

    assert table["power_w"].iloc[0] == pytest.approx(1.0)
    assert table["output_tokens_per_s"].iloc[0] == pytest.approx(-1.0)
    assert np.isnan(table["ttft_p99_s"].iloc[0])  # it does not vary
    told = correlation_finding(table)
    assert "follows power of all GPUs (+1.00)" in told
    assert "opposes throughput (-1.00)" in told


def test_in_an_open_loop_the_load_sets_throughput_and_cost() -> None:
    rows = [point(clock, 64, degree, WORKLOADS[0], rate=2.0) for clock in CLOCKS for degree in DEGREES]
    table = rank_correlations(results(rows))

    assert table[["output_tokens_per_s", "gpu_s_per_token"]].isna().all(axis=None)
    assert table["power_w"].notna().all()


def test_the_pair_of_clocks_is_compared_repeat_by_repeat() -> None:
    pair = clock_pair(results(grid(repeats=2)))

    assert pair is not None
    assert (pair.low_mhz, pair.high_mhz, pair.as_published) == (1530.0, 1980.0, True)
    assert len(pair.table) == len(WORKLOADS) * len(CAPS) * len(DEGREES)
    row = pair.table[(pair.table["level"] == 16) & (pair.table["tp_degree"] == 4)].iloc[0]
    low, high = (point(clock, 16, 4, row["workload"]) for clock in (1530, 1980))
    assert row["energy"] == pytest.approx(low["j_per_output_token"] / high["j_per_output_token"])
    assert row["throughput"] == pytest.approx(low["output_tokens_per_s"] / high["output_tokens_per_s"])
    assert row["energy_error"] == pytest.approx(0.0, abs=1e-12)  # both repeats wobble alike


def test_without_the_published_clocks_others_in_their_ratio_are_named() -> None:
    told = results(grid(clocks=(1410, 1110, 810)))
    pair = clock_pair(told)

    assert pair is not None
    assert (pair.low_mhz, pair.high_mhz, pair.as_published) == (1110.0, 1410.0, False)
    drawn = pair_figure(told, pair)
    assert isinstance(drawn, Drawing)
    assert "Those clocks were not measured" in drawn.caption
    assert drawn.title.startswith("1110 MHz instead of 1410 MHz")


def test_titles_hold_numbers_of_the_data() -> None:
    told = results(grid(workloads=WORKLOADS[:1], repeats=1))

    drawn = clocks_figure(told, WORKLOADS[0])
    assert isinstance(drawn, Drawing)
    saved = []
    for cap in CAPS:
        for degree in DEGREES:
            energy = [point(c, cap, degree, WORKLOADS[0])["j_per_output_token"] for c in CLOCKS]
            saved.append(100 * (1 - min(energy) / energy[0]))
    assert f"{min(saved):.0f} to {max(saved):.0f} % below that at 1980 MHz" in drawn.title
    many, few = (point(1980, cap, 4, WORKLOADS[0]) for cap in CAPS)
    drawn = batches_figure(told, WORKLOADS[0])
    ratio = many["output_tokens_per_s"] / few["output_tokens_per_s"]
    assert isinstance(drawn, Drawing)
    assert f"from batch size 16 to 64, TP 4 gives {ratio:.1f} times the tokens/s" in drawn.title
    drawn = parallel_figure(told, WORKLOADS[0])
    one, four = (point(1980, 64, degree, WORKLOADS[0])["j_per_output_token"] for degree in (1, 4))
    assert isinstance(drawn, Drawing)
    assert f"TP 4 against TP 1 at batch size 64: {four / one:.2f} times the energy" in drawn.title


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [row | dict.fromkeys(names) for row in rows]


ENERGY = ("energy_j", "energy_error", "j_per_output_token", "j_per_request", "power_w_per_gpu")
LATENCY = tuple(f"{name}_p{q}_s" for name in ("ttft", "tpot", "e2e") for q in (50, 90, 99))


def poor(**changes: Any) -> list[dict[str, Any]]:
    return grid(**({"workloads": WORKLOADS[:1]} | changes))


POOR: dict[str, tuple[list[dict[str, Any]], str]] = {
    "one clock": (poor(clocks=(1980,)), "One SM clock only (1980)"),
    "one TP degree": (poor(degrees=(1,)), "One TP degree only (1)"),
    "one cap": (poor(caps=(16,)), "One load only (16)"),
    "no clocks": (poor(clocks=(None,)), "Not measured: a locked SM clock"),
    "no energy": (without(poor(), *ENERGY), "Not measured: energy."),
    "no latency": (without(poor(), *LATENCY), "Not measured: time per output token."),
    "nothing": (
        without(
            poor(repeats=1), *ENERGY, *LATENCY, "output_tokens_per_s", "running_mean", "served", "failed"
        ),
        "12 of 12 rows have no throughput",
    ),
    "a single point": ([point(1980, 16, 1, WORKLOADS[0])], "Every point was measured once"),
    "one row of nothing among others": (
        poor(repeats=1)[1:] + without([point(1980, 64, 4, WORKLOADS[0], 1)], *ENERGY, "output_tokens_per_s"),
        "1 of 12 rows have no throughput",
    ),
    "not steady": ([row | {"steady": False} for row in poor()], "taken all the same"),
    "nothing holds the SLO": ([row | {"tpot_p99_s": 9.0} for row in poor()], "No open loop"),
    "rates only": (
        [point(c, 64, d, WORKLOADS[0], rate=r) for c in CLOCKS for d in DEGREES for r in (1.0, 2.0)],
        "Not measured: time between tokens",
    ),
    "no tokens": (
        [row | {"output_tokens_per_s": 0.0} for row in poor(repeats=1)],
        "12 of 12 rows have no throughput",
    ),
}


@pytest.mark.parametrize("case", POOR)
def test_poor_runs_are_reported_with_what_they_lack(tmp_path: Path, case: str) -> None:
    rows, told = POOR[case]
    files = write_characterization_report(run_folder(tmp_path, rows))

    text = files[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert told in text
    assert len(page.images) == len(files) - 1
    visible = re.sub(r"data:image/png;base64,[^\"]*|<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(nan|NaN|inf|None)\b", visible)
    if case in {"no energy", "nothing"}:
        assert text.count("not shown.</strong> Reason:") >= 4
        assert MISSING in page.cells


def test_a_run_that_is_short_of_rows_says_so() -> None:
    assert any("24 of 30 planned rows" in line for line in results(grid(repeats=1), points=30).missing())


def test_without_an_slo_nothing_is_said_about_it(tmp_path: Path) -> None:
    text = write_characterization_report(run_folder(tmp_path, grid(), limits={}))[0].read_text(
        encoding="utf-8"
    )

    assert "The run names no SLO" in text


def test_names_of_workloads_make_no_two_figures_one(tmp_path: Path) -> None:
    rows = grid(workloads=("trace:a/b", "trace:a-b"), repeats=1)
    files = write_characterization_report(run_folder(tmp_path, rows))

    assert len({path.name for path in files}) == len(files) == 1 + 2 * 3 + 4


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CharacterizationError, match=r"holds no characterization\.yml"):
        write_characterization_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9) | st.just(None)), max_size=30))
def test_a_front_holds_exactly_what_no_other_beats(points: list[tuple[int, int | None]]) -> None:
    x = np.array([a for a, _ in points], dtype=float)
    y = np.array([np.nan if b is None else b for _, b in points], dtype=float)
    edge = list(front(x, y))

    known = [i for i in range(len(points)) if np.isfinite(y[i])]

    def beaten(i: int) -> bool:
        return any(x[j] <= x[i] and y[j] <= y[i] and (x[j], y[j]) != (x[i], y[i]) for j in known)

    assert {(x[i], y[i]) for i in edge} == {(x[i], y[i]) for i in known if not beaten(i)}
    assert list(x[edge]) == sorted(set(x[edge]))
    assert list(y[edge]) == sorted(y[edge], reverse=True)


@pytest.mark.parametrize(
    ("number", "digits", "text"),
    [
        (0.012345, 3, "0.0123"),
        (1234.5, 3, "1234"),
        (0, 3, "0"),
        (-0.5, 2, "-0.50"),
        (36.4, 0, "36"),
        (9.999, 2, "10"),
    ],
)
def test_numbers_keep_their_significant_digits(number: float, digits: int, text: str) -> None:
    assert significant(number, digits) in {text, text + ".0"}


def test_points_keep_their_order() -> None:
    told = results(grid())

    assert list(told.points["point_id"]) == list(pd.unique(told.rows["point_id"]))
