"""Which part of a run is measured: after the warm-up, and steady. Pure.

**The rule.** A span of windows is steady when no signal differs between its first and its second half by
more than 5 % of its mean *and* by more than three standard errors of that difference. The first bound says
what matters, the second what can be told from chance at all: at a low rate two halves differ by more than
5 % because few requests came. Signals are output tokens a second, requests running, requests present
(running and waiting) and, where there is a meter, power. A queue that grows, a cache that fills and a GPU
that heats up all fail.

The error is estimated from ten blocks of windows, which absorbs most of what neighbouring windows have in
common, and from the differences between one block and the next, to which a drift adds little: it must not
hide behind the spread it makes itself.

In an open loop requests must also leave as they come: arrivals and answers of the span may differ by 5 %, or
by three standard deviations of chance (of Poisson arrivals less answers, at most the root of twice the
arrivals). Against a queue that is long already, what comes upon it in a span is no 5 %.

**The warm-up** lasts as long as it was asked to, and in a closed loop at least until as many requests were
answered as there are users: by then the prompts that all came at once at the beginning are dealt with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rlgov.records import Window

TOLERANCE: Final = 0.05
STANDARD_ERRORS: Final = 3.0
BLOCKS: Final = 10
FEWEST_WINDOWS: Final = 4
"""A shorter span has no halves to compare and is never steady."""


@dataclass(frozen=True, slots=True)
class Span:
    """The windows ``begin`` up to ``end`` (not included), and whether they are steady."""

    begin: int
    end: int
    steady: bool


def is_steady(signal: NDArray[np.float64]) -> bool:
    """Whether one signal, a value a window, passes the rule. A missing value fails it."""
    n = signal.size
    if n < FEWEST_WINDOWS or not np.isfinite(signal).all():
        return False
    half = n // 2
    # Of an odd number the middle one belongs to neither.
    difference = abs(float(signal[:half].mean() - signal[n - half :].mean()))
    if difference <= TOLERANCE * abs(float(signal.mean())):
        return True
    blocks = min(BLOCKS, n)
    means = np.array([block.mean() for block in np.array_split(signal, blocks)])
    variance = float((np.diff(means) ** 2).mean()) / 2  # of a block
    return difference <= STANDARD_ERRORS * math.sqrt(2 * variance / (blocks / 2))


def warm_up_windows(windows: Sequence[Window], at_least: int, users: int | None) -> int:
    """How many windows the warm-up takes; one more than there are if it is not over."""
    if users is None:
        return at_least
    answered = 0.0
    for i, window in enumerate(windows):
        answered += window.served
        if answered >= users:
            return max(at_least, i + 1)
    return max(at_least, len(windows) + 1)


def find_span(windows: Sequence[Window], warm_up: int, measured: int) -> Span:
    """The earliest steady span of ``measured`` windows after ``warm_up`` ones; else the last, not steady.

    Candidates begin a tenth of a span apart. With fewer windows than both together the span is what there
    is after the warm-up, and not steady.
    """
    last = len(windows) - measured
    if last < warm_up:
        return Span(min(warm_up, len(windows)), len(windows), steady=False)
    for begin in (*range(warm_up, last, max(measured // 10, 1)), last):
        if windows_are_steady(windows[begin : begin + measured]):
            return Span(begin, begin + measured, steady=True)
    return Span(last, len(windows), steady=False)


def windows_are_steady(windows: Sequence[Window]) -> bool:
    """Whether every signal of a span passes; a window that saw nothing, or a switch, fails it."""
    if any(window.blind or window.switching for window in windows):
        return False
    signals = [
        [window.output_tokens / window.duration_s for window in windows],
        [window.running_mean for window in windows],
        [window.running_mean + window.waiting for window in windows],
    ]
    if all(window.energy_j is not None for window in windows):
        signals.append([(window.energy_j or 0.0) / window.duration_s for window in windows])
    return _balanced(windows) and all(is_steady(np.array(signal)) for signal in signals)


def _balanced(windows: Sequence[Window]) -> bool:
    """Whether requests leave as they come; in a closed loop they always do, but for a few."""
    came = math.fsum(window.arrivals for window in windows)
    left = math.fsum(window.served for window in windows)
    return abs(came - left) <= max(TOLERANCE * came, STANDARD_ERRORS * math.sqrt(2 * max(came, left)))
