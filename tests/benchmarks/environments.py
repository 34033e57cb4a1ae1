"""How fast the environments step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.envs.episodes import FreshEpisodes
from rlgov.envs.serving_env import ServingEnv
from rlgov.envs.vec_env import ServingVecEnv
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.workload.synthesis import SPECS
from rlgov.workload.trace import Trace
from tests.benchmarks.simulator import PROFILE
from tests.benchmarks.timing import Figure, median_of, once

EPISODE_WINDOWS = 300
STEPS = {8: 400, 64: 150, 256: 60}


def vec_env(n: int) -> ServingVecEnv:
    """``n`` simulations of fresh conversation traffic, with guard, as training has them."""
    profile = load_profile(PROFILE)
    tables = build_tables(profile)
    spec = replace(SPECS["conversation"], duration_s=float(EPISODE_WINDOWS + 1))
    episodes = FreshEpisodes(spec, tables, profile.limits().service_level)
    return ServingVecEnv(profile.limits(), episodes, tables, n, windows=EPISODE_WINDOWS)


def measure(trace: Trace) -> list[Figure]:
    """Steps a second of single and vectorised environments, masks and automatic resets included."""
    profile = load_profile(PROFILE)
    env = ServingEnv(SimulatedDeployment(profile, trace))
    action = np.zeros(3, dtype=np.int64)
    steps = 0

    def whole_trace() -> None:
        nonlocal steps
        env.reset(seed=0)
        steps, truncated = 0, False
        while not truncated:
            _, _, _, truncated, _ = env.step(action)
            steps += 1

    once(lambda: env.reset(seed=0))
    taken = median_of(3, whole_trace)
    figures = [
        Figure("hour_env_s", taken.cpu_s, "s", "whole trace, static setting, ServingEnv", "step by step"),
        Figure("env_steps_per_s", steps / taken.cpu_s, "steps/s", "ServingEnv", f"{steps:,} steps"),
    ]
    for n, count in STEPS.items():
        vec = vec_env(n)
        actions = np.zeros((n, 3), dtype=np.int64)
        vec.reset()

        def run(vec: ServingVecEnv = vec, actions: object = actions, count: int = count) -> None:
            for _ in range(count):
                vec.env_method("action_masks")
                vec.step(actions)  # type: ignore[arg-type]  # bound as a default, so that its type is lost

        taken = median_of(3, run)
        note = "masks and resets included" if n == min(STEPS) else ""
        figures.append(
            Figure(
                f"vec_{n}_steps_per_s", n * count / taken.cpu_s, "steps/s", f"ServingVecEnv, N = {n}", note
            )
        )
    return figures
