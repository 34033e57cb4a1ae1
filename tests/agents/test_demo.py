"""The demo, on work small enough to wait for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rlgov.agents import demo
from rlgov.agents.bundle import load_bundle
from rlgov.agents.demo import BASELINES, demo_day, run_demo
from rlgov.agents.train import TrainResult, train
from rlgov.agents.train_config import EvaluationSettings, PpoSettings, TrainConfig
from rlgov.deployments.scenario import synthetic_capacity
from rlgov.errors import ConfigError
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.workload.readers import read_trace
from rlgov.workload.synthesis import SPECS

if TYPE_CHECKING:
    from pathlib import Path

PROFILE = "h100-qwen3-8b"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """A day of two minutes and a training of seconds; remembers what the demo wanted to train."""
    wanted: list[TrainConfig] = []

    def train_little(config: TrainConfig, **options: Any) -> TrainResult:
        wanted.append(config)
        changes = {
            "environments": 4,
            "episode_s": 20.0,
            "load_bins": 1,
            "warm_start": False,
            "figure_span_s": 0.0,
            "ppo": PpoSettings(rollout_steps=32, batch_size=64, epochs=1),
            "evaluation": EvaluationSettings(episodes=2),
        }
        return train(config.model_copy(update=changes), **options)

    monkeypatch.setattr(demo, "DAY_S", 120.0)
    monkeypatch.setattr(demo, "train", train_little)
    return wanted


def run(out: Path, seed: int = 0) -> dict[str, Any]:
    return run_demo(out, profile=PROFILE, seed=seed, quiet=True, steps=128, say=lambda _: None)


def test_a_demo_writes_everything_and_another_one_replaces_it(
    tmp_path: Path, small: list[TrainConfig]
) -> None:
    out = tmp_path / "demo"
    first = run(out)
    assert small[0].total_steps == 128
    json.dumps(first)  # what ``--json`` prints
    names = [row["name"] for row in first["policies"]]
    assert names[: len(BASELINES)] == list(BASELINES)
    assert names[-1] == load_bundle(first["bundle"]).manifest.name
    assert first["files"]
    for path in first["files"].values():
        assert out in (out / path).resolve().parents
        assert (out / path).stat().st_size > 0
    day = read_trace(out / "demo.csv")
    assert first["trace"]["name"] == day.name
    assert len(day) == next(row["served"] + row["unserved"] for row in first["policies"])

    (out / "stale").write_text("of the demo before", encoding="utf-8")
    again = run(out)
    assert not (out / "stale").exists()
    assert again["digest"] == first["digest"]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, small: list[TrainConfig]) -> None:
    foreign = tmp_path / "thesis.txt"
    foreign.write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match="--out"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert not small


def test_an_interrupted_training_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: TrainConfig, **_: object) -> TrainResult:
        return TrainResult(config.out, 64, interrupted=True, best=None, bundle=None)

    monkeypatch.setattr(demo, "train", interrupted)
    with pytest.raises(ConfigError, match=r"--resume --out .*train"):
        run(tmp_path / "demo")


def test_the_day_swings_within_what_can_be_carried_and_follows_its_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "DAY_S", 1200.0)
    day, again, other = (demo_day(PROFILE, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(day.arrival_s, again.arrival_s)
    assert len(day) != len(other)
    assert day.duration_s == pytest.approx(1200.0, rel=0.05)
    profile = load_profile(PROFILE)
    limits = profile.limits()
    spec = replace(SPECS["day"], low=1.0, high=1.0)
    full = synthetic_capacity(limits, build_tables(profile), spec, limits.service_level).full
    counts, _ = np.histogram(day.arrival_s, bins=8)
    loads = counts / (day.duration_s / 8) / full
    assert loads.min() < 0.3
    assert 0.55 < loads.max() < 1.0
