"""One Gymnasium environment over any deployment: simulated, replayed or live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import gymnasium
import numpy as np
from gymnasium import spaces

from rlgov.envs.guard import Guard, GuardLike, GuardSettings, NullGuard, Reason
from rlgov.envs.observation import FEATURES, HIGH, LOW, ObservationEncoder
from rlgov.envs.reward import DEFAULT_MISS_WEIGHT, UNMETERED, Reference, RewardSettings, reward
from rlgov.errors import DeploymentError
from rlgov.journal import observation_digest
from rlgov.records import Column, Decision

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from rlgov.deployments.base import Deployment
    from rlgov.envs.watch import WatchSettings
    from rlgov.records import Configuration, Limits, Window

_SEED_BOUND = 2**31 - 1

ReferenceOf: TypeAlias = "Callable[[int], Reference]"
"""Gives an episode's reference for the seed its deployment is started with."""


class DecisionRecorder(Protocol):
    """Takes each decision before it is acted on; RecordedDeployment is one."""

    def note(self, decision: Decision, digest: str) -> None:
        """``digest`` identifies the observation on which ``decision`` was taken."""
        ...


class NullRecorder:
    """Keeps nothing."""

    def note(self, decision: Decision, digest: str) -> None:
        """Forget the decision."""


class ServingEnv(gymnasium.Env["NDArray[np.float32]", "NDArray[np.int64]"]):
    """Govern one LLM serving deployment: least energy at the SLO.

    ## Description

    Once per control interval (1 s by default) the agent sees what the last window showed and chooses
    the SM clock, the batch cap and the tensor-parallel (TP) degree to hold for the next one. A guard
    stands between agent and deployment; the very same object stands there in service.

    ## Action Space

    ``MultiDiscrete([clocks, caps, TP degrees])``. On every axis **index 0 is the fastest, safest
    setting**.

    | Axis | Action | Unit | Setting at index i |
    |---|---|---|---|
    | 0 | SM clock | MHz | ``limits.sm_clocks_mhz[i]`` |
    | 1 | batch cap | running requests | ``limits.batch_caps[i]`` |
    | 2 | TP degree | GPUs | ``limits.tp_degrees[i]`` |

    ``action_masks()`` and ``info["action_mask"]`` give the flat mask over the three axes of what the
    guard would let through.

    ## Observation Space

    A float32 ``Box`` of shape ``(len(FEATURES),)`` with fixed bounds: the table
    :data:`rlgov.envs.observation.FEATURES` (name, unit, low, high, meaning).

    | Features | Unit | Bounds |
    |---|---|---|
    | arrivals, prompt and output tokens, each over 4, 30 and 240 s | log1p(per s / scale) | -4 .. 7 |
    | share of SLO misses over 30 and 240 s | log1p(share / 1 %) | 0 .. 4.7 |
    | running, waiting, waiting tokens, overdue, preemptions, cap | log1p(count / scale) | -4 .. 8.4 |
    | the SLO itself: TTFT and TPOT limits | log1p(s / scale) | -2.4 .. 4 |
    | oldest wait, TTFT, TPOT, token gap relative to their limits | 1 | 0 .. 4 |
    | clock asked and measured, power relative to TDP, cap use | 1 | 0 .. 2 |
    | busy, KV usage, throttled shares; switch and "none" flags | 1 | 0 .. 1 |
    | TP: time since a switch, share of GPUs, degree 1/2/4/8 | 1 | 0 .. 1 |

    ## Rewards

    ``energy + miss + switch + clip``, each by name in ``info["reward_terms"]``: minus the window's
    energy relative to the same episode at the fastest configuration; minus ``miss_weight`` times its
    SLO misses relative to mean arrivals (overdue requests included); minus the cost of switching; and
    what bounding the sum took away. See :mod:`rlgov.envs.reward`.

    ## Starting State

    The deployment's first window, held at its start configuration (the fastest unless it says
    otherwise).

    ## Episode End

    ``terminated`` is never True: serving does not end by itself. ``truncated`` is True when the
    deployment's workload has ended or after ``max_windows`` steps.

    ## Information

    ``window`` (the :class:`~rlgov.records.Window`), ``action_mask``, ``applied`` (Configuration); after
    a step also ``asked_index``, ``applied_index``, ``reason`` (name of a
    :class:`~rlgov.envs.guard.Reason`) and ``reward_terms``.

    ## Arguments

    Args:
        deployment: What is governed.
        guard: Settings of the guard; None for no guard (published rules run as published).
        watch: What the guard adds in service; None for nothing. To audit what a governor decided.
        follow: The guard goes by its own last decision in place of the settings in force, as it does where
            nobody carries decisions out.
        reward_settings: Scales and bounds of the reward.
        reference: What the reward is relative to: one reference for all episodes, a function that gives
            it for an episode's deployment seed, or None for a nominal one. See :func:`measure_reference`.
        miss_weight: Lambda, the price of SLO misses; may be set between steps.
        max_windows: Longest episode in steps; None for as long as the workload lasts.
        recorder: Takes every decision before it is acted on.
        policy_digest: Written into every decision.

    ## Version History

    * v0: first version.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  # Gymnasium declares it so

    def __init__(  # noqa: PLR0913  # keyword arguments with defaults, each documented
        self,
        deployment: Deployment,
        *,
        guard: GuardSettings | None = GuardSettings(),  # noqa: B008  # frozen
        watch: WatchSettings | None = None,
        follow: bool = False,
        reward_settings: RewardSettings = RewardSettings(),  # noqa: B008  # frozen
        reference: Reference | ReferenceOf | None = None,
        miss_weight: float = DEFAULT_MISS_WEIGHT,
        max_windows: int | None = None,
        recorder: DecisionRecorder | None = None,
        policy_digest: str = "",
    ) -> None:
        super().__init__()
        self.deployment = deployment
        self.miss_weight = miss_weight
        self._guard_settings = guard
        self._watch_settings = watch
        self._follow = follow
        self._reward_settings = reward_settings
        self._reference_given = reference
        self._reference = Reference.nominal(deployment.limits)
        self._max_windows = max_windows
        self._recorder: DecisionRecorder = NullRecorder() if recorder is None else recorder
        self._policy_digest = policy_digest
        self._adopt(deployment.limits)
        self.action_space = spaces.MultiDiscrete(self._guard.table.nvec)
        self.observation_space = spaces.Box(LOW, HIGH, shape=(len(FEATURES),), dtype=np.float32)
        self._window: Window | None = None
        self._rows = np.zeros((1, len(Column)))
        self._observation = np.zeros((1, len(FEATURES)), dtype=np.float32)
        self._mask = np.ones((1, self._guard.table.size), dtype=np.bool_)
        self._index = np.zeros((1, 3), dtype=np.int64)
        self._steps = 0

    @property
    def limits(self) -> Limits:
        """Limits of the current episode."""
        return self._limits

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,  # noqa: ARG002  # part of Gymnasium's API; no options are known
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start a new episode; the deployment's seed is drawn from the environment's generator.

        Raises:
            DeploymentError: The deployment cannot start, or has no energy meter.
        """
        super().reset(seed=seed)
        deployment_seed = int(self.np_random.integers(_SEED_BOUND))
        window = self.deployment.start(deployment_seed)
        if window.energy_j is None and not window.blind:
            raise DeploymentError(UNMETERED)
        limits = self.deployment.limits
        if limits.axis_sizes != self._limits.axis_sizes:
            msg = (
                f"the deployment's action axes changed from {self._limits.axis_sizes} to "
                f"{limits.axis_sizes}; make a new env"
            )
            raise DeploymentError(msg)
        if limits != self._limits:
            self._adopt(limits)
        self._reference = self._reference_of(deployment_seed)
        everything = np.ones(1, dtype=np.bool_)
        self._encoder.reset(everything)
        self._guard.reset(everything)
        self._steps = 0
        self._see(window)
        self._index = self._guard.table.in_force(self._rows)
        return self._observation[0], self._info(window, window.configuration)

    def step(
        self, action: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Hold the guarded action for one interval and report what happened."""
        if self._window is None:
            msg = "step() before reset(): call reset() to start an episode"
            raise DeploymentError(msg)
        asked = np.asarray(action).reshape(1, 3)
        applied, reasons = self._guard.apply(asked, self._rows)
        configuration = self._limits.configuration(tuple(applied[0].tolist()))
        reason = Reason(int(reasons[0]))
        self._note(asked, configuration, reason)

        window = self.deployment.advance(configuration)
        previous, self._index = self._index, applied
        self._steps += 1
        self._see(window)
        rewards, terms = reward(
            self._rows, previous, applied, self._reference, self._reward_settings, self.miss_weight
        )
        truncated = self.deployment.finished or (
            self._max_windows is not None and self._steps >= self._max_windows
        )
        info = self._info(window, configuration)
        info["asked_index"] = asked[0].copy()
        info["applied_index"] = applied[0]
        info["reason"] = reason.name
        info["reward_terms"] = {name: float(term[0]) for name, term in terms.items()}
        return self._observation[0], float(rewards[0]), False, truncated, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Flat mask over (clock, cap, TP) of what the guard would let through now."""
        mask: NDArray[np.bool_] = self._mask[0].copy()
        return mask

    def close(self) -> None:
        """Release the deployment; safe to call twice."""
        self.deployment.close()

    def _adopt(self, limits: Limits) -> None:
        self._limits = limits
        self._encoder = ObservationEncoder(limits, 1)
        self._guard: GuardLike = NullGuard(limits, 1)
        if self._guard_settings is not None:
            watch, follow = self._watch_settings, self._follow
            self._guard = Guard(self._guard_settings, limits, 1, watch=watch, follow=follow)
        level = limits.service_level
        self._service_levels = np.array([[level.ttft_s, level.tpot_s]])

    def _reference_of(self, deployment_seed: int) -> Reference:
        given = self._reference_given
        if given is None:
            return Reference.nominal(self._limits)
        return given if isinstance(given, Reference) else given(deployment_seed)

    def _see(self, window: Window) -> None:
        self._window = window
        self._rows = window.to_row()[None, :]
        self._observation = self._encoder.encode(self._rows, self._service_levels)
        self._mask = self._guard.mask(self._rows)

    def _note(self, asked: NDArray[np.int64], applied: Configuration, reason: Reason) -> None:
        if isinstance(self._recorder, NullRecorder) or self._window is None:
            return
        wanted, _ = self._guard.table.sanitised(asked)
        decision = Decision(
            at_s=self._window.start_s + self._window.duration_s,
            asked=self._limits.configuration(tuple(wanted[0].tolist())),
            applied=applied,
            reason=reason.name,
            policy_digest=self._policy_digest,
        )
        self._recorder.note(decision, observation_digest(self._observation[0]))

    def _info(self, window: Window, applied: Configuration) -> dict[str, Any]:
        return {"window": window, "applied": applied, "action_mask": self._mask[0].copy()}


def measure_reference(deployment: Deployment, seed: int, max_windows: int | None = None) -> Reference:
    """What an episode costs at the fastest configuration: the reward's reference.

    Runs one whole episode of ``deployment`` (not a live one: that would never end without
    ``max_windows``). Blind windows are left out.

    Raises:
        DeploymentError: No window could be observed, or nothing meters the deployment's energy.
    """
    window = deployment.start(seed)
    fastest = deployment.limits.fastest
    energy_j, arrivals, windows, steps = 0.0, 0.0, 0, 0
    while not deployment.finished and (max_windows is None or steps < max_windows):
        window = deployment.advance(fastest)
        steps += 1
        if window.blind:
            continue
        if window.energy_j is None:
            raise DeploymentError(UNMETERED)
        energy_j += window.energy_j
        arrivals += window.arrivals
        windows += 1
    if windows == 0 or energy_j <= 0:
        msg = "the reference run saw no window with energy; give a longer workload"
        raise DeploymentError(msg)
    # Fewer than one arrival in the whole episode would make a single miss infinitely dear.
    return Reference(energy_j / windows, max(arrivals, 1.0) / windows)
