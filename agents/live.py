"""A policy on a live deployment for a number of intervals, and what came of it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.table import Table

from rlgov.agents.baselines.static import static_name
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlgov.agents.policy import Policy
    from rlgov.envs.serving_env import ServingEnv
    from rlgov.records import Configuration, Limits, Window


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What one policy did with a live deployment, window by window; the first window is its start.

    ``reasons[i]`` says why the configuration of ``windows[i + 1]`` was chosen.
    """

    policy: str
    limits: Limits
    windows: tuple[Window, ...]
    reasons: tuple[str, ...]
    reward: float
    unfinished_requests: int
    last_problem: str

    @property
    def counted(self) -> tuple[Window, ...]:
        """The windows that count: those that the policy chose, as far as they were seen."""
        return tuple(window for window in self.windows[1:] if not window.blind)

    def figures(self) -> LiveFigures:
        """Reduce the run to its figures."""
        seen, held = self.counted, self.windows[1:]
        metered = [window for window in held if window.energy_j is not None]
        metered_s = math.fsum(window.duration_s for window in metered)
        seen_s = math.fsum(window.duration_s for window in seen)
        arrivals = math.fsum(window.arrivals for window in seen)
        misses = math.fsum(window.misses for window in seen)
        tokens = math.fsum(window.output_tokens for window in seen)
        energy_j = math.fsum(window.energy_j or 0.0 for window in metered)
        degrees = [window.tp_degree for window in self.windows if not window.blind]
        return LiveFigures(
            windows=len(held),
            blind_windows=len(held) - len(seen),
            unmetered_windows=len(held) - len(metered),
            duration_s=math.fsum(window.duration_s for window in held),
            energy_j=energy_j,
            mean_power_w=energy_j / metered_s if metered_s > 0 else None,
            j_per_output_token=energy_j / tokens if tokens > 0 and len(metered) == len(held) else None,
            arrivals=arrivals,
            served=math.fsum(window.served for window in seen),
            misses=misses,
            slo_attainment=max(1.0 - misses / arrivals, 0.0) if arrivals > 0 else None,
            worst_ttft_p99_s=max((w.ttft_p99_s for w in seen if w.ttft_p99_s is not None), default=None),
            worst_tpot_p99_s=max((w.tpot_p99_s for w in seen if w.tpot_p99_s is not None), default=None),
            mean_clock_mhz=_mean(seen, lambda window: window.measured_clock_mhz, seen_s),
            tp_switches=sum(a != b for a, b in pairwise(degrees)),
            unfinished_requests=self.unfinished_requests,
            reward=self.reward,
        )

    def configurations(self) -> dict[str, float]:
        """Share of the seen time spent at each configuration, the most used first."""
        spent_s: dict[Configuration, float] = {}
        for window in self.counted:
            spent_s[window.configuration] = spent_s.get(window.configuration, 0.0) + window.duration_s
        total_s = math.fsum(spent_s.values()) or 1.0
        ranked = sorted(spent_s.items(), key=lambda item: -item[1])
        return {static_name(configuration): s / total_s for configuration, s in ranked}

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "policy": self.policy,
            **asdict(self.figures()),
            "reasons": dict(Counter(self.reasons).most_common()),
            "configurations": self.configurations(),
            "last_problem": self.last_problem,
        }

    def table(self) -> Table:
        """The summary for a terminal."""
        table = Table(title=f"{self.policy} on the live deployment")
        table.add_column("figure")
        table.add_column("value", justify="right")
        for name, value in asdict(self.figures()).items():
            table.add_row(name, "-" if value is None else f"{value:,.6g}")
        for reason, count in Counter(self.reasons).most_common():
            table.add_row(f"decided by {reason}", str(count))
        for name, share in self.configurations().items():
            table.add_row(f"time at {name}", f"{share:.1%}")
        if self.last_problem:
            table.add_row("last problem", self.last_problem)
        return table


@dataclass(frozen=True, slots=True)
class LiveFigures:
    """Figures of a live run, not counting the start window.

    Energy is of all windows, blind ones included, as far as it was metered: what a blind window hides of the
    requests is counted by the first one after it.
    """

    windows: int
    blind_windows: int
    unmetered_windows: int
    duration_s: float
    energy_j: float
    mean_power_w: float | None  # while it was metered
    j_per_output_token: float | None  # None, too, when some energy is not known
    arrivals: float
    served: float
    misses: float
    slo_attainment: float | None
    worst_ttft_p99_s: float | None  # of a window
    worst_tpot_p99_s: float | None  # of a window
    mean_clock_mhz: float | None
    tp_switches: int
    unfinished_requests: int
    reward: float


def run_live(
    policy: Policy,
    env: ServingEnv,
    windows: int | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> LiveRun:
    """Let ``policy`` govern the deployment of ``env`` for one episode.

    Args:
        policy: Asked once an interval.
        env: An environment over a live deployment, with the guard the policy is meant for. It is left open.
        windows: Decisions to take; None for as long as the workload lasts or the environment allows.
        seed: Of the episode.
        progress: Called after every interval with the number of intervals done.

    Raises:
        ConfigError: ``windows`` is below 1.
        BundleError: The deployment offers other actions than the policy was trained on.
        DeploymentError: The deployment cannot start.
    """
    if windows is not None and windows < 1:
        msg = f"a run takes at least one decision, got windows={windows}"
        raise ConfigError(msg)
    policy.start(env.limits, 1)
    observation, info = env.reset(seed=seed)
    seen: list[Window] = [info["window"]]
    reasons: list[str] = []
    total = 0.0
    truncated = False
    while not truncated and (windows is None or len(reasons) < windows):
        asked = policy.decide(observation[None], info["window"].to_row()[None], info["action_mask"][None])
        observation, reward, _, truncated, info = env.step(asked[0])
        seen.append(info["window"])
        reasons.append(info["reason"])
        total += reward
        if progress is not None:
            progress(len(reasons))
    status = getattr(_innermost(env.deployment), "status", None)
    return LiveRun(
        policy=policy.name,
        limits=env.limits,
        windows=tuple(seen),
        reasons=tuple(reasons),
        reward=total,
        unfinished_requests=getattr(status, "unfinished_requests", 0),
        last_problem=getattr(status, "last_problem", ""),
    )


def _innermost(deployment: object) -> object:
    """The deployment behind recorders."""
    while (inner := getattr(deployment, "inner", None)) is not None:
        deployment = inner
    return deployment


def _mean(windows: tuple[Window, ...], value: Callable[[Window], float], duration_s: float) -> float | None:
    if duration_s <= 0:
        return None
    return math.fsum(value(window) * window.duration_s for window in windows) / duration_s
