"""What the governor's core is told beside a window: values only, gathered by the loop once an interval."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlgov.hardware.clocks import ClockCheck

if TYPE_CHECKING:
    from rlgov.errors import RlgovError
    from rlgov.hardware.events import XidEvent


@dataclass(frozen=True, slots=True)
class Facts:
    """The world beside the window, at its end."""

    now_s: float  # monotonic
    wall_s: float
    acting: bool = False  # whether the last decision was carried out
    check: ClockCheck = field(default_factory=lambda: ClockCheck(None, ()))
    clock_error: RlgovError | None = None  # of setting, renewing, checking or restoring; None: all went well
    clock_failures_in_a_row: int = 0
    rival: str = ""  # another governor that acts on this stack; empty when there is none
    failures: dict[str, int] = field(default_factory=dict)  # since the start, by what failed and how
    unread_because: str = ""  # why the stack could not be read; empty when it could
    blind_because: str = ""  # why the window is blind; empty when it is not
    stack_conditions: dict[str, str] = field(default_factory=dict)
    tp_refused: dict[int, str] = field(default_factory=dict)
    engine: tuple[int, str] | None = None  # TP degree and process of the engine that serves; None: not known
    cap_holder: str = "none"
    faults: tuple[XidEvent, ...] = ()
    lost_gpus: tuple[str, ...] = ()  # that fell off the bus, as far as reading them tells
    lease_left_s: float | None = None
    overruns: int = 0  # since the start
    journal_dropped: int = 0  # lines, since the start
    journal_problem: str = ""
