"""What a profile expects of the next interval, if the load stays as it is: without simulating it.

The load of a window is taken to be steady: so many tokens generated and prompt tokens computed a second. At
another clock or TP degree iterations take longer or shorter, and by Little's law as many more or fewer
requests run at a time; energy follows from the profile's tables. That serves for saying what a decision would
save, not for deciding: queues, bursts and what a slow window leaves to the next one are left out.
"""

from __future__ import annotations

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

_ROUNDS = 30  # of the fixed point; each about halves what is missing
_CLOSE = 1e-4
_SLACK = 0.02


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

    def expect(self, window: Window, configuration: Configuration) -> Expectation:
        """What an interval as busy as ``window`` takes at ``configuration``."""
        tables, limits = self._tables, self._limits
        j = limits.tp_degrees.index(configuration.tp_degree)
        asked = int(np.searchsorted(tables.grid_clocks_mhz, configuration.sm_clock_mhz))
        asked = min(asked, len(tables.grid_clocks_mhz) - 1)
        duration_s = max(window.duration_s, 1e-9)
        decoded_per_s = max(window.output_tokens, 0.0) / duration_s
        prefilled_per_s = max(window.prefill_tokens, 0.0) / duration_s
        prompt = window.prompt_tokens / window.arrivals if window.arrivals > 0 else window.prefill_tokens
        context = self._context_tokens(window)
        cap = min(configuration.batch_cap, tables.decode_memory_s.shape[1] - 1)

        idle_w = float(tables.idle_w[asked])
        idle_gpus = tables.allotted_gpus - configuration.tp_degree
        if decoded_per_s + prefilled_per_s <= 0:
            power_w = idle_w * tables.allotted_gpus
            return Expectation(power_w, 0.0, power_w * limits.interval_s, saturated=False)

        def iteration(work: tuple[int, float, float, float]) -> tuple[float, float]:
            k = effective_clock_index(tables, j, asked, *work)
            return iteration_time_s(tables, j, k, *work), iteration_energy_j(tables, j, k, *work)

        # Iterations of two kinds: those that also compute a chunk of a prompt, and those that only decode.
        batch = 1.0 if decoded_per_s > 0 else 0.0
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
            batch = min(max(0.5 * (batch + wanted), 1.0), float(cap)) if batch else 0.0
            if abs(batch - before) <= _CLOSE * before:
                break
        iterations_per_s = max(decoded_per_s / batch if batch else 0.0, chunks_per_s)
        plain_per_s = iterations_per_s - chunks_per_s
        busy = chunks_per_s * mixed_s + plain_per_s * plain_s
        share = min(1.0 / busy, 1.0)
        power_w = share * (chunks_per_s * mixed_j + plain_per_s * plain_j)
        power_w += idle_w * (max(1.0 - busy, 0.0) * configuration.tp_degree + idle_gpus)
        return Expectation(
            power_w, busy / iterations_per_s, power_w * limits.interval_s, saturated=busy > 1.0 + _SLACK
        )

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
