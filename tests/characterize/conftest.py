"""A deployment that answers at once, and a disk that can fail or lose its program at any moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlgov.characterize.campaign import Outcome, run_campaign
from rlgov.characterize.measure import RING_COLUMNS, Evidence, Place, Requests
from rlgov.characterize.plan import Task
from rlgov.characterize.workloads import length_class
from rlgov.clock import VirtualClock
from rlgov.config import CharacterizeSettings
from rlgov.errors import EngineError
from rlgov.records import Limits, ServiceLevel, Window

FIELDS: dict[str, float | None] = dict.fromkeys(Window.__dataclass_fields__, 0.0)
WINDOW = Window(**FIELDS)  # type: ignore[arg-type]  # every field is a number
SEEN = {"output_tokens": 10.0, "running_mean": 2.0, "served": 9.0, "arrivals": 9.0, "energy_j": 50.0}
LIMITS = Limits((1980, 1380), (8, 4), (2, 1), 1.0, ServiceLevel(1.0, 0.1), 2, 700.0, (0, 0), (0, 0), 0)
PLACE = Place("simulated", "instant", "none", measured_clock=True)


@dataclass
class InstantBench:
    """Every point gives figures that follow from its task alone, without anything being run."""

    measured: list[tuple[str, int]] = field(default_factory=list)
    """What was measured, in order, finished or not."""
    limits: Limits = LIMITS
    clocks_present: bool = True
    place: Place = PLACE
    identity: dict[str, object] = field(default_factory=lambda: {"limits": {"tdp_w": 700.0}, "physics": "a"})
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ("instant",)
    room_tokens: int | None = None
    failures: int = 0
    """So many attempts fail before the first one that does not."""

    def most_tokens(self, tp_degree: int) -> int | None:
        return self.room_tokens if tp_degree == 1 else None

    def hold(self, task: Task, longest_s: float) -> InstantHold:
        assert longest_s > 0
        self.measured.append(task.key)
        if len(self.measured) <= self.failures:
            msg = "the engine was just restarted"
            raise EngineError(msg)
        return InstantHold(task)

    def rest(self, duration_s: float) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class InstantHold:
    task: Task
    windows: int = 0

    def advance(self) -> Window:
        self.windows += 1
        return replace(WINDOW, start_s=self.windows - 1.0, duration_s=1.0, **SEEN)

    def evidence(self, begin_s: float, end_s: float) -> Evidence:
        value = float(int(self.task.point.point_id, 16) % 1000 + self.task.repeat)
        at_s = np.arange(begin_s + 0.25, end_s, 0.5)
        requests = Requests(
            at_s - 0.2, at_s - 0.1, at_s, np.full(at_s.size, value), np.full(at_s.size, 5.0),
            np.zeros(at_s.size, dtype=np.bool_),
        )  # fmt: skip
        iterations = np.ones((at_s.size, len(RING_COLUMNS)))
        iterations[:, 0] = at_s
        return Evidence(requests, iterations, value, 0.0, 1, frozenset())

    def close(self) -> None:
        pass


@pytest.fixture
def make_bench() -> type[InstantBench]:
    """Makes deployments that answer at once."""
    return InstantBench


@pytest.fixture
def run_instant() -> Callable[..., Outcome]:
    """``run_instant(out, bench, **settings)``: a campaign of 4 points on such a deployment."""

    def run(out: Path, bench: InstantBench, **changes: Any) -> Outcome:
        chosen: dict[str, Any] = {"classes": ("short-in/short-out",), "clocks": (1980,), "concurrency": (2,)}
        chosen |= {"warm_up_s": 1, "measure_s": 4, "iterations": True}
        settings = CharacterizeSettings(out=out, **chosen | changes)
        workloads = [length_class(name, settings.length_scale) for name in settings.classes]
        return run_campaign(settings, bench, workloads, VirtualClock())

    return run


class Killed(BaseException):
    """The program is gone."""


class Disk:
    """Counts the steps that change a run folder, and ends or fails the program at one of them.

    From the step it is killed at, nothing that the program does reaches the disk any more, whatever it still
    tries in its ``finally`` blocks.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        self._at: float = float("inf")
        self._error: OSError | None = None
        self._dead = False
        self._patch = patch

    @contextmanager
    def watched(self, kill_at: float = float("inf"), error: OSError | None = None) -> Iterator[None]:
        """Within it step ``kill_at`` (from 0) does not happen, or only in part; steps of an error fail."""
        self.steps, self._at, self._error, self._dead = 0, kill_at, error, False
        with self._patch.context() as patch:
            write = os.write

            def half(handle: int, content: bytes) -> int:
                return write(handle, bytes(content)[: len(content) // 2])

            patch.setattr(os, "write", self._step(os.write, half))
            for name in ("fsync", "replace", "ftruncate"):
                patch.setattr(os, name, self._step(getattr(os, name)))
            for name in ("unlink", "mkdir"):
                patch.setattr(Path, name, self._step(getattr(Path, name)))
            yield

    def _step(self, real: Callable[..., Any], part: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            if self._dead:
                raise Killed
            here = self.steps
            self.steps += 1
            if here != self._at:
                return real(*arguments, **named)
            if part is not None:
                part(*arguments)  # a write may get half way
            if self._error is not None:
                raise self._error
            self._dead = True
            raise Killed

        return step


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Watches every step that changes a run folder. What is written reaches the disk some time later."""
    monkeypatch.setattr(os, "fsync", lambda _handle: None)  # nobody pulls the plug, and it takes its time
    return Disk(monkeypatch)


@pytest.fixture
def killed() -> type[BaseException]:
    """What ends the program when the disk was told to."""
    return Killed
