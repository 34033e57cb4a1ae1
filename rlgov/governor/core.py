"""The governor's decision, as a function of what was seen: a window in, a tick out. No I/O, no clock.

Observation, guard and reward are the objects that training uses, in the order training uses them; see
``ServingEnv.step``. What is added is of service: a policy that steps aside where it has never been, what
takes the hands off the deployment, and what an operator is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.agents.bundle import BundlePolicy
from rlgov.agents.fallback import FallbackPolicy
from rlgov.envs.guard import Guard, GuardSettings, Reason
from rlgov.envs.observation import FEATURES, ObservationEncoder
from rlgov.envs.reward import DEFAULT_MISS_WEIGHT, Reference, RewardSettings, reward
from rlgov.envs.watch import WatchSettings
from rlgov.governor.conditions import Conditions, Watcher
from rlgov.governor.records import Actuation, CommandKind, Mode, Prediction, Severity, Tick
from rlgov.governor.safety import Safety, SafetySettings, worst
from rlgov.journal import observation_digest
from rlgov.records import Column, Decision

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.agents.policy import Policy
    from rlgov.governor.adaptation import Adaptation
    from rlgov.governor.facts import Facts
    from rlgov.governor.records import Command
    from rlgov.records import Configuration, Limits, Window
    from rlgov.simulation.forecast import Forecast

OBSERVED: Final = "OBSERVED"
"""The reason of a tick in which nothing decides."""

_UNSOUND: Final = frozenset({Reason.BLIND, Reason.STALLED})
_HAD_ITS_WAY: Final = frozenset({Reason.POLICY, Reason.IDLE})
_GARBAGE: Final = -1  # an index that is none: the guard makes the fastest of it, and leaves TP alone


class Core:
    """Decides once a window.

    Args:
        limits: Of the deployment.
        policy: Who decides; None to observe only.
        mode: How far it may go, to begin with.
        guard: How tightly the policy is held.
        watch: When the guard steps in, in service.
        safety: When nothing is acted on.
        mismatches: Why policy and deployment do not fit; then nothing is ever acted on.
        clocks: How clocks are set: keeper, direct, zeusd or none.
        forecast: Predicts what decisions save; None where there is no profile.
        forecast_error: Relative error of the profile's energies.
        adaptation: Follows how far the deployment is from its profile; None: predictions are the profile's.
    """

    def __init__(  # noqa: PLR0913  # keyword arguments with defaults, each documented
        self,
        limits: Limits,
        policy: Policy | None,
        *,
        mode: Mode = Mode.SHADOW,
        guard: GuardSettings = GuardSettings(),  # noqa: B008  # frozen
        watch: WatchSettings = WatchSettings(),  # noqa: B008  # frozen
        safety: SafetySettings = SafetySettings(),  # noqa: B008  # frozen
        mismatches: tuple[str, ...] = (),
        clocks: str = "none",
        forecast: Forecast | None = None,
        forecast_error: float = 0.0,
        adaptation: Adaptation | None = None,
    ) -> None:
        self.limits = limits
        self._policy = policy
        self._mode = mode if policy is not None else Mode.OBSERVE
        self._encoder = ObservationEncoder(limits, 1)
        self._guard = Guard(guard, limits, 1, watch=watch, follow=self._mode is not Mode.ACTIVE)
        self._safety = Safety(safety, mismatches)
        self._clocks = clocks
        self._forecast = forecast
        self._forecast_error = forecast_error
        self.adaptation = adaptation
        """What it has found of the deployment; None where it is off."""
        self._reference = Reference.nominal(limits)
        level = limits.service_level
        self._levels = np.array([[level.ttft_s, level.tpot_s]])
        self._conditions = Conditions()
        self._watcher = Watcher()
        self._failed = ""  # why the policy could not decide, in the last tick
        self._held: list[NDArray[np.int64]] = []  # the two last decisions; at first, what was in force before
        self._number = 0
        self.observation = np.zeros((1, len(FEATURES)), dtype=np.float32)
        """Of the last tick."""
        self.episode = 0
        """Grows whenever observation and guard forget the past: at a change of mode."""
        self._begin()

    @property
    def mode(self) -> Mode:
        """How far it may go."""
        return self._mode

    @property
    def observation_digest(self) -> str:
        """Of the last tick's observation, for the journal."""
        return observation_digest(self.observation[0])

    def obey(self, command: Command) -> None:
        """Carry out an operator's order, from the next tick on."""
        if command.kind is CommandKind.REARM:
            self._safety.rearm()
            if self._guard.watch is not None:
                self._guard.watch.rearm()
        elif command.mode is not None and self._policy is not None and command.mode is not self._mode:
            self._mode = command.mode
            self.episode += 1
            self._begin()

    def tick(self, window: Window, facts: Facts) -> Tick:
        """Decide on a window.

        Args:
            window: What was seen.
            facts: The world beside it.
        """
        self._number += 1
        rows = window.to_row()[None, :]
        self._watcher.look(facts, window, self._conditions)
        terms = self._reward(rows, acted=facts.acting)
        decision, reason, name = self._decide(window, rows)
        acting = self._safety.allows(
            facts,
            window,
            reason,
            self._backoff_left_s(),
            self._conditions,
            active=self._mode is Mode.ACTIVE and decision is not None,
        )
        fallback = self._policy if isinstance(self._policy, FallbackPolicy) else None
        baseline = fallback is not None and decision is not None and bool(fallback.fallen_back[0])
        score = None if fallback is None or decision is None else float(fallback.score[0])
        self._tell(facts, fallback if baseline else None)
        self._adapt(window, facts, reason)
        return Tick(
            number=self._number,
            at_s=facts.now_s,
            wall_s=facts.wall_s,
            mode=self._mode,
            acting=acting,
            window=window,
            decision=decision,
            reason=name,
            ood_score=score,
            baseline=baseline,
            conditions=self._conditions.close(facts.now_s),
            actuation=self._actuation(facts),
            reward_terms=terms,
            prediction=None if decision is None else self._predict(window, decision.applied),
            overruns=facts.overruns,
            adapted=None if self.adaptation is None else self.adaptation.told,
        )

    # ------------------------------------------------------------------ deciding

    def _begin(self) -> None:
        everything = np.ones(1, dtype=np.bool_)
        self._encoder.reset(everything)
        self._guard.reset(everything)
        self._guard.follow = self._mode is not Mode.ACTIVE
        self._held = []
        if self._policy is not None:
            self._policy.start(self.limits, 1)

    def _decide(self, window: Window, rows: NDArray[np.float64]) -> tuple[Decision | None, Reason, str]:
        policy = self._policy
        if policy is None or self._mode is Mode.OBSERVE:
            # The guard looks on, so that blind and stalled windows are told of, too.
            _, reasons = self._guard.apply(np.zeros((1, 3), dtype=np.int64), rows)
            reason = Reason(int(reasons[0]))
            return None, reason, OBSERVED
        self.observation = self._encoder.encode(rows, self._levels)
        mask = self._guard.mask(rows)
        asked, probability = self._ask(policy, rows, mask)
        applied, reasons = self._guard.apply(asked, rows)
        reason = Reason(int(reasons[0]))
        self._held = [(self._held or [self._guard.table.in_force(rows)])[-1], applied]
        wanted, _ = self._guard.table.sanitised(asked)
        name = reason.name
        if isinstance(policy, FallbackPolicy) and policy.fallen_back[0] and reason in _HAD_ITS_WAY:
            name = Reason.OOD.name
        decision = Decision(
            at_s=window.start_s + window.duration_s,
            asked=self.limits.configuration(tuple(wanted[0].tolist())),
            applied=self.limits.configuration(tuple(applied[0].tolist())),
            reason=name,
            probability=probability,
            policy_digest=str(getattr(policy, "digest", "")),
        )
        return decision, reason, name

    def _ask(
        self, policy: Policy, rows: NDArray[np.float64], mask: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], float | None]:
        """What the policy wants, and how probable that was; garbage where it fails."""
        self._failed = ""
        probability: float | None = None
        try:
            if isinstance(policy, BundlePolicy):
                asked, probabilities = policy.act(self.observation, mask)
                probability = float(probabilities[0])
            else:
                asked = policy.decide(self.observation, rows, mask)
                if isinstance(policy, FallbackPolicy) and np.isfinite(policy.probability[0]):
                    probability = float(policy.probability[0])
            asked = np.asarray(asked).reshape(1, 3)
            if asked.dtype != np.int64:
                asked = asked.astype(np.float64)  # the guard makes the fastest of what is no index
        except Exception as error:  # noqa: BLE001  # whatever a policy does, serving goes on
            self._failed = f"{type(error).__name__}: {error}"
            return np.full((1, 3), _GARBAGE, dtype=np.int64), None
        return asked, probability

    def _backoff_left_s(self) -> float:
        return 0.0 if self._guard.watch is None else float(self._guard.watch.backoff_left_s[0])

    def _adapt(self, window: Window, facts: Facts, reason: Reason) -> None:
        """From the next decision on, predictions follow what this window showed."""
        adaptation = self.adaptation
        if adaptation is None:
            return
        adaptation.look(window, facts, sound=reason not in _UNSOUND)
        if isinstance(self._policy, FallbackPolicy):
            self._policy.adapt(adaptation.scales.time)
        told = adaptation.told
        if told.drifting:
            worst_one, more = told.drifting[0], len(told.drifting) - 1
            at = worst_one.configuration
            self._conditions.tell(
                "ProfileDrift", Severity.WARNING, facts.now_s,
                f"at {at.sm_clock_mhz} MHz, batch cap {at.batch_cap}, TP {at.tp_degree} an iteration takes "
                f"{worst_one.time:.2f} times as long as the profile says, at {worst_one.power:.2f} times the "
                f"power ({worst_one.samples} windows; {told.threshold:.0%} would be borne)"
                + (f"; {more} more configurations are as far off" if more else ""),
                adaptation.advice,
            )  # fmt: skip

    # ------------------------------------------------------------------ what is told

    def _tell(self, facts: Facts, fallen_back: FallbackPolicy | None) -> None:
        if self._failed:
            self._conditions.tell(
                "PolicyFailed", Severity.CRITICAL, facts.now_s,
                f"the policy could not decide, so the fastest setting stands: {self._failed}",
                "export the bundle again, and report this",
            )  # fmt: skip
        if fallen_back is not None:
            worst_feature = FEATURES[fallen_back.novelty.farthest(self.observation[0])].name
            self._conditions.tell(
                "OutOfDistribution", Severity.WARNING, facts.now_s,
                f"unlike anything the policy was trained on (score {fallen_back.score[0]:.1f}, most of all "
                f"{worst_feature}): the baseline decides",
                "train for this load and this deployment; `rlgov replay` shows how the baseline does",
            )  # fmt: skip
        if self._clocks == "direct" and self._mode is Mode.ACTIVE:
            self._conditions.tell(
                "NoKeeper", Severity.WARNING, facts.now_s,
                "clocks are set without a keeper: if the governor is killed (SIGKILL, out of memory), they "
                "stay locked",
                "run `rlgov keeper` beside it; by hand: nvidia-smi --reset-gpu-clocks",
            )  # fmt: skip

    def _actuation(self, facts: Facts) -> Actuation:
        check = facts.check
        measured = [gpu.measured_mhz for gpu in check.gpus if gpu.measured_mhz is not None]
        wanted = self._held[-1] if self._held and facts.acting else None
        asked_mhz = None if wanted is None else self.limits.sm_clocks_mhz[int(wanted[0, 0])]
        return Actuation(
            clocks=self._clocks,
            lease_left_s=facts.lease_left_s,
            asked_mhz=asked_mhz,
            applied_mhz=check.asked_mhz,
            measured_mhz=sum(measured) / len(measured) if measured else None,
            verdict=worst(facts),
            failures=dict(facts.failures),
            cap_holder=facts.cap_holder,
        )

    def _reward(self, rows: NDArray[np.float64], *, acted: bool) -> dict[str, float]:
        """Terms of the window, in which the last decision was held; of what was in force if nobody acted."""
        if np.isnan(rows[0, Column.ENERGY_J]) or rows[0, Column.BLIND] != 0.0:
            return {}
        in_force = self._guard.table.in_force(rows)
        previous, applied = self._held if acted and self._held else (in_force, in_force)
        _, terms = reward(rows, previous, applied, self._reference, RewardSettings(), DEFAULT_MISS_WEIGHT)
        return {name: float(term[0]) for name, term in terms.items()}

    def _predict(self, window: Window, applied: Configuration) -> Prediction | None:
        if self._forecast is None or window.blind:
            return None
        expected = self._forecast.expect(window, applied)
        fastest = self._forecast.expect(window, self.limits.fastest)
        return Prediction(
            power_w=expected.power_w,
            itl_s=expected.itl_s,
            energy_j=expected.energy_j,
            fastest_energy_j=fastest.energy_j,
            error=self._forecast_error,
        )
