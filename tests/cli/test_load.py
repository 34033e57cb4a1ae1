"""``rlgov load`` against the fake vLLM server, both as real processes."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlgov import cli
from rlgov.clock import SystemClock

CLOCK = SystemClock()
PATIENCE_S = 120.0  # on a busy machine; everything here takes a second or two


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("RLGOV_"):
            monkeypatch.delenv(name)


@pytest.fixture
def start_server(repository: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts fake servers and gives their addresses."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> str:
        log = tmp_path / f"server-{len(started)}.log"
        command = [sys.executable, str(repository / "tests" / "fakes" / "engine.py"), "serve", "fake/model"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, "--port", "0", "--fake-children", "0", *arguments], stdout=file, stderr=file
            )
        started.append(process)
        until_s = CLOCK.monotonic_s() + PATIENCE_S
        while CLOCK.monotonic_s() < until_s:
            text = log.read_text(encoding="utf-8")
            if found := re.search(r"startup complete on port (\d+)", text):
                return f"http://127.0.0.1:{found[1]}"
            assert process.poll() is None, text
            CLOCK.sleep_s(0.01)
        pytest.fail(f"the fake server did not start: {log.read_text(encoding='utf-8')}")

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = [f"{0.01 * index:.2f},{5 + index},{3 + index % 4},{index % 3}" for index in range(20)]
    text = "\n".join(["arrival_s,prompt_tokens,output_tokens,prefix_hit_tokens", *rows])
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _load(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> Any:
    capsys.readouterr()
    assert cli.run(["load", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_trace_is_sent_and_reported(
    start_server: Callable[..., str], trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = start_server("--fake-token-ms", "2")
    out = tmp_path / "out"
    common = ("--url", url, "--trace", str(trace), "--out", str(out))
    report = _load(capsys, 0, *common, "--from-s", "0.05", "--rate-scale", "0.5")
    assert report["model"] == "fake/model"
    assert report["summary"]["verdicts"] == {"complete": 15}
    assert report["summary"]["output_tokens_per_s"] > 0
    assert json.loads((out / "load.json").read_text(encoding="utf-8")) == report
    with (out / "requests.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["intended_s"]) for row in rows] == pytest.approx([0.02 * k for k in range(15)])
    assert all(row["output_tokens"] == row["output_tokens_asked"] for row in rows)
    assert cli.run(["load", *common]) == 0
    told = capsys.readouterr().out
    assert "20 complete" in told
    assert "TTFT" in told
    assert str(out / "requests.csv") in told


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ("abort", "lost"),
        ("done-only", "lost"),
        ("empty", "truncated"),
        ("drop", "truncated"),
        ("503", "rejected"),
    ],
)
def test_what_vllm_does_to_requests_it_gives_up_is_found_out(
    start_server: Callable[..., str],
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    verdict: str,
) -> None:
    url = start_server("--fake-fault", f'requests="{fault}"', "--fake-fault", "count=4")
    out = ("--trace", str(trace), "--out", str(tmp_path / "out"))
    report = _load(capsys, 1, "--url", url, *out)
    assert report["summary"]["verdicts"] == {"complete": 16, verdict: 4}
    assert sum(report["summary"]["errors"].values()) == 4


@pytest.mark.parametrize("parent_killed", [False, True])
def test_an_interrupt_ends_the_run_and_still_writes_what_happened(
    parent_killed: bool,  # noqa: FBT001  # a parameter of the test
    start_server: Callable[..., str],
    trace: Path,
    tmp_path: Path,
) -> None:
    # A token takes a minute, so nothing but the interrupt, or the end of its input, can end the run.
    url = start_server("--fake-token-ms", "60000")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "rlgov", "load", "--url", url, "--trace", str(trace), "--out", str(out)]
    command += ["--end-with-input"] * parent_killed
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stderr is not None
        _wait_until_asked(url)
        if not parent_killed:
            process.send_signal(signal.SIGINT)
        # Closes its standard input, too.
        told, complaints = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == cli.EXIT_INTERRUPTED
    assert "Traceback" not in complaints
    assert "cancelled" in told
    report = json.loads((out / "load.json").read_text(encoding="utf-8"))
    assert report["interrupted"] is True
    assert set(report["summary"]["verdicts"]) == {"cancelled"}


def _wait_until_asked(url: str) -> None:
    import requests

    until_s = CLOCK.monotonic_s() + PATIENCE_S
    while CLOCK.monotonic_s() < until_s:
        state = requests.get(f"{url}/fake/state", timeout=PATIENCE_S).json()
        if state["asked"].get("POST /v1/completions"):
            return
        CLOCK.sleep_s(0.02)
    pytest.fail("no request arrived")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--url", "localhost:8000"], "http://127.0.0.1:8000"),
        (["--url", "http://x", "--from-s", "5", "--to-s", "4"], "later end"),
        (["--url", "http://x", "--cross-check", "--concurrency", "3"], "leave concurrency"),
        (["--url", "http://x", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (["--url", "http://x", "--trace", "synthetic:conversatoin"], "conversation"),
        (["--trace", "synthetic:code"], "--url"),
    ],
)
def test_what_cannot_be_is_refused_with_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    out = tmp_path / "out"
    assert cli.run(["load", *arguments, "--out", str(out)]) == cli.EXIT_ERROR
    captured = capsys.readouterr()
    assert hint in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


def test_loading_needs_nothing_of_training(
    start_server: Callable[..., str], trace: Path, tmp_path: Path
) -> None:
    url = start_server()
    heavy = ("torch", "numba", "pandas", "scipy", "matplotlib", "stable_baselines3")
    arguments = ["load", "--url", url, "--trace", str(trace), "--out", str(tmp_path / "out")]
    code = (
        "import sys, rlgov.cli\n"
        f"code = rlgov.cli.run({arguments!r})\n"
        f"print('heavy:', [m for m in {heavy!r} if m in sys.modules])\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
