"""``rlgov calibrate``: what it writes, prints and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlgov import cli
from rlgov.calibration.table import read_points, write_points
from rlgov.simulation.profile import Parameters, Profile, load_profile

Campaign = Callable[..., Path]
Perturb = Callable[[Profile, int], Profile]


@pytest.fixture(scope="module")
def run(dense: Profile, perturbed: Perturb, characterised: Campaign) -> Path:
    return characterised(
        perturbed(dense, 40), caps=(32, 8), classes=("short-in/short-out", "long-in/short-out")
    )


@pytest.fixture
def base(dense: Profile, tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(dense.to_yaml(), encoding="utf-8")
    return path


def test_a_run_becomes_a_profile(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "mine.yaml"
    assert cli.run(["calibrate", str(run), "--profile", str(base), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    profile = load_profile(out)
    assert profile.name == told["profile"] == "mine"
    assert told["points"] == 32
    assert told["errors"][0]["what"] == "seen by the fit"
    assert told["errors"][0]["time"] < 0.02
    assert {e["what"] for e in told["errors"]} >= {"every fifth point", "each clock"}
    by_name = {p["name"]: p for p in told["parameters"]}
    assert by_name["prefill_mfu"]["identified"]
    assert profile.parameters.prefill_mfu.value == by_name["prefill_mfu"]["value"]
    assert not by_name["wake_s"]["identified"]
    assert by_name["wake_s"]["note"]


def test_the_table_names_every_parameter_and_why(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a base profile it is the run's own."""
    points = read_points(run)
    points.loc[0, "busy_s"] = float("nan")
    out = tmp_path / "mine.yaml"
    write_points(run, points)
    assert cli.run(["calibrate", str(run), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    for name in Parameters.model_fields:
        assert name in told
    assert "left out: 1 rows, no busy_s" in told
    assert "every fifth point" in told
    assert "identified" in told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--out NAME.yaml"),
        (("--out", "x.txt"), "--out NAME.yaml"),
        (("--out", "x.yaml"), "nothing to calibrate from"),
        (("missing", "--out", "x.yaml"), "holds no characterization.yml"),
        (("missing", "--profile", "h100-qwen3-32b", "--out", "x.yaml"), "holds no characterization.yml"),
        (("--published", "missing", "--out", "x.yaml"), "--profile NAME"),
        (("--published", "missing", "--profile", "h100-qwen3-32b", "--out", "x.yaml"), "there is no"),
        (("--report",), "--published"),
        (("--report", "--published", "missing", "--out", "x.yaml"), "writes no profile"),
        (("--published", "missing", "--profile", "a100-llama-2-70b", "--out", "x.yaml"), "no published rows"),
    ],
)
def test_what_is_missing_is_said(
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["calibrate", *arguments]) != 0
    assert says in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_the_base_profile_is_not_overwritten(
    run: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = base.read_bytes()
    assert cli.run(["calibrate", str(run), "--profile", str(base), "--out", str(base)]) != 0
    assert "base profile" in capsys.readouterr().err
    assert base.read_bytes() == before


def test_a_mixture_is_not_fitted_to_published_dense_rows(
    mixture: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(mixture.to_yaml(), encoding="utf-8")
    arguments = ["--published", str(tmp_path), "--profile", str(path), "--out", str(tmp_path / "x.yaml")]
    assert cli.run(["calibrate", *arguments]) != 0
    assert "mixture of experts" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["folder", "table"])
def test_published_rows_alone(
    what: str, shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shared_dir / "data"
    if what == "table":
        path /= "ml_energy_llm.csv"
    out = tmp_path / "mine.yaml"
    arguments = ["--published", str(path), "--profile", "h100-qwen3-32b", "--out", str(out), "--json"]
    assert cli.run(["calibrate", *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    errors = {e["what"]: e for e in told["errors"]}
    assert errors["each model"]["time"] < 0.09
    assert errors["each model"]["power"] < 0.10
    assert len([what for what in errors if what.startswith("model ")]) >= 5
    notes = {p["name"]: p["note"] for p in told["parameters"]}
    assert "told only together with" in notes["layer_overhead_s"]
    assert load_profile(out).decode_rows


def test_published_rows_of_another_card_are_refused(
    shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = (shared_dir / "data" / "ml_energy_llm.csv").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "b200.csv"
    path.write_text("\n".join([table[0], *(row for row in table[1:] if ",B200," in row)]), encoding="utf-8")
    arguments = ["--published", str(path), "--profile", "h100-qwen3-32b", "--out", str(tmp_path / "x.yaml")]
    assert cli.run(["calibrate", *arguments]) != 0
    assert "has no bfloat16 rows of the H100; it has rows of B200" in capsys.readouterr().err


def test_published_rows_and_a_run(
    run: Path, shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    arguments = [str(run), "--published", str(shared_dir / "data"), "--profile", "h100-qwen3-32b"]
    assert cli.run(["calibrate", *arguments, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {e["of"] for e in told["errors"]} == {"published rows", "runs"}
    assert told["points"] >= 31
