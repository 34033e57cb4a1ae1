"""One answer of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARN = "warn"  # serving works, something is less than it could be
    FAIL = "fail"  # serving, or what was asked about, does not work


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    level: Level
    said: str
    remedy: str = ""  # empty when there is nothing to do


def ok(check: str, said: str) -> Finding:
    """A finding that needs nothing done."""
    return Finding(check, Level.OK, said)


def warn(check: str, said: str, remedy: str) -> Finding:
    """A finding that serving survives."""
    return Finding(check, Level.WARN, said, remedy)


def fail(check: str, said: str, remedy: str) -> Finding:
    """A finding that must be dealt with first."""
    return Finding(check, Level.FAIL, said, remedy)
