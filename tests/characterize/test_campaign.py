"""Campaigns on a simulated deployment: killed and resumed, refused, and what they leave."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlgov import cli
from rlgov.calibration.table import (
    HEADER_FILE,
    JOURNAL_FILE,
    POINTS_FILE,
    read_header,
    read_iterations,
    read_points,
)
from rlgov.characterize.journal import PointJournal
from rlgov.clock import SystemClock
from rlgov.errors import CharacterizationError
from rlgov.simulation.profile import load_profile

WAIT_S = 120.0  # on a loaded machine
SMALL = (
    "--classes", "short-in/short-out", "medium-in/long-out", "--clocks", "1980", "1230", "--caps", "32", "8",
    "--tp", "2", "1", "--rates", "2", "--warm-up-s", "5", "--measure-s", "10", "--repeats", "2",
)  # fmt: skip
ONE = (
    "--classes", "short-in/short-out", "--clocks", "1980", "--caps", "8", "--tp", "1", "--warm-up-s", "1",
    "--measure-s", "4",
)  # fmt: skip
ROWS = 2 * 2 * 2 * 2 * 2 * 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert cli.run(["characterize", "--out", str(out), *SMALL]) == 0
    return out


def _until(condition: Any, process: subprocess.Popen[bytes]) -> None:
    clock = SystemClock()
    until_s = clock.monotonic_s() + WAIT_S
    while not condition():
        if process.poll() is not None:
            return
        assert clock.monotonic_s() < until_s
        clock.sleep_s(0.002)


def _lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


@pytest.fixture
def killed(repository: Path, tmp_path: Path) -> Any:
    """Runs the real command and kills it when so many points are in the journal."""

    def run(out: Path, points: int) -> int:
        command = [sys.executable, "-m", "rlgov", "characterize", "--out", str(out), *SMALL]
        with (tmp_path / "killed.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=repository, stdout=log, stderr=log)
            begun = out / HEADER_FILE if points == 0 else out / JOURNAL_FILE
            _until(lambda: begun.is_file() and _lines(out / JOURNAL_FILE) >= points, process)
            process.send_signal(signal.SIGKILL)
            process.wait()
        return _lines(out / JOURNAL_FILE)

    return run


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_has_the_same_points_and_values(
    whole: Path, killed: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    known = 0
    for moment in (0, 1, 7, 20, 41):
        there = killed(out, moment)
        assert known <= there
        known = there
    # Killed within a write: the last line is torn.
    journal = out / JOURNAL_FILE
    torn = journal.read_bytes()
    journal.write_bytes(torn[: len(torn) - 40])
    assert cli.run(["characterize", "--out", str(out), *SMALL]) == 0
    pd.testing.assert_frame_equal(read_points(out), read_points(whole))
    assert read_header(out).digest == read_header(whole).digest
    assert len(read_points(out)) == ROWS == read_header(out).points


def test_a_finished_campaign_is_not_measured_again(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / JOURNAL_FILE).read_bytes()
    assert cli.run(["characterize", "--out", str(whole), *SMALL, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["measured_now"], told["rows"]) == (0, ROWS)
    assert (whole / JOURNAL_FILE).read_bytes() == before
    assert all(Path(path).is_file() for path in told["files"])


def test_what_the_points_say_holds_together(whole: Path) -> None:
    points = read_points(whole)
    assert (points["failed"] == 0).all()
    assert (points["source"] == "simulated").all()
    assert read_header(whole).profile == "h100-qwen3-32b"
    assert points["energy_j"].to_numpy() == pytest.approx(
        (points["power_w_per_gpu"] * points["duration_s"] * points["tp_degree"]).to_numpy(dtype=np.float64)
    )
    assert ((points["rate_per_s"].isna()) == (points["mode"] == "closed")).all()
    for name in ("ttft", "tpot", "itl", "e2e"):
        assert (points[f"{name}_p50_s"] <= points[f"{name}_p99_s"]).all()
    closed = points[(points["mode"] == "closed") & points["steady"].astype(bool)]
    assert (closed["running_mean"] <= closed["batch_cap"].astype(float) + 1e-9).all()
    # Little's law: users are as many as the rate at which they are served times the time that takes.
    short = closed[closed["workload"] == "short-in/short-out"]
    users = short["served"].astype(float) / short["duration_s"] * short["e2e_p50_s"]
    assert (np.abs(users / short["concurrency"].astype(float) - 1) < 0.25).all()
    faster = points.pivot_table(
        index=["workload", "mode", "batch_cap", "tp_degree", "repeat"], columns="sm_clock_mhz",
        values="tpot_p50_s", observed=True,
    )  # fmt: skip
    assert (faster[1980.0] < faster[1230.0]).all()


def test_repeats_have_other_requests_and_configurations_the_same(whole: Path) -> None:
    points = read_points(whole)
    repeats = points.pivot_table(index="point_id", columns="repeat", values="e2e_p50_s")
    assert (repeats[0] != repeats[1]).all()
    longest = points[(points["mode"] == "open") & (points["workload"] == "short-in/short-out")]
    asked = longest.groupby("repeat")["requests"].nunique()
    assert (asked <= 2).all()  # equal work at every clock, but for spans that begin elsewhere


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--seed", "1"], "seed 0 there, 1 here"),
        (["--length-scale", "0.5"], "length_scale 1.0 there, 0.5 here"),
        (["--caps", "64"], "caps"),
    ],
)
def test_a_folder_of_another_campaign_is_refused(
    whole: Path, change: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / POINTS_FILE).read_bytes()
    assert cli.run(["characterize", "--out", str(whole), *SMALL, *change]) == cli.EXIT_ERROR
    told = capsys.readouterr().err
    assert says in told
    assert "--out" in told
    assert (whole / POINTS_FILE).read_bytes() == before


def test_a_profile_that_was_changed_is_another_campaign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "mine.yaml", tmp_path / "run"
    command = ["characterize", "--out", str(out), "--profile", str(file), *ONE]
    text = load_profile("h100-qwen3-32b").to_yaml()
    file.write_text(text, encoding="utf-8")
    assert cli.run(command) == 0
    file.write_text(text.replace("tdp_w: 700.0", "tdp_w: 690.0"), encoding="utf-8")
    assert cli.run(command) == cli.EXIT_ERROR
    assert "holds another campaign" in capsys.readouterr().err
    file.write_text(text, encoding="utf-8")
    assert cli.run(command) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--clocks", "1981"], "SM clocks (MHz) 1981 not offered here"),
        (["--caps", "8", "512"], "batch caps 512 not offered here"),
        (["--tp", "8"], "TP degrees 8 not offered here; choose among 4, 2, 1"),
        (["--classes", "short/long"], "no class of lengths 'short/long'"),
        (["--profile", "h100"], "no profile h100"),
        (["--no-closed"], "there is no load to measure under"),
        (["--deployment", "attach"], "give it as tp"),
        (["--token-env", "X"], "token_env is for attach"),
        (["--deployment", "attach", "--tp", "1"], "without the plugin's token"),
        (["--deployment", "attach", "--tp", "1", "--token-env", "NOT_SET_HERE"], "NOT_SET_HERE is not set"),
        (["--deployment", "live", "--control", "nowhere.sock"], "nowhere.sock: cannot be reached"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.run(["characterize", "--out", str(out), "--gpus", "none", *arguments]) == cli.EXIT_ERROR
    told = capsys.readouterr().err
    assert says in told
    assert not out.exists()


def test_a_clock_between_the_profiles_and_a_cap_of_its_own_can_be_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--clocks", "1995", "--caps", "24", "--tp", "1", "--classes", "short-in/short-out"]
    quick = ["--warm-up-s", "1", "--measure-s", "4"]
    assert cli.run(["characterize", "--out", str(out), *arguments, *quick]) == cli.EXIT_ERROR
    arguments[1] = "1965"
    assert cli.run(["characterize", "--out", str(out), *arguments, *quick, "--iterations"]) == 0
    (point,) = read_points(out).to_dict("records")
    assert (point["sm_clock_mhz"], point["batch_cap"]) == (1965.0, 24)
    iterations = read_iterations(out)
    assert iterations is not None
    assert len(iterations) == point["iterations"]
    assert iterations["t_s"].between(0, point["duration_s"]).all()


def test_one_folder_is_for_one_campaign_at_a_time(tmp_path: Path) -> None:
    with PointJournal(tmp_path), pytest.raises(CharacterizationError, match="another `rlgov characterize`"):
        PointJournal(tmp_path)
    with PointJournal(tmp_path) as journal:
        assert journal.rows == {}


def test_a_damaged_line_is_named_and_a_torn_one_cut_off(tmp_path: Path) -> None:
    row = {"point_id": "a", "repeat": 0, "workload": "w", "mode": "closed", "batch_cap": 1, "tp_degree": 1}
    row |= {"allotted_gpus": 1, "duration_s": 1.0, "steady": True, "model": "m", "source": "live"}
    with PointJournal(tmp_path) as journal:
        journal.add(row)
    path = tmp_path / JOURNAL_FILE
    with path.open("ab") as file:
        file.write(b'{"point_id": "b"')
    with PointJournal(tmp_path) as journal:
        assert list(journal.rows) == [("a", 0)]
        journal.add(row | {"repeat": 1})
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    first = path.read_text(encoding="utf-8").splitlines(keepends=True)[0]
    for line, says in (
        ("rubbish", "not a finished point"),
        ('["a", 0]', "not a finished point"),
        ('{"point_id": "b", "repeat": 0}', "has no workload"),
        (first.strip().replace('"a"', '"b"').replace("1.0", '"long"'), "duration_s"),
        (first.strip(), "point a has repeat 0 twice"),
    ):
        path.write_text(f"{first}{line}\n", encoding="utf-8")
        with pytest.raises(CharacterizationError, match=rf"points\.jsonl:2: .*{says}"):
            PointJournal(tmp_path)


def test_ctrl_c_between_two_points_ends_with_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    add = PointJournal.add

    def add_and_interrupt(journal: PointJournal, row: dict[str, Any]) -> None:
        add(journal, row)
        if len(journal.rows) == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(PointJournal, "add", add_and_interrupt)
        assert cli.run(["characterize", "--out", str(out), *ONE, "--repeats", "4"]) == cli.EXIT_INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert _lines(out / JOURNAL_FILE) == 2
    assert cli.run(["characterize", "--out", str(out), *ONE, "--repeats", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured_now"] == 2


@pytest.mark.slow
def test_ctrl_c_ends_the_program(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # Half an hour of it: it cannot come to its end before the signal does.
    command = [sys.executable, "-m", "rlgov", "characterize", "--out", str(out), "--repeats", "20"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=repository, stdout=log, stderr=log)
        try:
            _until(lambda: _lines(out / JOURNAL_FILE) >= 2, process)
            process.send_signal(signal.SIGINT)
            assert process.wait(WAIT_S) == cli.EXIT_INTERRUPTED
        finally:
            process.kill()
            process.wait()
    with PointJournal(out) as journal:
        assert 2 <= len(journal.rows) == _lines(out / JOURNAL_FILE)


def test_report_only_measures_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in (HEADER_FILE, JOURNAL_FILE):
        (copied / name).write_bytes((whole / name).read_bytes())
    assert cli.run(["characterize", "--report-only", str(copied), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["measured_now"], told["rows"], told["of"]) == (0, ROWS, ROWS)
    assert (copied / "report.html").is_file()
    assert all(Path(path).is_file() for path in [*told["files"], *told["report"]])
    order = ["point_id", "repeat"]
    pd.testing.assert_frame_equal(
        read_points(copied).sort_values(order, ignore_index=True),
        read_points(whole).sort_values(order, ignore_index=True),
    )
    assert cli.run(["characterize", "--report-only", str(tmp_path)]) == cli.EXIT_ERROR
    assert "holds no characterization.yml" in capsys.readouterr().err


def test_a_slice_of_a_trace_is_a_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "mine.csv", tmp_path / "run"
    rows = [f"{second},{100 if second < 50 else 900},{20 if second < 50 else 80},0" for second in range(100)]
    trace.write_text(
        "\n".join(["arrival_s,prompt_tokens,output_tokens,prefix_hit_tokens", *rows]), encoding="utf-8"
    )
    arguments = ["--traces", str(trace), "--clocks", "1980", "--caps", "8", "--tp", "1", "--warm-up-s", "1"]
    command = ["characterize", "--out", str(out), *arguments, "--measure-s", "20", "--trace-from-s", "50"]
    assert cli.run(command) == 0
    (point,) = read_points(out).to_dict("records")
    assert point["workload"].startswith("trace:mine[50s-")
    assert (point["prompt_tokens_mean"], point["output_tokens_mean"]) == (900.0, 80.0)
    capsys.readouterr()
    assert cli.run([*command, "--trace-to-s", "40"]) == cli.EXIT_ERROR
    assert "0 <= from_s < to_s" in capsys.readouterr().err


def test_settings_come_from_a_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "mine.yaml", tmp_path / "run"
    file.write_text("characterize: {caps: [16], tp: [2], clocks: [1980], measure_s: 4}\n", encoding="utf-8")
    monkeypatch.setenv("RLGOV_CHARACTERIZE_SEED", "7")
    flags = ["--out", str(out), "--config", str(file), "--warm-up-s", "1", "--classes", "short-in/short-out"]
    assert cli.run(["characterize", *flags]) == 0
    (point,) = read_points(out).to_dict("records")
    assert (point["batch_cap"], point["tp_degree"], read_header(out).seed) == (16, 2, 7)
    file.write_text("characterize: {cap: [16]}\n", encoding="utf-8")
    assert cli.run(["characterize", *flags]) == cli.EXIT_ERROR
    assert "caps" in capsys.readouterr().err
