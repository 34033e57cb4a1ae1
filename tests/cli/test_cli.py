from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlgov import cli
from rlgov.agents.train import TrainResult
from rlgov.agents.train_config import TrainConfig
from rlgov.errors import TraceError

# Gymnasium may be there: it is light, and rlgov.envs registers its ids with it.
HEAVY = ("torch", "numba", "pandas", "scipy", "matplotlib", "stable_baselines3", "llvmlite")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("RLGOV_"):
            monkeypatch.delenv(name)


def _settings(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, tuple[Any, str]]:
    assert cli.run(["config", "show", *arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    return {row["name"]: (row["value"], row["source"]) for row in rows}


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(arguments) == cli.EXIT_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rlgov: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["replay", "--help"],
        ["demo", "--help"],
        ["config", "show"],
        ["profile", "list"],
    ],
    ids=" ".join,
)
def test_help_and_settings_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, rlgov.cli\n"
        f"code = rlgov.cli.run({arguments!r})\n"
        f"sys.stderr.write(','.join(m for m in {HEAVY!r} if m in sys.modules))\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    told = capsys.readouterr().out
    commands = ("demo", "train", "replay", "tune", "study", "export", "serve", "load", "doctor")
    for command in (*commands, "trace", "profile", "config", "--config"):
        assert command in told


def test_every_command_can_be_imported_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        ["demo"],
        ["train"],
        ["replay"],
        ["tune"],
        ["study"],
        ["export"],
        ["serve"],
        ["load"],
        ["doctor"],
    ]
    commands += [["trace", name] for name in ("show", "fetch", "synth")]
    commands += [["profile", name] for name in ("list", "show")]
    commands += [["config", name] for name in ("show", "schema")]
    for command in commands:
        assert cli.run([*command, "--help"]) == 0, command
        assert "Usage: rlgov " + " ".join(command) in capsys.readouterr().out


def test_unknown_commands_and_flags_are_refused_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert '"replay"' in _error(capsys, "repaly")
    assert "--total-steps" in _error(capsys, "train", "--out", "x", "--total-step", "3")


def test_a_wrong_value_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    told = _error(capsys, "train", "--out", "x", "--ppo.gamma", "3")
    assert "ppo.gamma" in told
    assert "less than 1" in told
    assert "pydantic" not in told


def test_settings_come_from_file_environment_and_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("train:\n  seed: 3\n  environments: 32\n  ppo:\n    gamma: 0.95\n", encoding="utf-8")
    monkeypatch.setenv("RLGOV_TRAIN_SEED", "7")
    rows = _settings(capsys, "train", "--config", str(path))
    assert rows["train.seed"] == ("7", "RLGOV_TRAIN_SEED")
    assert rows["train.environments"] == ("32", str(path))
    assert rows["train.ppo.gamma"] == ("0.95", str(path))
    assert rows["train.ppo.epochs"][1] == "default"
    assert rows["train.out"] == (None, "required")


def test_the_file_can_be_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("replay:\n  seeds: 5\n", encoding="utf-8")
    monkeypatch.setenv("RLGOV_CONFIG", str(path))
    assert _settings(capsys, "replay")["replay.seeds"] == ("5", str(path))


def test_a_flag_wins_over_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("train:\n  out: from-file\n  seed: 3\n", encoding="utf-8")
    monkeypatch.setenv("RLGOV_TRAIN_SEED", "7")
    asked: list[TrainConfig] = []

    def take(settings: TrainConfig) -> TrainResult:
        asked.append(settings)
        return TrainResult(settings.out, 0, interrupted=True, best=None, bundle=None)

    monkeypatch.setattr("rlgov.agents.train.train", take)
    assert cli.run(["train", "--seed", "9", "--config", str(path)]) == 0
    assert cli.run(["train", "--config", str(path)]) == 0
    assert [(settings.seed, str(settings.out)) for settings in asked] == [(9, "from-file"), (7, "from-file")]


def test_unknown_names_in_file_and_environment_end_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("train:\n  sede: 3\n", encoding="utf-8")
    assert "did you mean 'seed'" in _error(capsys, "train", "--config", str(path), "--out", "x")
    monkeypatch.setenv("RLGOV_TRAIN_SEDE", "1")
    assert "RLGOV_TRAIN_SEED" in _error(capsys, "train", "--out", "x")


def test_an_unknown_profile_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "h100-qwen3-32b" in _error(capsys, "profile", "show", "h200-qwen3-32b")


def test_profiles_are_reported_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["profile", "list", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert "h100-qwen3-32b" in names
    for name in names:
        assert cli.run(["profile", "show", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["name"] == name


def test_the_schema_covers_what_the_file_may_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == {
        "demo",
        "train",
        "replay",
        "tune",
        "study",
        "export",
        "serve",
        "govern",
        "load",
        "characterize",
    }
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (TraceError("a.csv:3: no number"), 2, "rlgov: a.csv:3: no number\n"),
        (KeyboardInterrupt(), 130, "rlgov: interrupted\n"),
        (PermissionError(13, "Permission denied", "runs/x"), 2, "rlgov: runs/x: Permission denied\n"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "rlgov[train]"),
        (ModuleNotFoundError("No module named 'uvloop'", name="uvloop"), 2, "rlgov[live]"),
    ],
    ids=["own error", "ctrl-c", "file error", "missing extra", "missing live extra"],
)
def test_errors_end_in_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    said: str,
) -> None:
    def fail() -> list[str]:
        raise raised

    monkeypatch.setattr("rlgov.commands.profile.profile_names", fail)
    assert cli.run(["profile", "list"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_an_error_that_is_no_ones_fault_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[str]:
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")

    monkeypatch.setattr("rlgov.commands.profile.profile_names", fail)
    with pytest.raises(ModuleNotFoundError, match="elsewhere"):
        cli.run(["profile", "list"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys, rlgov.cli; sys.exit(rlgov.cli.run(['config', 'schema']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait() in {cli.EXIT_ERROR, -signal.SIGPIPE}
    assert told == b""
