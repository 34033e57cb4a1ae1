"""What goes in and out of the lease machine: settings, effects and their outcomes, answers.

An effect is something done to the world. The machine only names effects; whoever drives it carries them out
and says what came of each. ``None`` for a clock means *no lock*, as everywhere in rlgov.hardware.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from rlgov.hardware.clocks import ClockState

if TYPE_CHECKING:
    from rlgov.hardware.clocks import GpuCheck


@dataclass(frozen=True, slots=True)
class KeeperSettings:
    """What the administrator decides. No client can change any of it."""

    floor_mhz: int = 0
    """No lock below this clock: a lower wish is raised to the lowest supported clock above it."""
    ceiling_mhz: int = 100_000
    """No lock above this clock. Restoring may go above it."""
    restore_clock_mhz: int | None = None
    """The clock an administrator holds these GPUs at; None: they are not locked without rlgov."""
    shortest_lease_s: float = 1.0
    """A shorter wish is given this."""
    longest_lease_s: float = 10.0
    """A longer wish is given this. With one step of the keeper and the time a driver takes for its answer
    it has to stay below the 15 s that rlgov promises."""
    write_interval_s: float = 0.2
    """A GPU's lock changes at most so often, restoring aside."""
    settle_s: float = 0.3
    """From a lock to the first measurement that counts."""
    check_interval_s: float = 0.25
    """Between measurements of a locked GPU."""
    checks: int = 3
    """So many measurements in a row must contradict a lock before it is given up."""
    first_retry_s: float = 0.1
    """Pause after a restore that failed; doubles with every further one."""
    longest_retry_s: float = 10.0
    """Longest such pause."""
    longest_suspension_s: float = 600.0
    """A GPU whose driver ignores locks is not leased for 15 s, doubling with every further time to this."""


FIRST_SUSPENSION_S = 15.0


class Phase(StrEnum):
    """What a GPU is to the keeper."""

    FREE = "free"
    LEASED = "leased"
    RESTORING = "restoring"  # nobody's, and not yet as it was found
    YIELDED = "yielded"  # somebody else sets its clock; not leased until re-armed


@dataclass(frozen=True, slots=True)
class Offer:
    """One GPU as it may be leased."""

    uuid: str
    supported_mhz: tuple[int, ...]  # all of them, whatever the administrator's bounds
    refusal: str = ""  # why its clock must not be set, empty if it may


@dataclass(frozen=True, slots=True)
class SavedLock:
    """What a later keeper needs to put a GPU back."""

    uuid: str
    restore_clock_mhz: int | None
    clocks_mhz: tuple[int, ...]  # one of these, or what was found, is in force
    confirmed: bool = False  # measured: it is the clock
    yielded: str = ""  # why it was left to somebody else; empty: it was not


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end, as the kernel tells."""

    pid: int
    uid: int


# ---------------------------------------------------------------------- effects and outcomes


@dataclass(frozen=True, slots=True)
class Save:
    """Keep this durably, in place of what was kept of that GPU."""

    lock: SavedLock


@dataclass(frozen=True, slots=True)
class Forget:
    """Nothing is to be restored on this GPU."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Claim:
    """Make sure that no other process sets this GPU's clock."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Unclaim:
    """Let other processes set this GPU's clock."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Inspect:
    """Find out whether this GPU may still be set: partitioned or shared ones may not. Changes nothing."""

    uuid: str


@dataclass(frozen=True, slots=True)
class SetLock:
    """Hold a GPU at a clock."""

    uuid: str
    sm_clock_mhz: int


@dataclass(frozen=True, slots=True)
class ResetLock:
    """Remove a GPU's lock."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Measure:
    """Read clock and throttle reasons. Its outcome is a ClockState where it goes well."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Note:
    """Tell the administrator. Never fails."""

    text: str
    grave: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """An effect that was not carried out, or not for certain."""

    message: str
    code: str = ""  # the driver's, such as GPU_IS_LOST


Effect: TypeAlias = Save | Forget | Claim | Unclaim | Inspect | SetLock | ResetLock | Measure | Note
Outcome: TypeAlias = ClockState | Failure | None
Result = TypeVar("Result")
Steps: TypeAlias = Generator[Effect, Outcome, Result]
"""Names one effect after the other, is sent the outcome of each, and returns a result."""


# ---------------------------------------------------------------------- answers


class Code(StrEnum):
    """Why the keeper says no."""

    UNKNOWN_GPU = "unknown_gpu"
    NOT_ALLOWED = "not_allowed"  # this GPU's clock must not be set, or not by this client
    TAKEN = "taken"  # leased to another client, or claimed by another process
    WRONG_GROUP = "wrong_group"  # the client's lease covers other GPUs
    NO_CLOCK = "no_clock"  # no such clock
    TOO_SOON = "too_soon"  # the lock changed a moment ago, or is being looked into
    RESTORING = "restoring"
    SUSPENDED = "suspended"  # its driver ignored our locks
    FOREIGN_WRITER = "foreign_writer"
    LEASE_LOST = "lease_lost"
    NO_LEASE = "no_lease"
    DRIVER = "driver"  # the driver refused
    CANNOT_SAVE = "cannot_save"
    MALFORMED = "malformed"
    VERSION = "version"
    STOPPING = "stopping"


class Refused(Exception):  # noqa: N818  # an answer, not an error of the program
    """The keeper's no.

    Args:
        code: For programs.
        message: For people.
        gpus: The GPUs it is about.
    """

    def __init__(self, code: Code, message: str, gpus: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.gpus = gpus


@dataclass(frozen=True, slots=True)
class Lease:
    """What a client holds."""

    gpus: tuple[str, ...]
    sm_clock_mhz: int  # in force, after the administrator's bounds and the supported clocks
    ttl_s: float
    left_s: float


@dataclass(frozen=True, slots=True)
class Checked:
    """A lease, and what was measured just now."""

    sm_clock_mhz: int
    since_lock_s: float
    left_s: float
    gpus: tuple[GpuCheck, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """One GPU in the keeper's account of itself."""

    uuid: str
    phase: Phase
    supported_mhz: tuple[int, ...]  # within the administrator's bounds
    sm_clock_mhz: int | None = None  # locked
    owner: Peer | None = None
    left_s: float | None = None  # of its lease
    verdict: str = ""  # of the last measurement
    attempts: int = 0  # to restore it, that failed
    lost: bool = False
    why: str = ""  # what last went wrong, or why it is not leased


@dataclass(frozen=True, slots=True)
class KeeperState:
    """The keeper's account of itself."""

    gpus: tuple[Kept, ...]
    counts: dict[str, int] = field(default_factory=dict)  # what happened since the start, by kind
