"""How fast training steps, and how long a decision takes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.vec_env import VecNormalize

from rlgov.agents.bundle import BundlePolicy, Origin, export_bundle, load_bundle
from rlgov.agents.ppo import build_ppo
from rlgov.agents.train_config import PpoSettings
from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.envs.guard import Guard, GuardSettings
from rlgov.envs.observation import ObservationEncoder
from rlgov.simulation.profile import load_profile
from rlgov.workload.trace import Trace
from tests.benchmarks.environments import vec_env
from tests.benchmarks.simulator import PROFILE
from tests.benchmarks.timing import Figure, latencies_us, once

ENVIRONMENTS = 64
DECISIONS = 3000
PREDICTIONS = 600


def measure(trace: Trace) -> list[Figure]:
    """PPO's steps a second with learning included; decisions in numpy against Stable-Baselines3."""
    torch.set_num_threads(1)
    settings = PpoSettings()
    rollout = settings.rollout_steps * ENVIRONMENTS
    env = VecNormalize(vec_env(ENVIRONMENTS), norm_obs=False, gamma=settings.gamma)
    model = build_ppo(env, settings, 0)
    if not isinstance(model, MaskablePPO):
        msg = "the default settings train without masks; this benchmark expects them"
        raise TypeError(msg)
    model.learn(rollout)  # the first one allocates
    taken = once(lambda: model.learn(2 * rollout, reset_num_timesteps=False))
    figures = [
        Figure(
            "training_steps_per_s",
            2 * rollout / taken.cpu_s,
            "steps/s",
            f"PPO, {ENVIRONMENTS} environments",
            "rollouts and updates, one torch thread",
        )
    ]

    profile = load_profile(PROFILE)
    limits = profile.limits()
    deployment = SimulatedDeployment(profile, trace)
    deployment.start(0)
    rows = deployment.hold(limits.fastest, DECISIONS)
    encoder, guard = ObservationEncoder(limits, 1), Guard(GuardSettings(), limits, 1)
    level = np.array([[limits.service_level.ttft_s, limits.service_level.tpot_s]])
    observations = np.concatenate([encoder.encode(rows[k : k + 1], level) for k in range(DECISIONS)])
    masks = [guard.mask(rows[k : k + 1]) for k in range(DECISIONS)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "untrained.safetensors"
        origin = Origin("untrained", profile.name, "0" * 64, "0" * 64)
        export_bundle(model, path, origin=origin, limits=limits, observations=observations)
        policy = BundlePolicy(load_bundle(path))
    policy.start(limits, 1)

    def decide(k: int) -> None:
        row = rows[k : k + 1]
        observation = encoder.encode(row, level)
        guard.apply(policy.decide(observation, row, guard.mask(row)), row)

    def policy_alone(k: int) -> None:
        policy.decide(observations[k : k + 1], rows[k : k + 1], masks[k])

    def predict(k: int) -> None:
        model.predict(observations[k], action_masks=masks[k], deterministic=True)

    for key, what, calls, call in (
        ("decision", "decision: encode, mask, policy, guard", DECISIONS, decide),
        ("policy", "the policy in numpy alone", DECISIONS, policy_alone),
        ("predict", "the policy in Stable-Baselines3", PREDICTIONS, predict),
    ):
        p50_us, p99_us = latencies_us(calls, call)
        figures += [
            Figure(
                f"{key}_p50_us",
                p50_us,
                "us",
                what,
                "p50" + (" on the wall; asked: p99 below 1 ms" if key == "decision" else ""),
            ),
            Figure(f"{key}_p99_us", p99_us, "us", "", "p99"),
        ]
    return figures
