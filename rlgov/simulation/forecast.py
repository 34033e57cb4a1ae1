"""What a profile expects of the next interval, if the load stays as it is: without simulating it.

The load of a window is taken to be steady: so many tokens generated and prompt tokens computed a second. At
another clock or TP degree iterations take longer or shorter, and by Little's law as many more or fewer
requests run at a time; energy follows from the profile's tables. That serves for saying what a decision would
save, not for deciding: queues, bursts and what a slow window leaves to the next one are left out.

:meth:`Forecast.seen` looks the other way: what the tables would have expected of a window that was measured.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.errors import ConfigError
from rlgov.simulation.physics import effective_clock_index, iteration_energy_j, iteration_time_s

if TYPE_CHECKING:
    from rlgov.records import Configuration, Limits, Window
    from rlgov.simulation.profile import Profile
    from rlgov.simulation.tables import PhysicsTables

UNSTATED_ERROR: Final = 0.25
"""Taken for the error of a profile that states none: one made by physics alone."""

_ROUNDS = 12  # of the fixed point
_STEP = 0.8  # of the way, so that it does not swing
_CLOSE = 1e-2
_SLACK = 0.02


@dataclass(frozen=True, slots=True)
class Scales:
    """Factors on what the tables expect; 1 is the profile as it is."""

    time: float = 1.0  # of how long an iteration takes
    power: float = 1.0  # of what the GPUs draw, given how long iterations take


UNSCALED: Final = Scales()


@dataclass(frozen=True, slots=True)
class Seen:
    """What the tables, unscaled, expect of the very iterations that a window saw."""

    iteration_s: float  # mean of its iterations
    power_w: float  # of all allotted GPUs, given how long its iterations took


@dataclass(frozen=True, slots=True)
class Expectation:
    """Of one interval at one configuration."""

    power_w: float  # of all allotted GPUs
    itl_s: float  # gap between tokens, or the length of an iteration where nothing is decoded
    energy_j: float
    saturated: bool  # the load is more than this configuration carries


class Forecast:
    """Expectations of one profile.

    Args:
        tables: Its physics.
        limits: Of the deployment; its TP degrees and clocks are those of the tables.

    Raises:
        ConfigError: The tables are of another deployment.
    """

    def __init__(self, tables: PhysicsTables, limits: Limits) -> None:
        if tuple(tables.tp_degrees.tolist()) != limits.tp_degrees:
            degrees = tables.tp_degrees.tolist()
            msg = f"tables of TP {degrees} for limits of TP {limits.tp_degrees}; use those of one profile"
            raise ConfigError(msg)
        self._tables = tables
        self._limits = limits
        self.scales = UNSCALED
        """What :meth:`expect` multiplies times and power by."""

    def expect(self, window: Window, configuration: Configuration) -> Expectation:
        """What an interval as busy as ``window`` takes at ``configuration``."""
        tables, limits, scales = self._tables, self._limits, self.scales
        j, asked = self._at(configuration)
        duration_s = max(window.duration_s, 1e-9)
        decoded_per_s = max(window.output_tokens, 0.0) / duration_s
        prefilled_per_s = max(window.prefill_tokens, 0.0) / duration_s
        prompt = window.prompt_tokens / window.arrivals if window.arrivals > 0 else window.prefill_tokens
        context = self._context_tokens(window)
        cap = min(configuration.batch_cap, tables.decode_memory_s.shape[1] - 1)

        idle_w = scales.power * float(tables.idle_w[asked])
        idle_gpus = tables.allotted_gpus - configuration.tp_degree
        if decoded_per_s + prefilled_per_s <= 0:
            power_w = idle_w * tables.allotted_gpus
            return Expectation(power_w, 0.0, power_w * limits.interval_s, saturated=False)

        def iteration(work: tuple[int, float, float, float]) -> tuple[float, float]:
            took_s, energy_j, busy_w = self._iteration(j, asked, work)
            longer_j = busy_w * (scales.time - 1.0) * took_s
            return scales.time * took_s, scales.power * (energy_j + longer_j)

        # Iterations of two kinds: those that also compute a chunk of a prompt, and those that only decode.
        batch = min(max(window.running_mean, 1.0), float(cap)) if decoded_per_s > 0 else 0.0
        plain_s = plain_j = mixed_s = mixed_j = chunks_per_s = 0.0
        for _ in range(_ROUNDS if batch else 1):
            decodes = round(batch)
            if batch:
                plain_s, plain_j = iteration((decodes, batch * context, 0.0, 0.0))
            if prefilled_per_s > 0:
                chunk = min(max(prompt, 1.0), max(float(tables.max_num_batched_tokens) - decodes, 1.0))
                chunks_per_s = prefilled_per_s / chunk
                mixed_s, mixed_j = iteration((decodes, batch * context, chunk, chunk * prompt / 2))
            before, left = batch, 1.0 - chunks_per_s * (mixed_s - plain_s)
            wanted = decoded_per_s * plain_s / left if left > 0 else float(cap)
            batch = min(max(batch + _STEP * (wanted - batch), 1.0), float(cap)) if batch else 0.0
            if abs(batch - before) <= _CLOSE * before:
                break
        iterations_per_s = max(decoded_per_s / batch if batch else 0.0, chunks_per_s)
        plain_per_s = iterations_per_s - chunks_per_s
        busy = chunks_per_s * mixed_s + plain_per_s * plain_s
        share = min(1.0 / busy, 1.0)
        power_w = share * (chunks_per_s * mixed_j + plain_per_s * plain_j)
        power_w += idle_w * (max(1.0 - busy, 0.0) * configuration.tp_degree + idle_gpus)
        itl_s = busy / iterations_per_s
        if batch:  # prompts take their share of the time, whether or not the engine is always busy
            itl_s = plain_s / max(1.0 - chunks_per_s * (mixed_s - plain_s), plain_s / max(itl_s, plain_s))
        return Expectation(power_w, itl_s, power_w * limits.interval_s, saturated=busy > 1.0 + _SLACK)

    def seen(self, window: Window) -> Seen | None:
        """What the tables, unscaled, expect of the iterations of ``window`` at the configuration in force.

        How many there were, and how large, follows from what was measured; so a deployment that takes longer
        than the tables say shows by that factor, and not by the queues that come of it.

        Returns:
            None where too little was measured to tell.
        """
        tables = self._tables
        configuration = window.configuration
        if configuration.tp_degree not in self._limits.tp_degrees or not window.itl_mean_s:
            return None
        busy_s = window.busy_fraction * window.duration_s
        iterations = busy_s / window.itl_mean_s
        decoded = (
            window.output_tokens - window.arrivals
        )  # about one first token an arrival comes of a prefill
        if iterations < 1.0 or decoded < 1.0:
            return None
        j, asked = self._at(configuration)
        cap = min(configuration.batch_cap, tables.decode_memory_s.shape[1] - 1)
        batch = min(max(decoded / iterations, 1.0), float(cap))
        decodes, context = round(batch), batch * self._context_tokens(window)
        chunks = chunk = prompt = 0.0
        if window.prefill_tokens > 0:
            prompt = window.prompt_tokens / window.arrivals if window.arrivals > 0 else window.prefill_tokens
            chunk = min(max(prompt, 1.0), max(float(tables.max_num_batched_tokens) - decodes, 1.0))
            chunk = max(chunk, window.prefill_tokens / iterations)  # several prompts in one iteration
            chunks = min(window.prefill_tokens / chunk, iterations)
        plain = (iterations - chunks, self._iteration(j, asked, (decodes, context, 0.0, 0.0)))
        mixed = (chunks, self._iteration(j, asked, (decodes, context, chunk, chunk * prompt / 2)))
        took_s = math.fsum(count * part[0] for count, part in (plain, mixed))
        energy_j = math.fsum(count * part[1] for count, part in (plain, mixed))
        energy_j += plain[1][2] * (busy_s - took_s)
        idle_gpus = tables.allotted_gpus - configuration.tp_degree
        idle_share = max(1.0 - window.busy_fraction, 0.0)
        idle_w = float(tables.idle_w[asked]) * (idle_share * configuration.tp_degree + idle_gpus)
        return Seen(took_s / iterations, energy_j / window.duration_s + idle_w)

    def _at(self, configuration: Configuration) -> tuple[int, int]:
        """Indices of the TP degree and of the clock."""
        grid = self._tables.grid_clocks_mhz
        asked = min(int(np.searchsorted(grid, configuration.sm_clock_mhz)), len(grid) - 1)
        return self._limits.tp_degrees.index(configuration.tp_degree), asked

    def _iteration(
        self, j: int, asked: int, work: tuple[int, float, float, float]
    ) -> tuple[float, float, float]:
        """Duration, energy, and power before its work, of one iteration by the tables, within TDP."""
        tables = self._tables
        k = effective_clock_index(tables, j, asked, *work)
        took_s = iteration_time_s(tables, j, k, *work)
        return took_s, iteration_energy_j(tables, j, k, *work), float(tables.busy_w[j, k])

    def _context_tokens(self, window: Window) -> float:
        """Of one running request."""
        limits = self._limits
        if window.running <= 0 or int(window.tp_degree) not in limits.tp_degrees:
            return 0.0
        capacity = limits.kv_capacity_tokens[limits.tp_degrees.index(int(window.tp_degree))]
        return window.kv_usage * capacity / window.running


def stated_error(profile: Profile) -> float:
    """The worst relative error that a profile states of its own parameters, as a share."""
    texts = [
        parameter.error
        for name in type(profile.parameters).model_fields
        if (parameter := getattr(profile.parameters, name)) is not None and parameter.error
    ]
    shares = [float(found) / 100 for text in texts for found in re.findall(r"([\d.]+)\s*%", text)]
    return max(shares, default=UNSTATED_ERROR)
