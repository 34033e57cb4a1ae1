"""Heavy-tailed prompt and output lengths: a mixture of bivariate lognormals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LengthComponent:
    """One lognormal bump. Means and deviations are of the natural logarithm of the token counts.

    Samples above ``max_prompt_tokens`` or ``max_output_tokens`` are set to it, as a context limit does.
    """

    weight: float
    prompt_log_mean: float
    prompt_log_std: float
    output_log_mean: float
    output_log_std: float
    log_correlation: float
    max_prompt_tokens: int
    max_output_tokens: int

    def __post_init__(self) -> None:
        usable = (
            self.weight > 0
            and self.prompt_log_std >= 0
            and self.output_log_std >= 0
            and abs(self.log_correlation) <= 1
            and min(self.max_prompt_tokens, self.max_output_tokens) >= 1
            and math.isfinite(self.prompt_log_mean + self.output_log_mean + self.weight)
        )
        if not usable:
            msg = (
                f"{self} cannot be sampled; weights must be above 0, deviations at least 0, the correlation "
                "within -1..1 and the limits at least 1 token"
            )
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class LengthMixture:
    """Joint distribution of prompt and output tokens. Weights need not sum to 1."""

    components: tuple[LengthComponent, ...]

    def __post_init__(self) -> None:
        if not self.components:
            msg = "a length mixture needs at least one component"
            raise ConfigError(msg)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw ``n`` pairs: prompt tokens and output tokens, each at least 1."""
        table = np.array(
            [
                (
                    c.weight,
                    c.prompt_log_mean,
                    c.prompt_log_std,
                    c.output_log_mean,
                    c.output_log_std,
                    c.log_correlation,
                    c.max_prompt_tokens,
                    c.max_output_tokens,
                )
                for c in self.components
            ]
        )
        share = table[:, 0] / table[:, 0].sum()
        drawn = table[rng.choice(len(table), size=n, p=share)]
        _, prompt_mean, prompt_std, output_mean, output_std, rho, prompt_max, output_max = drawn.T
        first, second = rng.standard_normal((2, n))
        prompt = prompt_mean + prompt_std * first
        output = output_mean + output_std * (rho * first + np.sqrt(1 - rho**2) * second)
        return _tokens(prompt, prompt_max), _tokens(output, output_max)

    def blended(self, other: LengthMixture, other_share: float) -> LengthMixture:
        """A mixture in which ``other_share`` of the requests (0..1) are of ``other``."""
        if not 0 <= other_share <= 1:
            msg = f"other_share must lie between 0 and 1, got {other_share}"
            raise ConfigError(msg)
        parts = [(self, 1 - other_share), (other, other_share)]
        components = tuple(
            replace(c, weight=c.weight / sum(d.weight for d in mixture.components) * share)
            for mixture, share in parts
            if share > 0
            for c in mixture.components
        )
        return LengthMixture(components)


def _tokens(log_tokens: NDArray[np.float64], limit: NDArray[np.float64]) -> NDArray[np.int64]:
    # The limit is applied to the logarithm, so that a far tail cannot overflow the exponential.
    clipped = np.minimum(log_tokens, np.log(limit))
    return np.maximum(np.rint(np.exp(clipped)), 1.0).astype(np.int64)
