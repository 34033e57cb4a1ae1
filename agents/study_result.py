"""What a study found: figures of every policy, estimates over training seeds, and the bars of the claim."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from rlgov.agents import statistics
from rlgov.agents.replay import BEST_STATIC, FASTEST, StaticPoint, best_static
from rlgov.agents.study_rules import RULES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rlgov.agents.baselines.tuned import TunedRecord
    from rlgov.agents.playback import Figures
    from rlgov.agents.study_grid import Cell, NotHoldable, Scenario
    from rlgov.config import StudySettings

SCHEMA: Final = 1
TRAINED_STATIC: Final = "static-trained"
RANDOM: Final = "random"
BAR_VS_FASTEST: Final = 0.30
BAR_VS_FASTEST_HIGH_LOAD: Final = 0.20
HIGH_LOAD: Final = 0.7  # from here on the lower bar holds: less is left to save
BAR_VS_STATIC: Final = 0.05
BAR_VS_STATIC_DAY: Final = 0.15
_BOOTSTRAP_SEED: Final = 0x57D1

Kind = Literal["reference", "rule", "learned"]


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy on one test scenario."""

    name: str
    kind: Kind
    figures: Figures
    saving_vs_fastest: float
    saving_vs_best_static: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over training seeds; the interval is None where the seeds are too few or all alike."""

    mean: float
    ci: tuple[float, float] | None
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LearnedSummary:
    """The learned policies of one scenario, over training seeds."""

    attainment_min: float
    attainment_mean: float
    saving_vs_fastest: Estimate
    saving_vs_best_static: Estimate
    saving_vs_best_rule: Estimate | None
    """None when no rule holds the target here."""
    saving_vs_rules: dict[str, Estimate]
    bars_missed: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ScenarioResult:
    """Everything about one test scenario."""

    workload: str
    slo_scale: float
    load: float | None
    label: str
    rate_scale: float
    lead_in_s: float
    span_s: float
    fastest: Figures
    best_static: StaticPoint
    best_static_holds: bool
    best_rule: str | None
    policies: tuple[PolicyResult, ...]
    learned: LearnedSummary | None
    statics: tuple[StaticPoint, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StudyResult:
    """What a study found."""

    settings: StudySettings
    digest: str
    traces: dict[str, str]
    """Name to sha256."""
    bundles: dict[str, str]
    """Label to digest; one bundle a training seed."""
    capacities: tuple[tuple[str, float, float], ...]
    """Workload, SLO scale, and rate scale (the day: requests/s) of full load."""
    not_holdable: tuple[NotHoldable, ...]
    tuned: dict[str, TunedRecord]
    """By ``workload slo SCALE RULE``."""
    scenarios: tuple[ScenarioResult, ...]

    def to_json(self) -> dict[str, object]:
        """The report as plain values, ``digest`` first; static settings are left to their own CSV file."""
        return {"digest": self.digest, **_content(self)}

    def sealed(self) -> StudyResult:
        """The same with the digest of all it holds, every static setting included."""
        content = {**_content(self), "statics": [[asdict(p) for p in s.statics] for s in self.scenarios]}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return replace(self, digest=hashlib.sha256(text.encode()).hexdigest())


def scenario_result(
    cell: Cell,
    scenario: Scenario,
    statics: Sequence[StaticPoint],
    played: Mapping[str, Figures],
    learned: Sequence[str],
    *,
    target_attainment: float,
) -> ScenarioResult:
    """Set one test scenario's figures against each other.

    Args:
        cell: The scenario's workload and SLO.
        scenario: What was played.
        statics: Every static setting on it.
        played: Figures of rules and learned policies by name.
        learned: Which of those come from bundles, one a training seed.
        target_attainment: Share of requests that must meet the SLO.
    """
    fastest = next(p for p in statics if p.configuration == cell.limits.fastest).figures
    chosen = best_static(statics, target_attainment)

    def row(name: str, kind: Kind, figures: Figures) -> PolicyResult:
        return PolicyResult(
            name,
            kind,
            figures,
            saving_vs_fastest=_saving(figures, fastest),
            saving_vs_best_static=_saving(figures, chosen.figures),
        )

    rules = [name for name in played if name not in learned]
    holding = [name for name in rules if played[name].slo_attainment >= target_attainment]
    best_rule = min(holding, key=lambda name: played[name].energy_j) if holding else None
    rows = (
        row(FASTEST, "reference", fastest),
        row(BEST_STATIC, "reference", chosen.figures),
        *(row(name, "rule", played[name]) for name in rules),
        *(row(name, "learned", played[name]) for name in learned),
    )
    summary = None
    if learned:
        bar_fastest = BAR_VS_FASTEST
        if scenario.load is not None and scenario.load >= HIGH_LOAD:
            bar_fastest = BAR_VS_FASTEST_HIGH_LOAD
        summary = _summary(
            [played[name] for name in learned],
            fastest,
            chosen.figures,
            {name: played[name] for name in rules},
            best_rule,
            bars=(
                target_attainment,
                bar_fastest,
                BAR_VS_STATIC if scenario.load is not None else BAR_VS_STATIC_DAY,
            ),
        )
    return ScenarioResult(
        workload=cell.workload,
        slo_scale=cell.slo_scale,
        load=scenario.load,
        label=scenario.label,
        rate_scale=scenario.rate_scale,
        lead_in_s=scenario.test.schedule.lead_s,
        span_s=scenario.test.schedule.span_s,
        fastest=fastest,
        best_static=chosen,
        best_static_holds=chosen.figures.slo_attainment >= target_attainment,
        best_rule=best_rule,
        policies=rows,
        learned=summary,
        statics=tuple(statics),
    )


def _summary(
    learned: Sequence[Figures],
    fastest: Figures,
    static: Figures,
    rules: Mapping[str, Figures],
    best_rule: str | None,
    *,
    bars: tuple[float, float, float],
) -> LearnedSummary:
    attainments = [figures.slo_attainment for figures in learned]

    def against(reference: Figures) -> Estimate:
        return estimate([_saving(figures, reference) for figures in learned])

    vs_rules = {name: against(figures) for name, figures in rules.items()}
    vs_fastest, vs_static = against(fastest), against(static)
    vs_best_rule = None if best_rule is None else vs_rules[best_rule]
    target, bar_fastest, bar_static = bars
    missed = []
    if min(attainments) < target:
        missed.append(f"attainment {attainment_text(min(attainments))} < {_percent(target)}")
    if vs_fastest.mean < bar_fastest:
        missed.append(f"vs fastest {_percent(vs_fastest.mean, 2)} < {_percent(bar_fastest)}")
    if vs_static.mean < bar_static:
        missed.append(f"vs best static {_percent(vs_static.mean, 2)} < {_percent(bar_static)}")
    if vs_best_rule is not None and vs_best_rule.mean <= 0:
        missed.append(f"vs {best_rule} {_percent(vs_best_rule.mean, 2)} <= 0 %")
    return LearnedSummary(
        attainment_min=min(attainments),
        attainment_mean=float(np.mean(attainments)),
        saving_vs_fastest=vs_fastest,
        saving_vs_best_static=vs_static,
        saving_vs_best_rule=vs_best_rule,
        saving_vs_rules=vs_rules,
        bars_missed=tuple(missed),
    )


def estimate(values: Sequence[float]) -> Estimate:
    """Mean over training seeds with its 95 % interval."""
    # every interval draws the same resamples, so two of them can be compared
    interval = statistics.mean_interval(values, np.random.default_rng(_BOOTSTRAP_SEED))
    if interval is None or len(set(values)) == 1:
        return Estimate(float(np.mean(values)), None, tuple(values))
    return Estimate(float(np.mean(values)), (interval.low, interval.high), tuple(values))


def attainment_text(share: float) -> str:
    """Rounded down: 98.996 % must not read as the 99 % that it misses."""
    return f"{np.floor(1e4 * share + 1e-9) / 100:.2f} %"


def _saving(figures: Figures, reference: Figures) -> float:
    return 1.0 - figures.energy_j / reference.energy_j


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _content(result: StudyResult) -> dict[str, object]:
    settings = result.settings
    effort = settings.model_dump(mode="json", exclude={"out", "workers", "trace", "bundle"})
    return {
        "schema": SCHEMA,
        "settings": effort,
        "rules": list(RULES),
        "traces": result.traces,
        "bundles": result.bundles,
        "capacities": [
            {"workload": workload, "slo_scale": slo_scale, "full_load": full}
            for workload, slo_scale, full in result.capacities
        ],
        "not_holdable": [asdict(lost) for lost in result.not_holdable],
        "tuned": {name: record.model_dump(mode="json") for name, record in result.tuned.items()},
        "scenarios": [_scenario(scenario) for scenario in result.scenarios],
    }


def _scenario(scenario: ScenarioResult) -> dict[str, object]:
    # Not asdict of the whole: hundreds of static settings would be copied to be thrown away.
    return {
        "workload": scenario.workload,
        "slo_scale": scenario.slo_scale,
        "load": scenario.load,
        "label": scenario.label,
        "rate_scale": scenario.rate_scale,
        "lead_in_s": scenario.lead_in_s,
        "span_s": scenario.span_s,
        "fastest_attainment": scenario.fastest.slo_attainment,
        "best_static": {**asdict(scenario.best_static.configuration), "holds": scenario.best_static_holds},
        "best_rule": scenario.best_rule,
        "policies": [asdict(policy) for policy in scenario.policies],
        "learned": None if scenario.learned is None else asdict(scenario.learned),
    }
