"""Gymnasium ids of the environments, and what builds each of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlgov.clock import Clock
    from rlgov.deployments.live import LiveDeployment
    from rlgov.deployments.live_open import HardwareChoice, OpenStack
    from rlgov.deployments.live_parts import Workload
    from rlgov.envs.guard import GuardSettings
    from rlgov.envs.reward import Reference
    from rlgov.envs.serving_env import ServingEnv
    from rlgov.workload.trace import Trace

SIMULATED_ID = "rlgov/SimulatedServing-v0"
REPLAYED_ID = "rlgov/ReplayedServing-v0"
LIVE_ID = "rlgov/LiveServing-v0"
DEFAULT_PROFILE = "h100-qwen3-32b"
DEFAULT_TRACE = "conversation"
PLUGIN_TOKEN = "RLGOV_PLUGIN_TOKEN"  # noqa: S105  # the name of a variable


def register() -> None:
    """Make the ids known to Gymnasium; doing it again changes nothing."""
    import gymnasium  # noqa: PLC0415  # the ids can be asked for without it

    for env_id, builder, repeatable in (
        (SIMULATED_ID, "make_simulated", True),
        (REPLAYED_ID, "make_replayed", True),
        (LIVE_ID, "make_live", False),  # the world does not happen twice
    ):
        if env_id not in gymnasium.registry:
            gymnasium.register(
                env_id, entry_point=f"rlgov.envs.registration:{builder}", nondeterministic=not repeatable
            )


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
    from rlgov.envs.reward import DEFAULT_MISS_WEIGHT  # noqa: PLC0415
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


def make_live(  # noqa: PLR0913  # keyword arguments with defaults, each documented
    control: str | Path | OpenStack,
    profile: str = DEFAULT_PROFILE,
    *,
    slo_scale: float = 1.0,
    interval_s: float | None = None,
    guard: GuardSettings | None = None,
    guarded: bool = True,
    miss_weight: float | None = None,
    episode_s: float | None = 300.0,
    start_tp: int | None = None,
    reference_windows: int = 0,
    workload: Trace | Workload | str | Path | None = None,
    url: str | None = None,
    out: str | Path = "runs/live",
    record: str | Path | None = None,
    policy_digest: str = "",
    hardware: HardwareChoice = "auto",
    clock: Clock | None = None,
) -> ServingEnv:
    """Govern a running serving stack; see :class:`rlgov.envs.serving_env.ServingEnv`.

    A step takes one interval of real time. Close the environment: that restores cap and clocks.

    Args:
        control: The control socket of ``rlgov serve``, or a client of one. The address of a vLLM that runs
            already (``http://...``) attaches to it: its TP degree, told by ``start_tp``, is fixed, and its
            batch cap can be set only if it has the rlgov plugin and RLGOV_PLUGIN_TOKEN is in the environment.
        profile: Name of a shipped profile, or the path of a profile's YAML file; its axes are the actions.
        slo_scale: Multiplies both SLO limits.
        interval_s: Length of a control interval; by default the profile's.
        guard: Settings of the guard, None for the defaults.
        guarded: False for no guard at all.
        miss_weight: Lambda, the price of SLO misses; None for the default.
        episode_s: Length of an episode; None for as long as the workload lasts.
        start_tp: TP degree an episode starts with; by default the largest.
        reference_windows: Intervals at the fastest setting that are measured first, as the reward's
            reference; 0 for a nominal reference.
        workload: Traffic to play in every episode: a trace, a file, ``synthetic:NAME``, or an object that
            plays it. None: the stack's own clients bring it.
        url: Address of the gateway, for the workload.
        out: Folder for the results of the workload's load generator.
        record: Journal to write, one file an episode; none by default.
        policy_digest: Of the policy that will decide, for the journal.
        hardware: Whose energy is metered and whose clock is set: ``auto`` for the GPUs the stack was given,
            UUIDs, or GPUs that are open already. Attached, ``auto`` means all GPUs of this machine.
        clock: Paces the intervals; the machine's by default.

    Raises:
        DeploymentError: The stack cannot be reached, does not offer what the profile needs, or nothing
            meters its energy.
        HardwareError: The GPUs cannot be opened.
    """
    from rlgov.clock import SystemClock  # noqa: PLC0415  # lazy, as above
    from rlgov.deployments.attached import attach_live  # noqa: PLC0415
    from rlgov.deployments.live_open import open_gpus, open_live  # noqa: PLC0415
    from rlgov.deployments.recorded import RecordedDeployment  # noqa: PLC0415
    from rlgov.envs.guard import GuardSettings  # noqa: PLC0415
    from rlgov.envs.reward import DEFAULT_MISS_WEIGHT  # noqa: PLC0415
    from rlgov.envs.serving_env import ServingEnv  # noqa: PLC0415
    from rlgov.simulation.profile import load_profile  # noqa: PLC0415

    limits = load_profile(profile).limits()
    limits = replace(
        limits,
        interval_s=limits.interval_s if interval_s is None else interval_s,
        service_level=limits.service_level.scaled(slo_scale),
    )
    clock = SystemClock() if clock is None else clock
    start = limits.fastest if start_tp is None else replace(limits.fastest, tp_degree=start_tp)
    if isinstance(control, str) and control.startswith(("http://", "https://")):
        live = attach_live(
            control,
            limits,
            clock,
            tp_degree=start.tp_degree,
            gpus=open_gpus(hardware, None, clock),
            token=os.environ.get(PLUGIN_TOKEN),
            workload=_workload(workload, url or control, Path(out)),
        )
    else:
        live = open_live(
            control,
            limits,
            clock,
            hardware=hardware,
            workload=_workload(workload, url, Path(out)),
            start=None if start_tp is None else start,
        )
    try:
        reference = _live_reference(live, reference_windows)
        recorder = None
        if record is not None:
            recorder = RecordedDeployment(
                live, Path(record), arrivals=live, policy_digest=policy_digest, versions=_versions()
            )
        return ServingEnv(
            live if recorder is None else recorder,
            guard=(GuardSettings() if guard is None else guard) if guarded else None,
            reference=reference,
            miss_weight=DEFAULT_MISS_WEIGHT if miss_weight is None else miss_weight,
            max_windows=None if episode_s is None else max(round(episode_s / limits.interval_s), 1),
            recorder=recorder,
            policy_digest=policy_digest,
        )
    except BaseException:
        live.close()
        raise


def _workload(workload: Trace | Workload | str | Path | None, url: str | None, out: Path) -> Workload | None:
    from rlgov.deployments.load_process import LoadProcess  # noqa: PLC0415  # lazy, as above
    from rlgov.errors import ConfigError  # noqa: PLC0415
    from rlgov.workload.trace import Trace  # noqa: PLC0415

    if not isinstance(workload, Trace | str | Path):
        return workload
    if url is None:
        msg = "a workload needs the url of the gateway it is played against; rlgov serve prints it"
        raise ConfigError(msg)
    return LoadProcess(url, workload, out)


def _live_reference(live: LiveDeployment, windows: int) -> Reference | None:
    from rlgov.envs.reward import UNMETERED  # noqa: PLC0415  # lazy, as above
    from rlgov.envs.serving_env import measure_reference  # noqa: PLC0415
    from rlgov.errors import DeploymentError  # noqa: PLC0415

    if not live.metered:
        raise DeploymentError(UNMETERED)
    return measure_reference(live, 0, max_windows=windows) if windows > 0 else None


def _versions() -> dict[str, str]:
    from rlgov import __version__  # noqa: PLC0415  # lazy, as above

    return {"rlgov": __version__}
