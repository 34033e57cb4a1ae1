"""A replay leaves files that people and programs can read."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rlgov.agents import plots
from rlgov.agents.plots import FrontPoint
from rlgov.agents.replay import ReplayResult, ReplaySpec, replay
from rlgov.agents.report import front_points, print_table, savings_table, write_report
from rlgov.records import WINDOW_FIELDS
from rlgov.workload.trace import Trace

PNG = b"\x89PNG\r\n\x1a\n"
KEYS = {
    "name", "energy_j", "j_per_output_token", "slo_attainment", "served", "unserved", "ttft_p50_s",
    "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "switches", "saving_vs_fastest", "saving_vs_best_static",
    "energy_j_ci", "slo_attainment_ci", "saving_vs_fastest_ci", "saving_vs_best_static_ci",
}  # fmt: skip


@pytest.fixture(scope="module")
def result() -> ReplayResult:
    rng = np.random.default_rng(5)
    arrival_s = np.sort(rng.uniform(0.0, 50.0, 100))
    trace = Trace(
        "made",
        arrival_s,
        rng.integers(20, 900, 100),
        rng.integers(1, 90, 100),
        np.zeros(100, dtype=np.int64),
        50.0,
    )
    return replay(
        ReplaySpec(trace="made", profile="h100-qwen3-8b", policies=("random",), block_s=10.0), trace=trace
    )


@pytest.fixture(scope="module")
def paths(result: ReplayResult, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_report(result, tmp_path_factory.mktemp("report"))


def test_the_json_holds_digest_and_exactly_the_promised_keys(
    paths: dict[str, Path], result: ReplayResult
) -> None:
    document = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert document["digest"] == result.digest
    assert all(set(row) == KEYS for row in document["policies"])


def test_the_csv_files_hold_every_policy_setting_and_window(
    paths: dict[str, Path], result: ReplayResult
) -> None:
    def read(name: str) -> list[dict[str, str]]:
        with paths[name].open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    assert [row["name"] for row in read("policies")] == [row.name for row in result.policies]
    assert float(read("policies")[0]["energy_j"]) == result.policies[0].energy_j
    assert len(read("statics")) == len(result.statics)
    windows = read("windows")
    assert list(windows[0]) == ["policy", "reason", *WINDOW_FIELDS]
    assert len(windows) == sum(len(run.rows) for run in result.runs)
    assert not any(value == "nan" for row in windows for value in row.values())


def test_the_plots_are_pictures_and_equal_when_drawn_again(
    paths: dict[str, Path], result: ReplayResult, tmp_path: Path
) -> None:
    again = write_report(result, tmp_path)
    for name in ("front", "timeline"):
        assert paths[name].read_bytes().startswith(PNG)
        assert paths[name].read_bytes() == again[name].read_bytes()


def test_the_front_has_every_setting_and_puts_fastest_at_one(result: ReplayResult) -> None:
    points = front_points(result)
    assert sum(point.kind == "static" for point in points) == len(result.statics)
    assert next(point for point in points if point.name == "fastest").energy_share == 1.0


def test_the_front_counts_what_it_does_not_show() -> None:
    points = [
        FrontPoint("s", 0.5, 0.2, "static", 2),
        FrontPoint("s", 0.6, 0.995, "static", 2),
        FrontPoint("rule", 0.7, 0.3),
    ]
    figure = plots.front_figure(points)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0] == "static, TP 2 (1 below 50 %)"
    assert texts[1].startswith("rule: \N{MINUS SIGN}30.0 %, 30.00 %")


def test_the_table_names_the_best_static_setting(result: ReplayResult) -> None:
    text = io.StringIO()
    print_table(result, Console(file=text, width=200))
    assert f"best static: {result.best_static.sm_clock_mhz} MHz" in text.getvalue()
    assert result.digest[:16] in text.getvalue()


def test_the_markdown_table_has_a_line_a_replay_and_policy(result: ReplayResult) -> None:
    lines = savings_table({"low": result, "high": result}).splitlines()
    assert len(lines) == 2 + 2 * (len(result.policies) - 1)
    assert all(line.count("|") == 6 for line in lines)
