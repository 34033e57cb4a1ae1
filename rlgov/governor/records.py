"""Values that cross borders inside the governor: one tick of its loop, and what does not change.

``None`` means that nothing is known, never zero. Times are seconds of the monotonic clock except where a
name says ``wall``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rlgov.records import Configuration, Decision, Limits, Window


class Mode(StrEnum):
    """How far the governor may go."""

    OBSERVE = "observe"  # watches
    SHADOW = "shadow"  # decides, and does not act
    ACTIVE = "active"  # decides and acts


class Severity(StrEnum):
    """How much a condition asks of the operator."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


CONDITIONS: Final[tuple[str, ...]] = (
    "ActuationUnverified",
    "AnotherGovernor",
    "Blind",
    "BundleMismatch",
    "EngineRestarted",
    "EngineStalled",
    "ForeignWriter",
    "GpuLost",
    "JournalDropping",
    "KeeperGone",
    "LeaseLost",
    "NoKeeper",
    "NotMetered",
    "OutOfDistribution",
    "Overrun",
    "PermissionDenied",
    "PolicyFailed",
    "ProfileDrift",
    "StackCondition",
    "StackUnreachable",
    "Throttled",
    "TpRefused",
    "Tripped",
    "WallClockJump",
)
"""Names of every condition the governor can raise, so that a surface can show all of them as absent, too."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Something that holds now and that an operator should know."""

    name: str  # one of CONDITIONS
    severity: Severity
    since_s: float
    message: str  # what is the matter
    remedy: str  # what to check or do next


@dataclass(frozen=True, slots=True)
class Actuation:
    """What became of the clock that was asked for, and who holds what."""

    clocks: str  # how clocks are set: keeper, direct, zeusd or none
    lease_left_s: float | None = None  # until the clocks are given back without a renewal
    asked_mhz: int | None = None  # None: nothing is locked by the governor
    applied_mhz: int | None = None  # locked as far as the driver said
    measured_mhz: float | None = None  # mean of the GPUs
    verdict: str = "none"  # the worst of the GPUs': held, excused, idle, unverified; none: nothing is locked
    failures: dict[str, int] = field(default_factory=dict)  # actions that failed since the start, by kind
    cap_holder: str = "none"  # plugin, gateway or none


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the profile's tables expect of the next interval, if load stays as it is."""

    power_w: float  # of all allotted GPUs, at the decided configuration
    itl_s: float  # gap between tokens, there
    energy_j: float  # of one interval, there
    fastest_energy_j: float  # of one interval at the fastest configuration with the same load
    error: float  # relative error of the profile's energies, as far as it is stated


@dataclass(frozen=True, slots=True)
class Drift:
    """How far one configuration is from the profile: medians of measured over predicted."""

    configuration: Configuration
    samples: int  # windows
    time: float  # of the length of an iteration; 1 is a perfect profile
    power: float  # of the GPUs' power, given how long iterations take


@dataclass(frozen=True, slots=True)
class Adapted:
    """What adaptation has found so far."""

    time_scale: float = 1.0  # the factors that predictions are multiplied by
    power_scale: float = 1.0
    samples: int = 0  # windows that count
    configurations: tuple[Drift, ...] = ()  # with enough of them, the farthest from the profile first
    drifting: tuple[Drift, ...] = ()  # those too far from it
    threshold: float = 0.0  # what is too far, as a share


@dataclass(frozen=True, slots=True)
class Tick:
    """One control interval: what was seen, what was decided, and what came of the last decision.

    ``window`` is what was seen; ``decision`` was taken on it and holds for the next interval. It is None
    where nothing was decided: without a policy, or with nothing that may be used.
    """

    number: int  # from 1
    at_s: float  # end of the window
    wall_s: float  # for logs
    mode: Mode  # what the operator asked for
    acting: bool  # whether the decision was carried out
    window: Window
    decision: Decision | None
    reason: str  # why: a rlgov.envs.guard.Reason by name, or OBSERVED where nothing decides
    ood_score: float | None = None  # 1 is the threshold; None without a learned policy
    baseline: bool = False  # the baseline decided in place of the policy
    conditions: tuple[Condition, ...] = ()
    actuation: Actuation = field(default_factory=lambda: Actuation("none"))
    reward_terms: dict[str, float] = field(default_factory=dict)
    prediction: Prediction | None = None
    decision_duration_s: float = 0.0
    overruns: int = 0  # intervals that took longer than they had, since the start
    adapted: Adapted | None = None  # None: adaptation is off


@dataclass(frozen=True, slots=True)
class Governed:
    """What does not change while the governor runs."""

    policy: str
    policy_digest: str
    profile: str
    gpu_names: tuple[str, ...]
    gpu_uuids: tuple[str, ...]
    model: str
    limits: Limits
    versions: dict[str, str]
    started_wall_s: float
    target: str = ""  # the control socket or the address of the engine


class CommandKind(StrEnum):
    """What an operator may ask of a running governor."""

    MODE = "mode"
    REARM = "rearm"


@dataclass(frozen=True, slots=True)
class Command:
    """One order of an operator."""

    kind: CommandKind
    mode: Mode | None = None  # of kind MODE
