"""Gymnasium ids of the environments, and what builds each of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium
import numpy as np

from rlgov.errors import ConfigError

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
    trace_seed: int = 0,
    guard: GuardSettings | None = None,
    miss_weight: float | None = None,
) -> ServingEnv:
    """Govern a simulated deployment; see :class:`rlgov.envs.serving_env.ServingEnv`.

    Args:
        profile: Name of a shipped profile, or the path of a profile's YAML file.
        trace: A :class:`~rlgov.workload.trace.Trace`, the name of a synthetic workload, or the path of a
            trace file. Every episode plays its first ``episode_s`` seconds.
        slo_scale: Multiplies both SLO limits.
        rate_scale: Multiplies the arrival rate.
        episode_s: Length of an episode.
        trace_seed: Seed of a synthetic workload.
        guard: Settings of the guard, None for the defaults.
        miss_weight: Lambda, the price of SLO misses; None for the default.
    """
    # Imported here so that registering the ids loads neither the simulator nor numba.
    from rlgov.deployments.simulated import SimulatedDeployment  # noqa: PLC0415
    from rlgov.envs.guard import GuardSettings  # noqa: PLC0415
    from rlgov.envs.reward import DEFAULT_MISS_WEIGHT  # noqa: PLC0415
    from rlgov.envs.serving_env import ServingEnv, measure_reference  # noqa: PLC0415
    from rlgov.simulation.profile import load_profile  # noqa: PLC0415

    loaded = load_profile(profile)
    limits = loaded.limits()
    played = _trace(trace, episode_s * rate_scale, trace_seed)
    if rate_scale != 1.0:
        played = played.scaled(rate_scale)
    deployment = SimulatedDeployment(loaded, played, service_level=limits.service_level.scaled(slo_scale))
    windows = max(round(episode_s / limits.interval_s), 1)
    return ServingEnv(
        deployment,
        guard=GuardSettings() if guard is None else guard,
        reference=measure_reference(deployment, seed=0, max_windows=windows),
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


def _trace(trace: str | Trace, duration_s: float, seed: int) -> Trace:
    if not duration_s > 0:
        msg = f"episode_s and rate_scale must be above 0, got a trace span of {duration_s} s"
        raise ConfigError(msg)
    if not isinstance(trace, str):
        return trace.slice(0.0, duration_s)
    from rlgov.workload.synthesis import SPECS, synthesize  # noqa: PLC0415  # lazy, as above

    if trace in SPECS:
        return synthesize(replace(SPECS[trace], duration_s=duration_s), np.random.default_rng(seed))
    path = Path(trace)
    if not path.exists():
        msg = f"trace {trace!r} is neither a file nor one of {', '.join(sorted(SPECS))}"
        raise ConfigError(msg)
    from rlgov.workload.readers import read_trace  # noqa: PLC0415  # lazy, as above

    return read_trace(path).slice(0.0, duration_s)
