"""Gymnasium ids of the environments, and what builds each of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium

if TYPE_CHECKING:
    from rlgov.envs.guard import GuardSettings
    from rlgov.envs.serving_env import ServingEnv
    from rlgov.workload.trace import Trace

SIMULATED_ID = "rlgov/SimulatedServing-v0"
REPLAYED_ID = "rlgov/ReplayedServing-v0"
DEFAULT_PROFILE = "h100-qwen3-32b"
DEFAULT_TRACE = "conversation"


def register() -> None:
    """Make the ids known to Gymnasium; doing it again changes nothing."""
    for env_id, builder in ((SIMULATED_ID, "make_simulated"), (REPLAYED_ID, "make_replayed")):
        if env_id not in gymnasium.registry:
            gymnasium.register(env_id, entry_point=f"rlgov.envs.registration:{builder}")


def make_simulated(
    profile: str = DEFAULT_PROFILE,
    trace: str | Trace = DEFAULT_TRACE,
    *,
    slo_scale: float = 1.0,
    rate_scale: float = 1.0,
    episode_s: float = 300.0,
    guard: GuardSettings | None = None,
    miss_weight: float | None = None,
) -> ServingEnv:
    """Govern a simulated deployment; see :class:`rlgov.envs.serving_env.ServingEnv`.

    Args:
        profile: Name of a shipped profile, or the path of a profile's YAML file.
        trace: The name of a synthetic workload (every episode draws its own requests), the path of a
            trace file or a :class:`~rlgov.workload.trace.Trace` (every episode plays its beginning).
        slo_scale: Multiplies both SLO limits.
        rate_scale: Multiplies the arrival rate.
        episode_s: Length of an episode.
        guard: Settings of the guard, None for the defaults.
        miss_weight: Lambda, the price of SLO misses; None for the default.
    """
    # Imported here so that registering the ids loads neither the simulator nor numba.
    from rlgov.deployments.simulated import SimulatedDeployment  # noqa: PLC0415
    from rlgov.envs.episodes import named_episodes  # noqa: PLC0415
    from rlgov.envs.guard import GuardSettings  # noqa: PLC0415
    from rlgov.envs.reward import DEFAULT_MISS_WEIGHT, Reference  # noqa: PLC0415
    from rlgov.envs.serving_env import ServingEnv, measure_reference  # noqa: PLC0415
    from rlgov.simulation.profile import load_profile  # noqa: PLC0415

    loaded = load_profile(profile)
    limits = loaded.limits()
    sampler = named_episodes(loaded, trace, slo_scale=slo_scale, rate_scale=rate_scale, episode_s=episode_s)
    windows = max(round(episode_s / limits.interval_s), 1)
    twin = SimulatedDeployment(loaded, sampler)

    def reference(deployment_seed: int) -> Reference:
        return measure_reference(twin, deployment_seed, max_windows=windows)

    return ServingEnv(
        SimulatedDeployment(loaded, sampler),
        guard=GuardSettings() if guard is None else guard,
        reference=reference,
        miss_weight=DEFAULT_MISS_WEIGHT if miss_weight is None else miss_weight,
        max_windows=windows,
    )


def make_replayed(journal: str | Path) -> ServingEnv:
    """Replay a recorded run: actions are audited, never acted on.

    ``env.unwrapped.deployment.audit()`` gives the verdict on every action.

    Args:
        journal: Path of the journal.
    """
    from rlgov.deployments.replayed import ReplayedDeployment  # noqa: PLC0415  # lazy, as above
    from rlgov.envs.serving_env import ServingEnv  # noqa: PLC0415
    from rlgov.journal import read_journal  # noqa: PLC0415

    return ServingEnv(ReplayedDeployment(read_journal(Path(journal))))
