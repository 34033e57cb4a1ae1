from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import pytest
from rich.console import Console
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO

from rlgov.agents.audit import audit_journal
from rlgov.agents.baselines.static import StaticPolicy, fastest
from rlgov.agents.bundle import BundlePolicy, Origin, export_bundle, load_bundle
from rlgov.agents.live import run_live
from rlgov.envs.observation import FEATURES, LOW
from rlgov.envs.registration import LIVE_ID, make_live
from rlgov.envs.serving_env import ServingEnv
from rlgov.errors import BundleError, ConfigError, EngineError
from rlgov.journal import read_journal
from rlgov.records import Configuration

if TYPE_CHECKING:
    from tests.fakes.world import World

ORIGIN = Origin("learned", "h100-qwen3-32b", "0" * 64, "1" * 64)


def make(fake: ModuleType, world: World, **more: Any) -> ServingEnv:
    return make_live(fake.FakeStack(world), clock=world.clock, hardware=fake.FakeGpus(world), **more)


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO])
def test_ppo_trains_on_the_live_environment_by_its_public_id(
    fake_stack: ModuleType, algorithm: type[PPO]
) -> None:
    world = fake_stack.World()
    env = gymnasium.make(
        LIVE_ID,
        control=fake_stack.FakeStack(world),
        clock=world.clock,
        hardware=fake_stack.FakeGpus(world),
        episode_s=16.0,
    )
    model = algorithm("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=2, seed=0, device="cpu")
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    model.learn(64)
    assert any((a != b).any() for a, b in zip(before, model.policy.parameters(), strict=True))
    assert model.ep_info_buffer is not None
    assert {episode["l"] for episode in model.ep_info_buffer} == {16}
    env.close()
    assert (world.batch_cap, world.lock_mhz) == (256, None)


def test_a_bundle_governs_and_its_journal_replays_to_the_same_decisions(
    fake_stack: ModuleType, tmp_path: Path
) -> None:
    """From training to a bundle, from the bundle to a live run, and from its journal to the audit."""
    env = make(fake_stack, fake_stack.World(), episode_s=16.0)
    model = MaskablePPO("MlpPolicy", env, n_steps=32, batch_size=32, seed=1, device="cpu")
    model.learn(32)
    limits = env.limits
    rng = np.random.default_rng(0)
    seen = LOW + rng.random((20, len(FEATURES)), dtype=np.float32)
    export_bundle(model, tmp_path / "policy.bundle", origin=ORIGIN, limits=limits, observations=seen)
    env.close()

    policy = BundlePolicy(load_bundle(tmp_path / "policy.bundle"))
    world = fake_stack.World(rate_per_s=7.0, tp_refused={1: "does not fit"})
    failing = iter([False] * 20 + [True, True] + [False] * 1000)

    def hook(name: str) -> None:
        if name == "interval" and next(failing):
            raise EngineError("no answer")

    world.before_call = hook
    path = tmp_path / "run.jsonl"
    env = make(fake_stack, world, record=path, policy_digest=policy.digest)
    run = run_live(policy, env, 60)
    env.close()
    journal = read_journal(path)
    assert journal.header.policy_digest == policy.digest
    assert [entry.window for entry in journal.intervals] == list(run.windows)
    assert [entry.decision.reason for entry in journal.intervals if entry.decision] == list(run.reasons)
    audit = audit_journal(journal, policy)
    assert audit.equal
    assert audit.observations_compared == 60
    assert audit.reasons == run.reasons
    assert "BLIND" in run.reasons
    tampered = replace(
        journal,
        intervals=tuple(
            replace(entry, window=replace(entry.window, tp_refused=0.0, arrivals=entry.window.arrivals + 5))
            for entry in journal.intervals
        ),
    )
    assert not audit_journal(tampered, policy).equal


def test_the_figures_are_of_the_windows_that_were_seen(fake_stack: ModuleType) -> None:
    world = fake_stack.World(rate_per_s=5.0)
    failing = iter([False] * 6 + [True] + [False] * 1000)

    def hook(name: str) -> None:
        if name == "interval" and next(failing):
            raise EngineError("no answer")

    world.before_call = hook
    env = make(fake_stack, world, guarded=False)
    done: list[int] = []
    run = run_live(StaticPolicy(Configuration(1080, 64, 4)), env, 30, progress=done.append)
    env.close()
    figures = run.figures()
    seen = [window for window in run.windows[1:] if not window.blind]
    assert done == list(range(1, 31))
    assert (figures.windows, figures.blind_windows, len(run.windows)) == (30, 1, 31)
    assert figures.arrivals == sum(w.arrivals for w in seen)
    assert figures.energy_j == pytest.approx(sum(w.energy_j or 0.0 for w in run.windows[1:]))
    assert figures.mean_power_w == pytest.approx(figures.energy_j / 30.0)
    assert figures.j_per_output_token == pytest.approx(figures.energy_j / sum(w.output_tokens for w in seen))
    assert (figures.slo_attainment, figures.tp_switches) == (1.0, 0)
    assert figures.mean_clock_mhz == pytest.approx(1080.0, abs=20.0)  # it was higher when the first one began
    assert figures.unfinished_requests > 0
    assert run.last_problem == "no answer"
    assert run.configurations() == {"static:1080/64/4": pytest.approx(1.0)}
    assert json.loads(json.dumps(run.to_json()))["reasons"] == {"POLICY": 30}
    out = StringIO()
    Console(file=out, width=100).print(run.table())
    assert "static:1080/64/4" in out.getvalue()


def test_slower_clocks_cost_less_energy_on_the_toy(fake_stack: ModuleType) -> None:
    spent = []
    for policy in (fastest(), StaticPolicy(Configuration(1080, 256, 4))):
        env = make(fake_stack, fake_stack.World(), guarded=False)
        spent.append(run_live(policy, env, 40).figures())
        env.close()
    assert spent[1].energy_j < spent[0].energy_j
    assert spent[1].reward > spent[0].reward


def test_a_bundle_for_other_actions_is_refused_before_anything_moves(
    fake_stack: ModuleType, tmp_path: Path
) -> None:
    env = make(fake_stack, fake_stack.World())
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu")
    other = replace(env.limits, interval_s=2.0)
    seen = np.zeros((4, len(FEATURES)), dtype=np.float32)
    export_bundle(model, tmp_path / "policy.bundle", origin=ORIGIN, limits=other, observations=seen)
    env.close()
    world = fake_stack.World()
    env = make(fake_stack, world)
    with pytest.raises(BundleError, match="interval_s"):
        run_live(BundlePolicy(load_bundle(tmp_path / "policy.bundle")), env, 5)
    assert "configure" not in world.calls
    with pytest.raises(ConfigError, match="at least one decision"):
        run_live(fastest(), env, 0)
    env.close()


def test_energy_that_is_not_known_leaves_no_energy_per_token(fake_stack: ModuleType) -> None:
    world = fake_stack.World(rate_per_s=5.0)
    env = make(fake_stack, world)
    world.gpu_unreadable = True
    run = run_live(fastest(), env, 3)
    figures = run.figures()
    env.close()
    assert (figures.unmetered_windows, figures.blind_windows) == (3, 3)
    assert (figures.energy_j, figures.mean_power_w, figures.j_per_output_token) == (0.0, None, None)
    assert figures.slo_attainment is None
