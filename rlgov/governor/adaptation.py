"""How far a deployment is from its profile, and scale factors that slowly follow it. Pure; opt-in.

Every window that can be judged gives two ratios: measured over predicted length of an iteration, and measured
over predicted power, both at the configuration in force and by the profile's own tables. They are kept for
each configuration. The factors follow the median of all that is kept, slowly and within bounds, so neither
outliers nor the order of windows matter much. They go into predictions (the forecast of what decisions save,
and EcoFreq where it stands in for a policy), never into the observation: its features mean what they meant
in training.

A configuration whose median lies too far from the profile is told as drift: then it is time to measure anew.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.errors import ConfigError
from rlgov.governor.records import Adapted, Drift
from rlgov.hardware.clocks import Verdict
from rlgov.records import Configuration
from rlgov.simulation.forecast import Scales

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from rlgov.governor.facts import Facts
    from rlgov.records import Limits, Window
    from rlgov.simulation.forecast import Forecast

MOST_CONFIGURATIONS: Final = 64
"""Kept at a time; the one that was in force longest ago goes first."""
GROSS: Final = math.log(4.0)
"""Ratios count as no farther from 1 than by this factor."""
_BUSY: Final = 0.3  # share of a window below which idle time decides what is measured
_LEAST_TOKENS: Final = 16.0
_THROTTLED: Final = 0.05
_CLOCK_SLACK: Final = 0.03  # of the clock in force
_EXCUSED: Final = frozenset({Verdict.EXCUSED, Verdict.UNVERIFIED})


@dataclass(frozen=True, slots=True)
class AdaptationSettings:
    """How fast the profile's factors follow what is measured, and when that is too far."""

    samples: int = 30
    """Windows of a configuration, before anything is concluded from it."""
    keep: int = 64
    """Windows kept of each configuration: none counts for more than so many."""
    forget_s: float = 21_600.0
    """Windows older than this no longer count."""
    step: float = 0.002
    """The most a factor moves in one window, as a share of itself."""
    bound: float = 1.5
    """A factor stays between 1 / bound and bound."""
    drift: float = 0.2
    """A configuration this far from the profile is drift (a share); its stated error, where that is more."""
    calm: float = 0.75
    """Drift is over below this share of that distance."""

    def __post_init__(self) -> None:
        sound = (
            1 <= self.samples <= self.keep <= 10_000  # noqa: PLR2004  # a bound on memory
            and self.forget_s > 0
            and 0 < self.step <= 0.1  # noqa: PLR2004  # slowly
            and 1 < self.bound <= 4.0  # noqa: PLR2004  # as GROSS
            and 0 < self.drift <= 1.0
            and 0 < self.calm <= 1.0
        )
        if not sound:
            raise ConfigError(
                f"adaptation settings out of range: {self}; need 1 <= samples <= keep <= 10000, "
                "forget_s above 0, step in 0..0.1, bound in 1..4, drift and calm in 0..1"
            )


@dataclass(frozen=True, slots=True)
class Sample:
    """One window: natural logarithms of measured over predicted."""

    at_s: float  # monotonic
    time: float
    power: float


class Adaptation:
    """Keeps what was measured against a profile, and the factors that follow it.

    Args:
        settings: How fast, how far.
        limits: Of the deployment: which configurations are told apart.
        forecast: Of the profile; its scales are set here.
        stated_error: Relative error that the profile states of itself.
        advice: What to do about drift: a command.
    """

    def __init__(
        self,
        settings: AdaptationSettings,
        limits: Limits,
        forecast: Forecast,
        *,
        stated_error: float = 0.0,
        advice: str = "measure this deployment anew: rlgov characterize, then rlgov calibrate",
    ) -> None:
        self.settings = settings
        self.advice = advice
        self._limits = limits
        self._forecast = forecast
        self._threshold = math.log1p(max(settings.drift, stated_error))
        self._cells: OrderedDict[Configuration, deque[Sample]] = OrderedDict()
        self._log = [0.0, 0.0]  # of the factors in force: time, power
        self._drifting: set[Configuration] = set()
        self._before: Configuration | None = None
        self.told = Adapted()
        """What there is to tell after the last window."""

    @property
    def scales(self) -> Scales:
        """The factors in force."""
        return Scales(math.exp(self._log[0]), math.exp(self._log[1]))

    def look(self, window: Window, facts: Facts, *, sound: bool) -> bool:
        """Take a window in.

        Args:
            window: What was seen.
            facts: The world beside it.
            sound: Whether the guard trusts the window, and the engine makes progress.

        Returns:
            Whether it counted.
        """
        ratios = self._ratios(window, facts) if sound and not window.blind else None
        self._before = None if window.blind or not sound else _in_force(window)
        if ratios is None:
            return False
        self.add(window.configuration, Sample(facts.now_s, *ratios))
        return True

    def add(self, configuration: Configuration, sample: Sample) -> None:
        """Take one judged window in, and let the factors follow."""
        if not (math.isfinite(sample.time) and math.isfinite(sample.power) and math.isfinite(sample.at_s)):
            return
        cell = self._cells.setdefault(self._bucket(configuration), deque(maxlen=self.settings.keep))
        self._cells.move_to_end(self._bucket(configuration))
        cell.append(Sample(sample.at_s, _clipped(sample.time, GROSS), _clipped(sample.power, GROSS)))
        if len(self._cells) > MOST_CONFIGURATIONS:
            gone, _ = self._cells.popitem(last=False)
            self._drifting.discard(gone)
        self._forget(sample.at_s)
        self._follow()
        self._judge()

    def samples(self) -> dict[Configuration, tuple[Sample, ...]]:
        """Everything kept, by configuration, the one in force last at the end."""
        return {configuration: tuple(cell) for configuration, cell in self._cells.items()}

    def resume(self, scales: Scales, samples: dict[Configuration, Iterable[Sample]], now_s: float) -> None:
        """Go on where an earlier run of the same profile on the same GPUs stopped."""
        most = math.log(self.settings.bound)
        self._log = [_clipped(math.log(scales.time), most), _clipped(math.log(scales.power), most)]
        for configuration, kept in list(samples.items())[-MOST_CONFIGURATIONS:]:
            self._cells[self._bucket(configuration)] = deque(kept, maxlen=self.settings.keep)
        self._forget(now_s)
        self._forecast.scales = self.scales
        self._judge()

    # ------------------------------------------------------------------ one window

    def _ratios(self, window: Window, facts: Facts) -> tuple[float, float] | None:
        configuration = _in_force(window)
        if configuration is None or configuration != self._before or not _steady(window, facts):
            return None
        try:
            expected = self._forecast.seen(window)
        except (ValueError, OverflowError, ZeroDivisionError, IndexError):
            return None  # numbers that no deployment can have
        if expected is None or window.energy_j is None or window.itl_mean_s is None:
            return None
        measured = (window.itl_mean_s, window.energy_j / window.duration_s)
        pairs = zip(measured, (expected.iteration_s, expected.power_w), strict=True)
        ratios = [_log_ratio(numerator, denominator) for numerator, denominator in pairs]
        if None in ratios:
            return None
        return ratios[0], ratios[1]  # type: ignore[return-value]  # none of them is None

    def _bucket(self, configuration: Configuration) -> Configuration:
        """The offered configuration that stands for it: the smallest cap that is no smaller."""
        caps = [cap for cap in self._limits.batch_caps if cap >= configuration.batch_cap]
        cap = caps[-1] if caps else self._limits.batch_caps[0]
        return Configuration(configuration.sm_clock_mhz, cap, configuration.tp_degree)

    # ------------------------------------------------------------------ all of them

    def _forget(self, now_s: float) -> None:
        oldest_s = now_s - self.settings.forget_s
        for configuration in tuple(self._cells):
            cell = self._cells[configuration]
            while cell and cell[0].at_s < oldest_s:
                cell.popleft()
            if not cell:
                del self._cells[configuration]
                self._drifting.discard(configuration)

    def _follow(self) -> None:
        kept = _array(sample for cell in self._cells.values() for sample in cell)
        if len(kept) < self.settings.samples:
            return
        step, most = math.log1p(self.settings.step), math.log(self.settings.bound)
        for at, target in enumerate(np.median(kept, axis=0)):
            moved = self._log[at] + _clipped(float(target) - self._log[at], step)
            self._log[at] = _clipped(moved, most)
        self._forecast.scales = self.scales

    def _judge(self) -> None:
        """Which configurations lie too far from the profile; the farthest is told first."""
        drifts: list[tuple[float, Drift]] = []
        for configuration, cell in self._cells.items():
            if len(cell) < self.settings.samples:
                continue
            time, power = (float(value) for value in np.median(_array(cell), axis=0))
            far = max(abs(time), abs(power))
            limit = self._threshold * (self.settings.calm if configuration in self._drifting else 1.0)
            (self._drifting.add if far > limit else self._drifting.discard)(configuration)
            drift = Drift(configuration, len(cell), math.exp(time), math.exp(power))
            drifts.append((far, drift))
        drifts.sort(key=lambda pair: -pair[0])
        scales = self.scales
        self.told = Adapted(
            time_scale=scales.time,
            power_scale=scales.power,
            samples=sum(map(len, self._cells.values())),
            configurations=tuple(drift for _, drift in drifts),
            drifting=tuple(drift for _, drift in drifts if drift.configuration in self._drifting),
            threshold=math.expm1(self._threshold),
        )


def _steady(window: Window, facts: Facts) -> bool:
    """Whether a window shows the configuration in force at work, and nothing else."""
    energy_j = window.energy_j
    if energy_j is None or not energy_j > 0 or window.itl_mean_s is None or not window.itl_mean_s > 0:
        return False
    verdicts = {gpu.verdict for gpu in facts.check.gpus}
    return (
        0 < window.duration_s < math.inf
        and _BUSY <= window.busy_fraction <= 1.0 + _CLOCK_SLACK
        and _LEAST_TOKENS <= window.output_tokens < math.inf
        and 0 <= window.arrivals < math.inf
        and 0 <= window.prefill_tokens < math.inf
        and 0 <= window.kv_usage <= 1.0
        and window.switching == 0
        and window.preemptions == 0
        and window.throttled_fraction <= _THROTTLED
        and abs(window.measured_clock_mhz - window.sm_clock_mhz) <= _CLOCK_SLACK * window.sm_clock_mhz
        and not (facts.unread_because or facts.blind_because)
        and (facts.check.asked_mhz is None or not verdicts & _EXCUSED)
    )


def _in_force(window: Window) -> Configuration | None:
    try:
        configuration = window.configuration
    except (ValueError, OverflowError):  # NaN or infinity
        return None
    return configuration if min(configuration.sm_clock_mhz, configuration.batch_cap) > 0 else None


def _log_ratio(measured: float, expected: float) -> float | None:
    if not (0 < measured < math.inf and 0 < expected < math.inf):
        return None
    return math.log(measured) - math.log(expected)


def _clipped(value: float, most: float) -> float:
    return min(max(value, -most), most)


def _array(samples: Iterable[Sample]) -> NDArray[np.float64]:
    return np.array([(sample.time, sample.power) for sample in samples], dtype=np.float64).reshape(-1, 2)
