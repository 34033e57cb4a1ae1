"""Everything that decides a training run, in one typed record: what a run folder's config.yml holds.

Kept apart from :mod:`rlgov.agents.train` so that the command line can read it without importing torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from rlgov.envs.guard import GuardSettings
from rlgov.envs.reward import RewardSettings

Fraction = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PpoSettings(_Settings):
    """Proximal policy optimisation. Large batches: small torch calls are what training time goes into."""

    masked: bool = True
    """Use the action mask (MaskablePPO); without it forbidden choices are left to the guard."""
    rollout_steps: PositiveInt = 128
    """Steps per environment between two updates."""
    batch_size: PositiveInt = 2048
    """Samples per gradient step; must divide rollout_steps times the number of environments."""
    epochs: PositiveInt = 4
    """Passes over each rollout."""
    learning_rate: PositiveFloat = 4e-4
    """Adam's step size at the start."""
    final_learning_rate: NonNegative = 0.0
    """Adam's step size at the end; linear in between."""
    entropy_weight: NonNegative = 0.005
    """Weight of the entropy bonus at the start."""
    final_entropy_weight: NonNegative = 0.0
    """Weight of the entropy bonus at the end; linear in between."""
    gamma: Fraction = 0.95
    """Discount factor of one interval. A clock works within seconds: a longer view mostly adds noise."""
    gae_lambda: Probability = 0.9
    """Weight of long advantage estimates."""
    clip_range: PositiveFloat = 0.2
    """Largest change of an action's probability ratio that an update is rewarded for."""
    value_weight: NonNegative = 0.5
    """Weight of the value loss."""
    max_gradient_norm: PositiveFloat = 0.5
    """Gradients are scaled down to this norm."""
    target_kl: PositiveFloat | None = None
    """Stop an update's epochs early beyond 1.5 times this divergence."""
    hidden: tuple[PositiveInt, ...] = (64, 64)
    """Widths of the hidden layers, tanh, separate for policy and value."""
    fastest_bias: tuple[float, float, float] = (0.0, 1.0, 5.0)
    """Head start in logits of index 0 (the fastest setting) on the clock, cap and TP axis. A random
    initial policy would switch TP whenever it may and learn from little else than switches."""


class LagrangianSettings(_Settings):
    """How the weight of misses follows the attainment it is meant to buy."""

    kind: Literal["lagrangian", "fixed"] = "lagrangian"
    """Adapt the miss weight (a Lagrange multiplier), or keep it at its start value."""
    target_attainment: Fraction = 0.99
    """Share of requests that must meet the service level."""
    margin: NonNegative = 0.0015
    """Training aims at this much more, since replayed traces differ from training episodes."""
    miss_weight: PositiveFloat = 3.0
    """Start value: cost of missing every request of a window, in windows of the fastest setting's energy."""
    miss_weight_bounds: tuple[PositiveFloat, PositiveFloat] = (0.2, 15.0)
    """The multiplier stays inside. The upper bound keeps one group that cannot reach the target, whatever is
    done, from deciding what the policy learns for all others."""
    integral_gain: NonNegative = 0.03
    """Step of ln(miss weight) per rollout and unit of relative error (misses / allowed misses - 1)."""
    proportional_gain: NonNegative = 0.1
    """Immediate part of the response, against overshoot."""
    error_bounds: tuple[float, float] = (-1.0, 1.0)
    """Relative error is clipped to this: one overloaded rollout must not undo the learning."""
    window_rollouts: PositiveInt = 4
    """Attainment is measured over the requests of so many recent rollouts."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.miss_weight_bounds
        if not low <= self.miss_weight <= high:
            msg = f"miss_weight {self.miss_weight} lies outside miss_weight_bounds {low}..{high}; move either"
            raise ValueError(msg)
        if self.target_attainment + self.margin >= 1:
            msg = "target_attainment plus margin must stay below 1; lower the margin"
            raise ValueError(msg)
        return self


class EvaluationSettings(_Settings):
    """Periodic deterministic evaluation on fixed episodes of the validation span."""

    every_steps: PositiveInt = 250_000
    """Training steps between evaluations."""
    episodes: PositiveInt = 32
    """Episodes of each workload and SLO scale."""
    shortfall_price: NonNegative = 50.0
    """Saving that makes up for a shortfall: with 50, missing the target by 0.1 % in the worst group must
    save 5 % more. A strict bar would prefer an untrained policy over one that a handful of requests
    separates from the target."""
    seed: int = 20_231_116
    """Fixes the episodes: the same ones at every evaluation and for every training seed."""


class TrainConfig(_Settings):
    """One training run."""

    out: Path
    """Run folder; created, and refused if it already holds a run (give resume then)."""
    profile: str = "h100-qwen3-32b"
    """Profile name or path of a profile file."""
    traces: tuple[str, ...] = ("synthetic:conversation", "synthetic:code", "synthetic:day")
    """Trace files, or ``synthetic:NAME`` for a generated one."""
    train_fraction: Fraction = 0.7
    """Leading share of each trace file used for training; the rest is the test span and never read here."""
    validation_fraction: Fraction = 0.2
    """Trailing share of the training span kept for choosing the best model."""
    load_range: tuple[PositiveFloat, PositiveFloat] = (0.1, 0.8)
    """Load of the episodes, as a share of the fastest setting's capacity."""
    slo_scales: tuple[PositiveFloat, ...] = (0.6, 1.0, 2.0)
    """Multiples of the profile's service level that episodes are drawn under."""
    load_bins: PositiveInt = 3
    """Parts of the load range that each hold the target by themselves; else high load would spend what
    low load saves."""
    warm_start: bool = True
    """Begin by imitating the best static setting of each load; see :mod:`rlgov.agents.warm_start`."""
    episode_s: PositiveFloat = 300.0
    """Simulated seconds per episode."""
    least_attainment: Fraction = 0.97
    """Episodes that the fastest setting serves worse than this are drawn again: nobody can serve them."""
    randomize_physics: bool = True
    """Draw the profile's uncertain parameters anew for each episode."""
    control_variate: bool = True
    """Credit the learner with what the fastest setting spends in the same window: it does not depend on
    the actions, and takes the traffic's own variance out of the returns."""
    total_steps: PositiveInt = 2_500_000
    """Environment steps of the whole run."""
    environments: PositiveInt = 64
    """Simulations stepped together."""
    seed: int = 0
    """Fixes weights, episodes and sampling; equal seeds give equal weights."""
    checkpoint_steps: PositiveInt = 400_000
    """Steps between checkpoints, rounded up to whole rollouts. Part of the recipe, not only of the
    bookkeeping: at each checkpoint episodes and random numbers start anew from the seed and the step
    number, which is what makes a resumed run equal to one that never stopped."""
    keep_checkpoints: PositiveInt = 3
    """Older checkpoints are deleted."""
    resume: bool = False
    """Continue the run in ``out`` from its newest checkpoint."""
    ppo: PpoSettings = PpoSettings()
    """The algorithm."""
    lagrangian: LagrangianSettings = LagrangianSettings()
    """The constraint."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """The choice of the best model."""
    figure_span_s: NonNegative = 3600.0
    """Length of the replay of training traffic behind TensorBoard's figures; 0 for no figures."""
    guard: GuardSettings = GuardSettings()
    """How tightly the policy is held, in training as later in service."""
    reward: RewardSettings = RewardSettings()
    """Scales and bounds of the reward."""

    @property
    def rollout_samples(self) -> int:
        """Steps of all environments between two updates."""
        return self.ppo.rollout_steps * self.environments

    def whole_rollouts(self, steps: int) -> int:
        """``steps`` rounded up to whole rollouts."""
        return -(-steps // self.rollout_samples) * self.rollout_samples

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rollout_samples % self.ppo.batch_size:
            msg = (
                f"ppo.batch_size {self.ppo.batch_size} does not divide rollout_steps x environments = "
                f"{self.rollout_samples}; choose a divisor"
            )
            raise ValueError(msg)
        if self.load_range[0] > self.load_range[1]:
            msg = f"load_range {self.load_range} is reversed; give the lower load first"
            raise ValueError(msg)
        if not self.traces or not self.slo_scales:
            msg = "traces and slo_scales need at least one entry each"
            raise ValueError(msg)
        return self
