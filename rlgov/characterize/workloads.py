"""What is sent at a point: classes of prompt and output lengths, or the requests of a trace. Pure.

The classes are three ranges each way, uniform within half to one and a half times their middle: a spread
keeps requests out of step, so that a closed loop gets steady, and is small enough for a class to mean
something.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from rlgov.config import nearest
from rlgov.errors import ConfigError
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROMPT_TOKENS: Final = {"short": 128, "medium": 512, "long": 2048}
OUTPUT_TOKENS: Final = {"short": 64, "medium": 256, "long": 768}
SPREAD: Final = 0.5
"""Lengths lie within ``1 - SPREAD`` and ``1 + SPREAD`` times the middle of their class."""

CLASSES: Final = tuple(f"{prompt}-in/{output}-out" for prompt in PROMPT_TOKENS for output in OUTPUT_TOKENS)
"""Every class, such as ``short-in/long-out``."""


class Lengths(Protocol):
    """Prompt and output tokens of the requests of a workload."""

    @property
    def name(self) -> str:
        """For the column ``workload``."""
        ...

    @property
    def identity(self) -> str:
        """Differs where the lengths differ."""
        ...

    @property
    def longest_tokens(self) -> int:
        """Prompt and output of the longest request."""
        ...

    def draw(self, n: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Prompt and output tokens of ``n`` requests. More requests begin with the same ones."""
        ...


@dataclass(frozen=True, slots=True)
class LengthClass:
    """Uniform lengths around a middle."""

    name: str
    prompt_tokens: int
    output_tokens: int

    @property
    def identity(self) -> str:
        """The ranges themselves."""
        return f"{_bounds(self.prompt_tokens)}/{_bounds(self.output_tokens)}"

    @property
    def longest_tokens(self) -> int:
        """Prompt and output at the upper ends of their ranges."""
        return _bounds(self.prompt_tokens)[1] + _bounds(self.output_tokens)[1]

    def draw(self, n: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Independent of each other, both uniform."""
        prompt_rng, output_rng = rng.spawn(2)
        (prompt_low, prompt_high), (output_low, output_high) = map(
            _bounds, (self.prompt_tokens, self.output_tokens)
        )
        return (
            prompt_rng.integers(prompt_low, prompt_high, n, endpoint=True),
            output_rng.integers(output_low, output_high, n, endpoint=True),
        )


def _bounds(middle: int) -> tuple[int, int]:
    return max(round(middle * (1 - SPREAD)), 1), max(round(middle * (1 + SPREAD)), 1)


def length_class(name: str, length_scale: float = 1.0) -> LengthClass:
    """A class by its name; with another scale than 1 that is part of its name.

    Raises:
        ConfigError: There is no such class.
    """
    if name not in CLASSES:
        msg = f"no class of lengths {name!r}; {nearest(name, CLASSES)}"
        raise ConfigError(msg)
    prompt, output = (part.split("-")[0] for part in name.split("/"))
    label = name if length_scale == 1 else f"{name} x{length_scale:g}"
    return LengthClass(
        label,
        max(round(PROMPT_TOKENS[prompt] * length_scale), 1),
        max(round(OUTPUT_TOKENS[output] * length_scale), 1),
    )


@dataclass(frozen=True, slots=True, eq=False)
class TraceLengths:
    """The lengths of a trace, from a place that the seed chooses, in their order; at the end it begins anew.

    Prefix cache hits of the trace are left out: every prompt is computed whole.
    """

    trace: Trace

    def __post_init__(self) -> None:
        if not len(self.trace):
            msg = f"trace {self.trace.name}: no request in it; choose a longer slice to characterise with"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """With ``trace:`` before the trace's own."""
        return f"trace:{self.trace.name}"

    @property
    def identity(self) -> str:
        """A digest of the lengths."""
        columns = (self.trace.prompt_tokens, self.trace.output_tokens)
        return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()[:16]

    @property
    def longest_tokens(self) -> int:
        """Of the trace's longest request."""
        return int((self.trace.prompt_tokens + self.trace.output_tokens).max())

    def draw(self, n: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Requests in the order of the trace."""
        first = int(rng.integers(len(self.trace)))
        at = (first + np.arange(n)) % len(self.trace)
        return self.trace.prompt_tokens[at], self.trace.output_tokens[at]


def closed_requests(lengths: Lengths, concurrency: int, n: int, seed: list[int]) -> Trace:
    """Requests for a closed loop; all arrive at 0, and who sends them says when.

    The first ``concurrency`` outputs are cut at a random share, as if their users had begun before: without
    that all users would stay in step for many requests.
    """
    length_rng, cut_rng = np.random.default_rng(seed).spawn(2)
    prompt, output = lengths.draw(n, length_rng)
    shares = cut_rng.random(min(concurrency, n))
    output = output.copy()
    output[: shares.size] = np.maximum(np.ceil(output[: shares.size] * shares), 1).astype(np.int64)
    zeros = np.zeros(n, dtype=np.int64)
    return Trace(f"closed {lengths.name}", np.zeros(n), prompt, output, zeros, 0.0)


def open_requests(lengths: Lengths, rate_per_s: float, duration_s: float, seed: list[int]) -> Trace:
    """Poisson arrivals over ``duration_s``; a longer time begins with the same requests."""
    gap_rng, length_rng = np.random.default_rng(seed).spawn(2)
    n = int(rate_per_s * duration_s + 6 * np.sqrt(rate_per_s * duration_s) + 16)
    arrival_s = np.cumsum(gap_rng.exponential(1 / rate_per_s, n))
    keep = int(np.searchsorted(arrival_s, duration_s))
    prompt, output = lengths.draw(n, length_rng)
    return Trace(
        f"open {lengths.name}",
        arrival_s[:keep].copy(),
        prompt[:keep].copy(),
        output[:keep].copy(),
        np.zeros(keep, dtype=np.int64),
        duration_s,
    )
