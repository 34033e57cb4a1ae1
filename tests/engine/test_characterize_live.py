"""Characterising over real processes: ``rlgov serve`` with fake engines, and a fake engine by itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlgov.calibration.table import JOURNAL_FILE, read_header, read_iterations, read_points
from rlgov.characterize.benches import open_bench, thinned
from rlgov.characterize.campaign import Outcome, run_campaign
from rlgov.characterize.workloads import Lengths, length_class
from rlgov.clock import SystemClock
from rlgov.config import CharacterizeSettings
from rlgov.engine.control.client import StackClient
from rlgov.errors import CharacterizationError

START_S = 90.0
TOKEN_S = 0.004


def _run(settings: CharacterizeSettings, hardware: Any = None) -> Outcome:
    workloads: list[Lengths] = [length_class(name, settings.length_scale) for name in settings.classes]
    named = {lengths.name: lengths for lengths in workloads}
    clock = SystemClock()
    bench = open_bench(settings, named, clock, hardware=hardware)
    try:
        return run_campaign(settings, bench, workloads, clock)
    finally:
        bench.close()


@pytest.fixture
def serving(fake_program: Path, repository: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Where a stack of fake engines listens: its ``url`` and its ``control`` socket."""
    said = tmp_path / "said.json"
    command = [
        sys.executable, "-m", "rlgov", "serve", "--model", "fake/model", "--tp", "2", "1", "--batch-caps",
        "16", "4", "--max-num-seqs", "16", "--gpus", "none", "--port", "0", "--vllm", str(fake_program),
        "--run", str(tmp_path / "serve"), "--json", "--", "--fake-token-ms", str(1000 * TOKEN_S),
    ]  # fmt: skip
    clock = SystemClock()
    until_s = clock.monotonic_s() + START_S
    with said.open("wb") as out, (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=repository, stdout=out, stderr=log)
    try:
        while not said.read_text(encoding="utf-8").endswith("}\n"):
            if process.poll() is not None or clock.monotonic_s() > until_s:
                pytest.fail(f"rlgov serve does not serve:\n{(tmp_path / 'serve.log').read_text()}")
            clock.sleep_s(0.05)
        yield json.loads(said.read_text(encoding="utf-8"))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def _check_rows(points: pd.DataFrame, rows: int) -> None:
    assert len(points) == rows
    assert (points["served"] > 0).all()
    assert (points["failed"] == 0).all()
    assert (points["output_tokens_per_s"] > 0).all()
    # The fake decodes a token in no less than this.
    assert (points["tpot_p50_s"] > 0.8 * TOKEN_S).all()
    assert (points["e2e_p50_s"] >= points["ttft_p50_s"]).all()


@pytest.mark.slow
def test_a_served_stack_is_characterised_through_tp_switches_and_given_back(
    serving: dict[str, str], fake_stack: ModuleType, tmp_path: Path
) -> None:
    world = fake_stack.World(rate_per_s=0.0, clock=SystemClock())  # GPUs only: their power is invented
    gpus = fake_stack.FakeGpus(world)
    out = tmp_path / "run"
    settings = CharacterizeSettings(
        out=out,
        deployment="live",
        control=Path(serving["control"]),
        url=serving["url"],
        clocks=(1980, 1380),
        classes=("short-in/short-out",),
        length_scale=0.25,
        concurrency=(8,),
        warm_up_s=1,
        measure_s=4,
        cool_down_s=0,
    )
    _run(settings, gpus)
    with StackClient(Path(serving["control"]), timeout_s=START_S) as client:
        state = client.state()
        assert client.limits().batch_caps == (16, 4)
    assert (state.batch_cap, world.lock_mhz) == (16, None)  # as it was found
    assert gpus.closed >= 1

    points = read_points(out)
    _check_rows(points, 2 * 2 * 2)
    assert set(points["tp_degree"]) == {2, 1}
    assert set(points["sm_clock_mhz"]) == {1980.0, 1380.0}
    assert (points["energy_j"] > 0).all()
    assert points["energy_error"].to_numpy() == pytest.approx(
        0.1 / points["duration_s"].to_numpy(dtype=np.float64)
    )
    small, large = (points[points["batch_cap"] == cap]["running_mean"] for cap in (4, 16))
    assert small.max() <= 4.1  # the cap holds the eight users down
    assert large.min() > 4.5
    assert points["itl_p50_s"].notna().all()
    iterations = read_iterations(out)
    assert iterations is not None
    assert set(iterations["point_id"]) == set(points["point_id"])
    assert (iterations.groupby("point_id").size().sort_index().to_numpy() > 10).all()
    header = read_header(out)
    assert (header.deployment, header.model, header.points) == ("live", "fake/model", 8)
    # Resuming a finished campaign measures nothing.
    assert _run(settings, fake_stack.FakeGpus(world)).measured == 0


@pytest.mark.slow
def test_killed_and_terminated_it_gives_back_and_goes_on(
    serving: dict[str, str], repository: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "rlgov", "characterize", "--deployment", "live", "--control",
        serving["control"], "--url", serving["url"], "--gpus", "none", "--tp", "2", "--caps", "16", "4",
        "--classes", "short-in/short-out", "--length-scale", "0.25", "--warm-up-s", "1", "--measure-s", "4",
        "--cool-down-s", "0", "--rates", "4", "--out", str(out),
    ]  # fmt: skip
    clock = SystemClock()
    journal = out / JOURNAL_FILE

    def lines() -> int:
        return journal.read_bytes().count(b"\n") if journal.is_file() else 0

    for number, wanted in ((signal.SIGKILL, 1), (signal.SIGTERM, 2)):
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(command, cwd=repository, stdout=log, stderr=log)
            until_s = clock.monotonic_s() + 2 * START_S
            while lines() < wanted and process.poll() is None:
                assert clock.monotonic_s() < until_s
                clock.sleep_s(0.05)
            process.send_signal(number)
            process.wait(START_S)
    with StackClient(Path(serving["control"]), timeout_s=START_S) as client:
        assert client.state().batch_cap == 16
    subprocess.run(command, cwd=repository, check=True, timeout=4 * START_S, capture_output=True)
    points = read_points(out)
    _check_rows(points, 4)
    assert points["energy_j"].isna().all()  # no meter: missing, not zero
    assert points["energy_error"].isna().all()
    assert points["sm_clock_mhz"].isna().all()
    assert points["measured_clock_mhz"].isna().all()


@pytest.mark.slow
@pytest.mark.parametrize("plugin", [True, False])
def test_a_foreign_engine_is_characterised(
    plugin: bool,  # noqa: FBT001  # a parameter of the test
    start_fake: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start_fake("--fake-token-ms", str(1000 * TOKEN_S), "--max-num-seqs", "16", plugin=plugin)
    monkeypatch.setenv("PLUGIN_TOKEN", server.token)
    out = tmp_path / "run"
    settings = CharacterizeSettings(
        out=out,
        deployment="attach",
        url=server.url,
        gpus=("none",),
        tp=(2,),
        caps=(16, 4) if plugin else (16,),
        token_env="PLUGIN_TOKEN" if plugin else None,
        classes=("short-in/short-out",),
        length_scale=0.25,
        concurrency=(8,),
        warm_up_s=1,
        measure_s=4,
        cool_down_s=0,
    )
    _run(settings)
    points = read_points(out)
    _check_rows(points, 2 if plugin else 1)
    assert points["energy_j"].isna().all()
    assert (points["model"] == "fake/model").all()
    assert points["iterations"].notna().all() == plugin
    assert (read_iterations(out) is not None) == plugin
    if plugin:
        by_cap = points.set_index("batch_cap")["output_tokens_per_s"]
        assert by_cap[16] > by_cap[4]


@pytest.mark.parametrize(
    ("fault", "says"),
    [("503", r"no request ran within 20 s \(.*503"), ("drop", r"none of \d+ requests was served \(")],
)
def test_a_point_without_a_served_request_is_an_error(
    fault: str, says: str, start_fake: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlgov.characterize.live._FIRST_REQUEST_S", 20.0)
    monkeypatch.setattr("rlgov.characterize.campaign.ATTEMPTS", 1)
    faults = ("--fake-fault", f'requests="{fault}"', "--fake-fault", "count=1000000")
    server = start_fake("--fake-token-ms", "2", "--max-num-seqs", "16", *faults)
    out = tmp_path / "run"
    settings = CharacterizeSettings(
        out=out, deployment="attach", url=server.url, gpus=("none",), tp=(1,), caps=(16,), concurrency=(2,),
        classes=("short-in/short-out",), length_scale=0.25, warm_up_s=0, measure_s=2, cool_down_s=0,
    )  # fmt: skip
    with pytest.raises(CharacterizationError, match=says):
        _run(settings)
    assert (out / JOURNAL_FILE).read_bytes() == b""


def test_clocks_are_not_asked_for_where_none_can_be_set(
    start_fake: Callable[..., Any], tmp_path: Path
) -> None:
    server = start_fake("--fake-token-ms", "2", "--max-num-seqs", "16")
    settings = CharacterizeSettings(
        out=tmp_path / "run", deployment="attach", url=server.url, gpus=("none",), tp=(1,), caps=(16,),
        clocks=(1980,), classes=("short-in/short-out",),
    )  # fmt: skip
    with pytest.raises(CharacterizationError, match="cannot be set here"):
        _run(settings)


def test_about_eight_clocks_are_taken_where_nobody_names_any() -> None:
    supported = tuple(range(1980, 195, -15))
    chosen = thinned(supported)
    assert len(chosen) == 8
    assert (chosen[0], chosen[-1]) == (supported[0], supported[-1])
    assert set(chosen) <= set(supported)
    assert thinned((1500, 1400)) == (1500, 1400)
