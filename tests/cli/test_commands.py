"""The commands that do work, on work small enough to wait for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlgov import cli

PROFILE = "h100-qwen3-8b"
POLICY_KEYS = {
    "name",
    "energy_j",
    "j_per_output_token",
    "slo_attainment",
    "served",
    "unserved",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "switches",
    "saving_vs_fastest",
    "saving_vs_best_static",
}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("RLGOV_"):
            monkeypatch.delenv(name)


@pytest.fixture
def trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "trace.csv"
    report = _report(capsys, "trace", "synth", "conversation", "--out", str(path), "--duration-s", "40")
    assert report["requests"] > 10
    return path


def _report(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert cli.run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_trace_is_summarised_as_it_was_written(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = len(trace.read_text(encoding="utf-8").splitlines()) - 1
    picture = trace.with_suffix(".png")
    assert _report(capsys, "trace", "show", str(trace), "--plot", str(picture))["requests"] == rows
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_malformed_trace_ends_with_file_and_line(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = trace.read_text(encoding="utf-8").splitlines()
    lines[3] = lines[3].replace(",", ",-", 1)
    trace.write_text("\n".join(lines) + "\n", encoding="utf-8")
    capsys.readouterr()
    assert cli.run(["replay", "--trace", str(trace), "--out", str(trace.parent / "out")]) == cli.EXIT_ERROR
    captured = capsys.readouterr()
    assert f"{trace}, line 4: prompt_tokens" in captured.err
    assert captured.err.count("\n") == 1
    assert not (trace.parent / "out").exists()


def test_a_tuned_rule_is_replayed_with_one_digest(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--trace", str(trace), "--profile", PROFILE]
    tuned = _report(
        capsys, "tune", "--family", "two-level", *common, "--budget", "2", "--out", str(tmp_path / "tuned")
    )
    assert tuned["evaluations"] == 2
    replay = ["replay", *common, "--from-s", "5", "--to-s", "30", "--rate-scale", "2"]
    replay += ["--policy", "fastest", tuned["file"]]
    first = _report(capsys, *replay, "--out", str(tmp_path / "a"))
    again = _report(capsys, *replay, "--out", str(tmp_path / "b"))
    other = _report(capsys, *replay, "--out", str(tmp_path / "c"), "--slo-scale", "2")
    assert first["digest"] == again["digest"] != other["digest"]
    assert len(first["policies"]) == 3  # the best static setting takes part unasked
    for row in first["policies"]:
        assert row.keys() >= POLICY_KEYS
    written = json.loads((tmp_path / "a" / "replay.json").read_text(encoding="utf-8"))
    assert written["digest"] == first["digest"]


def test_tuning_begins_at_the_static_setting_that_is_best_on_the_training_span(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--trace", str(trace), "--profile", PROFILE, "--slo-scale", "2"]
    tune = ["tune", "--family", "static", *common, "--budget", "9", "--train-fraction", "0.6"]
    tuned = _report(capsys, *tune, "--out", str(tmp_path / "tuned"))
    span_s = 0.6 * _report(capsys, "trace", "show", str(trace))["duration_s"]
    seen = _report(capsys, "replay", *common, "--to-s", str(span_s), "--out", str(tmp_path / "seen"))
    best = {key: seen["best_static"][key] for key in ("sm_clock_mhz", "batch_cap", "tp_degree")}
    assert tuned["best_static"] == best
    assert best["sm_clock_mhz"] < 1980  # so it is not simply the fastest setting
    # a rule that can be any static setting has nothing better to find than the best one
    assert tuned["parameters"] == best


def test_an_unknown_policy_rule_or_workload_is_refused_with_a_hint(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    for arguments, hint in (
        (["replay", "--policy", "fastst", *out], "fastest"),
        (["replay", "--trace", "synthetic:conversatoin", *out], "conversation"),
        (["tune", "--family", "two-levels", *out], "two-level"),
        (["replay", "--profile", "h100-qwen3-33b", *out], PROFILE),
        (["replay", "--journal", str(tmp_path / "none.jsonl"), *out], "--policy"),
        (["export", "--run", str(tmp_path)], "no training run"),
        (["demo", "--out", str(trace.parent)], "no demo wrote"),
    ):
        capsys.readouterr()
        assert cli.run(arguments) == cli.EXIT_ERROR
        captured = capsys.readouterr()
        assert captured.out == ""
        assert hint in captured.err, arguments
        assert captured.err.count("\n") == 1


@pytest.mark.slow
def test_a_trained_model_is_exported_to_the_bundle_that_training_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"train:\n"
        f"  profile: {PROFILE}\n"
        "  traces: ['synthetic:conversation']\n"
        "  slo_scales: [1.0]\n"
        "  episode_s: 30\n"
        "  total_steps: 128\n"
        "  environments: 4\n"
        "  checkpoint_steps: 128\n"
        "  warm_start: false\n"
        "  figure_span_s: 0\n"
        "  ppo: {rollout_steps: 32, batch_size: 128, epochs: 1}\n"
        "  evaluation: {episodes: 2, every_steps: 128}\n",
        encoding="utf-8",
    )
    trained = _report(capsys, "train", "--config", str(settings), "--out", str(run))
    assert trained["steps"] == 128
    again = tmp_path / "again.safetensors"
    exported = _report(capsys, "export", "--run", str(run), "--out", str(again))
    assert again.read_bytes() == Path(trained["bundle"]).read_bytes()
    last = _report(capsys, "export", "--run", str(run), "--model", "last")
    assert last["file"] == str(run / "policy-last.safetensors")
    assert exported["profile"] == last["profile"] == PROFILE
