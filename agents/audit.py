"""A recorded run through the decision code again: would the same decisions be taken?

The windows of a journal go through the very observation, policy and guard that service uses. Each
decision gets a typed verdict; a different configuration is a divergence and reported as one. Windows
stay as recorded, so after a divergence the guard's dwell times follow what is decided now.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from rlgov.agents.fallback import FallbackPolicy
from rlgov.deployments.replayed import Audit, Outcome, ReplayedDeployment
from rlgov.envs.guard import GuardSettings, Reason
from rlgov.envs.serving_env import ServingEnv
from rlgov.envs.watch import WatchSettings
from rlgov.journal import GOVERNOR_MODE, observation_digest

if TYPE_CHECKING:
    from rlgov.agents.policy import Policy
    from rlgov.journal import Journal

_SHADOW = "shadow"
_HAD_ITS_WAY = frozenset({Reason.POLICY.name, Reason.IDLE.name})
AXES = ("sm_clock_mhz", "batch_cap", "tp_degree")


@dataclass(frozen=True, slots=True)
class JournalAudit:
    """What auditing a recorded run found."""

    policy: str
    audit: Audit
    reasons: tuple[str, ...]  # of the decisions taken now, aligned with the verdicts
    recorded_reasons: tuple[str | None, ...]  # None where the recording holds no decision
    observations_compared: int
    observations_differing: int

    @property
    def equal(self) -> bool:
        """Whether every decision, and every observation that can be compared, is the same again."""
        return self.audit.equal and self.observations_differing == 0

    def divergences_by_axis(self) -> dict[str, int]:
        """How many divergences touch each axis; one can touch several."""
        counts: Counter[str] = Counter()
        for verdict in self.audit.divergences:
            if verdict.recorded is not None:
                counts.update(
                    axis for axis in AXES if getattr(verdict.asked, axis) != getattr(verdict.recorded, axis)
                )
        return {axis: counts[axis] for axis in AXES}

    def reasons_changed(self) -> int:
        """Decisions that are taken for another reason now."""
        pairs = zip(self.reasons, self.recorded_reasons, strict=True)
        return sum(old is not None and now != old for now, old in pairs)

    def to_json(self) -> dict[str, object]:
        """Plain values, ``digest`` first; every verdict is in it."""
        verdicts: list[dict[str, object]] = [
            {
                "interval": verdict.interval,
                "at_s": verdict.at_s,
                "outcome": verdict.outcome.value,
                "asked": asdict(verdict.asked),
                "recorded": None if verdict.recorded is None else asdict(verdict.recorded),
                "reason": reason,
            }
            for verdict, reason in zip(self.audit.verdicts, self.reasons, strict=True)
        ]
        body: dict[str, object] = {
            "policy": self.policy,
            "equal": self.equal,
            "decisions": {outcome.value: self.audit.count(outcome) for outcome in Outcome},
            "divergences_by_axis": self.divergences_by_axis(),
            "reasons_changed": self.reasons_changed(),
            "observations_compared": self.observations_compared,
            "observations_differing": self.observations_differing,
            "verdicts": verdicts,
        }
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return {"digest": hashlib.sha256(text.encode()).hexdigest(), **body}

    def table(self) -> Table:
        """The summary for a terminal."""
        table = Table(title=f"Audit of {len(self.audit.verdicts)} decisions by {self.policy}")
        table.add_column("finding")
        table.add_column("count", justify="right")
        for outcome in Outcome:
            table.add_row(outcome.value, str(self.audit.count(outcome)))
        for axis, count in self.divergences_by_axis().items():
            table.add_row(f"diverged in {axis}", str(count))
        table.add_row("taken for another reason", str(self.reasons_changed()))
        table.add_row(
            f"observations differing (of {self.observations_compared})", str(self.observations_differing)
        )
        return table


def audit_journal(journal: Journal, policy: Policy, *, guard: GuardSettings | None = None) -> JournalAudit:
    """Put a recorded run's windows through a policy and compare its decisions with the recorded ones.

    Args:
        journal: The recording.
        policy: Asked once for each recorded window.
        guard: Settings for policies that want a guard; the default ones if None.
    """
    deployment = ReplayedDeployment(journal)
    # What a governor wrote was held by its guard, which does more than training's.
    mode = journal.header.versions.get(GOVERNOR_MODE)
    env = ServingEnv(
        deployment,
        guard=(guard or GuardSettings()) if policy.guarded or mode is not None else None,
        watch=None if mode is None else WatchSettings(),
        follow=mode == _SHADOW,
    )
    observation, info = env.reset(seed=0)
    policy.start(deployment.limits, 1)
    reasons: list[str] = []
    compared = differing = 0
    for entry in journal.intervals[:-1]:
        if entry.observation_digest:
            compared += 1
            differing += observation_digest(observation) != entry.observation_digest
        asked = policy.decide(observation[None], info["window"].to_row()[None], info["action_mask"][None])
        observation, _, _, _, info = env.step(asked[0])
        reasons.append(_reason(info["reason"], policy))
    recorded = tuple(
        None if entry.decision is None else entry.decision.reason for entry in journal.intervals[:-1]
    )
    return JournalAudit(policy.name, deployment.audit(), tuple(reasons), recorded, compared, differing)


def _reason(guards: str, policy: Policy) -> str:
    """Why a decision was taken: the guard's reason, unless it let a baseline have its way."""
    stepped_aside = isinstance(policy, FallbackPolicy) and bool(policy.fallen_back[0])
    return Reason.OOD.name if stepped_aside and guards in _HAD_ITS_WAY else guards
