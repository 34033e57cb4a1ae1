"""The doctor as people and machines meet it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlgov import cli
from rlgov.commands import doctor as command
from rlgov.doctor import engine
from rlgov.doctor.finding import Finding, fail, ok, warn
from rlgov.doctor.machine import EXTRAS

RUN = """
import sys
for name in {missing!r}:
    sys.modules[name] = None  # as if it were not installed
import rlgov.cli
code = rlgov.cli.run(['doctor', '--json', '--vllm', {vllm!r}, '--run', {folder!r}])
heavy = ('torch', 'numba', 'pandas', 'scipy', 'gymnasium')
sys.stderr.write(','.join(name for name in heavy if sys.modules.get(name)))
sys.exit(code)
"""


def _doctor(tmp_path: Path, missing: tuple[str, ...], environment: dict[str, str]) -> tuple[int, str, Any]:
    code = RUN.format(missing=missing, vllm=str(tmp_path / "vllm"), folder=str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr, json.loads(done.stdout)


@pytest.fixture
def no_driver(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "no-driver"
    folder.mkdir()
    (folder / "libnvidia-ml.so.1").write_text("no library", encoding="utf-8")
    return {"LD_LIBRARY_PATH": str(folder)}


def test_only_the_core_installed_is_a_finding_and_no_crash(tmp_path: Path, no_driver: dict[str, str]) -> None:
    missing = (*EXTRAS["live"], *EXTRAS["train"])
    code, imported, told = _doctor(tmp_path, missing, no_driver)
    assert code == command.EXIT_FAILED
    assert imported == ""
    assert not told["serving"]
    found = {finding["check"]: finding for finding in told["findings"]}
    assert found["packages (live)"]["level"] == "fail"
    assert found["packages (train)"]["level"] == "warn"
    assert "rlgov[live]" in found["nvml"]["said"]
    assert not (tmp_path / "run").exists()


def test_it_imports_nothing_heavy_and_fails_for_want_of_vllm(
    tmp_path: Path, no_driver: dict[str, str]
) -> None:
    code, imported, told = _doctor(tmp_path, (), no_driver)
    assert code == command.EXIT_FAILED
    assert imported == ""
    failed = [finding["check"] for finding in told["findings"] if finding["level"] == "fail"]
    assert failed == ["vllm"]


@pytest.mark.parametrize(
    ("findings", "code"),
    [([ok("a", "x")], 0), ([ok("a", "x"), warn("b", "y", "z")], 0), ([ok("a", "x"), fail("b", "y", "z")], 1)],
)
def test_the_exit_code_says_whether_serving_could_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], findings: list[Finding], code: int
) -> None:
    monkeypatch.setattr(command, "_examine", lambda *_: iter(findings))
    assert cli.run(["doctor", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["serving"] == (code == 0)
    assert len(told["findings"]) == len(findings)
    assert set(told["findings"][0]) == {"check", "level", "said", "remedy"}


def test_people_read_every_finding_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [ok("first", "fine [so far]"), fail("second", "broken", "pip install 'rlgov[live]'")]
    monkeypatch.setattr(command, "_examine", lambda *_: iter(findings))
    assert cli.run(["doctor"]) == 1
    told = capsys.readouterr().out
    for text in ("fine [so far]", "second", "fail", "broken", "pip install 'rlgov[live]'"):
        assert text in told


def test_what_was_asked_about_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--url", "http://127.0.0.1:1", "--control", str(tmp_path / "none.sock")]
    assert cli.run(["doctor", "--json", "--run", str(tmp_path), *arguments]) == 1
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert found["server"]["level"] == found["stack"]["level"] == "fail"


def test_a_vllm_that_exists_is_found(repository: Path) -> None:
    program = repository / engine.LOCAL_PROGRAM
    if not program.exists():
        pytest.skip("needs .venv-vllm, which `make` builds on request")
    first, *_ = engine.check_vllm(program)
    assert first.check == "vllm"
    assert str(program) in first.said
