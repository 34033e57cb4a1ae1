"""Which episodes training uses, and one whole training run on the simulated deployment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlgov.agents.bundle import load_bundle
from rlgov.agents.episodes import ServableEpisodes, fixed_episodes
from rlgov.agents.train import SimulatedEnvironments, train
from rlgov.agents.train_config import EvaluationSettings, PpoSettings, TrainConfig
from rlgov.deployments.scenario import Scenario
from rlgov.errors import ConfigError
from rlgov.records import Limits
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.simulation.tables import PhysicsTables
from rlgov.workload.readers import write_trace
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    from pathlib import Path

    from rlgov.deployments.scenario import EpisodeSampler

PROFILE = load_profile("h100-qwen3-8b")
LIMITS: Limits = PROFILE.limits()
TABLES: PhysicsTables = build_tables(PROFILE)


def steady(rate_per_s: float, duration_s: float, prompt_tokens: int = 200) -> Trace:
    n = int(rate_per_s * duration_s)
    tokens = np.full(n, prompt_tokens, dtype=np.int64)
    return Trace(
        "steady",
        np.arange(n) / rate_per_s,
        tokens,
        np.full(n, 20, dtype=np.int64),
        np.zeros(n, dtype=np.int64),
        duration_s,
    )


@dataclass
class Alternating:
    """Episodes of two groups; every other draw is an overload that nobody can serve."""

    groups: tuple[str, ...] = ("one", "two")
    only_group: int | None = None
    drawn: int = 0

    def sample(self, rng: np.random.Generator) -> Scenario:
        self.drawn += 1
        trace = steady(2.0, 20.0) if self.drawn % 2 == 0 else steady(50.0, 20.0, prompt_tokens=20_000)
        group = int(rng.integers(2)) if self.only_group is None else self.only_group
        return Scenario(trace, TABLES, LIMITS.service_level, group=group)


def servable(sampler: Alternating) -> ServableEpisodes:
    return ServableEpisodes(sampler, LIMITS, 0.97)  # type: ignore[arg-type]  # stands in for EpisodeSampler


def test_episodes_that_nobody_can_serve_are_drawn_again() -> None:
    rng = np.random.default_rng(0)
    episodes = servable(Alternating())
    assert all(len(episodes.sample(rng).trace) == 40 for _ in range(5))


def test_a_hopeless_range_still_ends() -> None:
    sampler = Alternating()
    hopeless = replace(servable(sampler), attempts=1)
    assert len(hopeless.sample(np.random.default_rng(0)).trace) == 1000
    assert sampler.drawn == 1


def test_fixed_episodes_are_grouped_and_repeat() -> None:
    fixed = fixed_episodes(servable(Alternating()), TABLES, 3, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    first = [fixed.sample(rng) for _ in range(6)]
    assert [scenario.group for scenario in first] == [0, 0, 0, 1, 1, 1]
    assert [fixed.sample(rng) for _ in range(6)] == first


def test_a_group_that_never_comes_up_is_named() -> None:
    with pytest.raises(ConfigError, match="two"):
        fixed_episodes(servable(Alternating(only_group=0)), TABLES, 1, np.random.default_rng(0))


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    trace = tmp_path / "trace.csv"
    write_trace(steady(3.0, 400.0), trace)
    return TrainConfig(
        out=tmp_path / "run",
        profile="h100-qwen3-8b",
        traces=(str(trace),),
        slo_scales=(1.0,),
        episode_s=20.0,
        figure_span_s=60.0,
        total_steps=256,
        environments=4,
        ppo=PpoSettings(rollout_steps=32, batch_size=64, epochs=1),
        evaluation=EvaluationSettings(every_steps=128, episodes=2),
    )


def test_the_test_span_is_never_read(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def remember(_self: SimulatedEnvironments, sources: list[Trace], **_: object) -> EpisodeSampler:
        seen.append(tuple(source.duration_s for source in sources))
        msg = "no sampler needed"
        raise ConfigError(msg)

    monkeypatch.setattr(SimulatedEnvironments, "_sampler", remember)
    environments = SimulatedEnvironments(config)
    for make in (environments.training, environments.validation):
        with pytest.raises(ConfigError, match="no sampler"):
            make()
    assert seen == [(pytest.approx(400.0 * 0.7 * 0.8),), (pytest.approx(400.0 * 0.7 * 0.2),)]


def test_training_twice_on_the_simulation_gives_one_bundle(config: TrainConfig, tmp_path: Path) -> None:
    bundles = []
    for name in ("a", "b"):
        result = train(config.model_copy(update={"out": tmp_path / name}), say=lambda _: None, terminal=False)
        assert result.bundle is not None
        bundles.append(result.bundle.read_bytes())
        assert load_bundle(result.bundle).manifest.offer.sm_clocks_mhz == LIMITS.sm_clocks_mhz
    assert bundles[0] == bundles[1]
    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    assert {"figures/front", "figures/replay"} <= set(events.Tags()["images"])


def test_a_resumed_run_on_the_simulation_equals_one_that_never_stopped(config: TrainConfig) -> None:
    config = config.model_copy(update={"checkpoint_steps": 128, "figure_span_s": 0.0})
    whole = train(config, say=lambda _: None, terminal=False)
    assert whole.bundle is not None
    before = whole.bundle.read_bytes()
    whole.bundle.unlink()
    (config.out / "checkpoints/rl_model_256_steps.zip").unlink()
    resumed = train(config.model_copy(update={"resume": True}), say=lambda _: None, terminal=False)
    assert resumed.bundle is not None
    assert resumed.bundle.read_bytes() == before
