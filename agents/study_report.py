"""What a study leaves behind: JSON, CSV, a Markdown table an SLO, and the picture of the claim."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from rlgov.agents import plots
from rlgov.agents.study_result import attainment_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from rlgov.agents.playback import Figures
    from rlgov.agents.study_result import Estimate, ScenarioResult, StudyResult

LEARNED: Final = "PPO"
_COLOURS: Final = {"static": plots.REFERENCE_COLOURS["best-static"], "rule": "#56b4e9", LEARNED: "#0072b2"}
_BAR_WIDTH: Final = 0.27
_HEADINGS: Final = (
    "scenario",
    "load",
    "fastest: in SLO",
    "best static in hindsight (saved, in SLO)",
    "best rule (saved, in SLO)",
    f"{LEARNED}: in SLO, worst seed",
    f"{LEARNED}: saved vs fastest",
    "vs best static",
    "vs best rule",
    "bars met",
)


def write_study(result: StudyResult) -> dict[str, Path]:
    """Write every file of a study into its folder.

    Returns:
        The paths written, by what they hold.
    """
    out = result.settings.out
    out.mkdir(parents=True, exist_ok=True)
    paths = {
        "json": out / "study.json",
        "policies": out / "study.csv",
        "statics": out / "statics.csv",
        "tables": out / "study.md",
        "claim": out / "claim.png",
    }
    text = json.dumps(result.to_json(), indent=2, allow_nan=False)
    paths["json"].write_text(text + "\n", encoding="utf-8")
    _write_csv(
        paths["policies"],
        [
            {
                **_place(scenario),
                "policy": policy.name,
                "kind": policy.kind,
                "saving_vs_fastest": policy.saving_vs_fastest,
                "saving_vs_best_static": policy.saving_vs_best_static,
                **asdict(policy.figures),
            }
            for scenario in result.scenarios
            for policy in scenario.policies
        ],
    )
    _write_csv(
        paths["statics"],
        [
            {**_place(scenario), **asdict(point.configuration), **asdict(point.figures)}
            for scenario in result.scenarios
            for point in scenario.statics
        ],
    )
    paths["tables"].write_text(markdown(result), encoding="utf-8")
    shown = claim_scenarios(result)
    plots.save(claim_figure(shown, target=result.settings.target_attainment), paths["claim"])
    return paths


def markdown(result: StudyResult) -> str:
    """One table an SLO scale, a line a test scenario."""
    settings = result.settings
    parts = []
    for slo_scale in settings.slo_scales:
        mine = [scenario for scenario in result.scenarios if scenario.slo_scale == slo_scale]
        lost = [cell for cell in result.not_holdable if cell.slo_scale == slo_scale]
        lines = [f"### SLO x {slo_scale:g} (about {5 * slo_scale:g} times the isolated latency)", ""]
        if mine:
            lines += [
                f"| {' | '.join(_HEADINGS)} |",
                "|---|---|---:|---|---|---:|---:|---:|---:|---|",
                *(_line(scenario) for scenario in mine),
            ]
        lines += [f"\n{cell.workload}: not holdable even at a 256th of its rate. {cell.why}" for cell in lost]
        parts.append("\n".join(lines))
    target = f"{100 * settings.target_attainment:g} %"
    seeds = len(result.bundles)
    notes = (
        "Savings are of the energy of all allotted GPUs on the test span; brackets hold 95 % intervals of "
        f"the mean over {seeds} training seeds. "
        f"A static setting or a rule counts as best only where it holds {target} of requests in the SLO; "
        "the best static setting is chosen in hindsight on the test span itself. "
        f"Rules were tuned on training spans with {settings.budget} evaluations each, for each workload, "
        "load and SLO; the TP degree that a learned policy starts at was chosen on the same spans. "
        f"Digest {result.digest[:16]}."
    )
    return "\n\n".join([*parts, notes]) + "\n"


def claim_scenarios(result: StudyResult) -> list[ScenarioResult]:
    """Those of the default SLO, or of the scale nearest to it."""
    nearest = min(result.settings.slo_scales, key=lambda scale: abs(scale - 1.0))
    return [scenario for scenario in result.scenarios if scenario.slo_scale == nearest]


def claim_figure(scenarios: Sequence[ScenarioResult], *, target: float = 0.99) -> Figure:
    """Energy relative to the fastest setting, scenario by scenario: best static, best rule, learned."""
    with rc_context(plots.STYLE):
        width = max(7.0, 2.6 + 1.35 * len(scenarios))
        figure = Figure(figsize=(width, 5.2), layout="constrained")
        axes = figure.subplots()
        axes.grid(visible=False, axis="x")
        for place, scenario in enumerate(scenarios):
            _draw_scenario(axes, place, scenario, target)
        axes.axhline(100.0, color=plots.REFERENCE_COLOURS["fastest"], linewidth=1.4, linestyle="--", zorder=1)
        axes.set_xticks(
            range(len(scenarios)),
            [f"{_short(scenario.workload)}\n{scenario.label} load" for scenario in scenarios],
        )
        axes.set_xlim(-0.6, max(len(scenarios), 1) - 0.4)
        axes.set_ylim(0.0, 112.0)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("Energy of all allotted GPUs,\n% of the fastest setting's")
        figure.suptitle(
            "Energy on traffic not seen in training or tuning; lower is better",
            x=0.01,
            ha="left",
            fontweight="bold",
            fontsize=11.0,
        )
        seeds = max((len(s.learned.saving_vs_fastest.values) for s in scenarios if s.learned), default=0)
        figure.legend(handles=_handles(seeds, target), loc="outside lower center", ncols=5, fontsize=9)
    return figure


def _handles(seeds: int, target: float) -> list[Line2D | Patch]:
    line = Line2D([], [], color=plots.REFERENCE_COLOURS["fastest"], linewidth=1.4, linestyle="--")
    line.set_label("fastest setting")
    handles: list[Line2D | Patch] = [
        line,
        Patch(color=_COLOURS["static"], label="best static setting, in hindsight"),
        Patch(color=_COLOURS["rule"], label="best rule, tuned on training spans"),
    ]
    if seeds:
        handles.append(
            Patch(color=_COLOURS[LEARNED], label=f"{LEARNED}, mean and 95 % interval, {seeds} seeds")
        )
    handles.append(
        Patch(
            facecolor="white",
            edgecolor="#444444",
            hatch="////",
            label=f"in SLO below {100 * target:g} % (worst seed)",
        )
    )
    return handles


def _draw_scenario(axes: Axes, place: int, scenario: ScenarioResult, target: float) -> None:
    static = scenario.best_static.figures
    _bar(axes, place - _BAR_WIDTH, "static", _share(scenario, static), scenario.best_static_holds)
    rule = _figures(scenario).get(scenario.best_rule or "")
    if rule is None:
        axes.annotate("no rule\nholds", (place, 2.0), ha="center", fontsize=7.5, color="#444444")
    else:
        _bar(axes, place, "rule", _share(scenario, rule), holds=True)
    learned = scenario.learned
    if learned is not None:
        saving = learned.saving_vs_fastest
        x = place + _BAR_WIDTH
        share, ci = 100.0 * (1.0 - saving.mean), None
        if saving.ci is not None:
            ci = (100.0 * (1.0 - saving.ci[1]), 100.0 * (1.0 - saving.ci[0]))
            below, above = max(share - ci[0], 0.0), max(ci[1] - share, 0.0)
            axes.errorbar(x, share, [[below], [above]], color="black", capsize=3.0, linewidth=1.1, zorder=4)
        top = share if ci is None else max(ci[1], share)
        _bar(axes, x, LEARNED, share, learned.attainment_min >= target, label_at=top)


def _bar(axes: Axes, x: float, kind: str, share: float, holds: bool, label_at: float | None = None) -> None:  # noqa: FBT001
    colour = _COLOURS[kind]
    axes.bar(
        x,
        share,
        width=_BAR_WIDTH * 0.92,
        color=colour if holds else "white",
        edgecolor=colour,
        hatch=None if holds else "////",
        zorder=3,
    )
    axes.annotate(
        f"{share:.0f}",
        (x, share if label_at is None else label_at),
        xytext=(0.0, 2.5),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
        fontweight="bold" if kind == LEARNED else "normal",
        zorder=5,
    )


def _share(scenario: ScenarioResult, figures: Figures) -> float:
    return 100.0 * figures.energy_j / scenario.fastest.energy_j


def _figures(scenario: ScenarioResult) -> Mapping[str, Figures]:
    return {policy.name: policy.figures for policy in scenario.policies}


def _short(workload: str) -> str:
    """A trace file's name without its year and source, in the words of the axis."""
    if workload == "day":
        return "synthetic day"
    return "\n".join(part for part in workload.split("_") if not part.isdigit()).replace("\n", " ")


def _line(scenario: ScenarioResult) -> str:
    chosen = scenario.best_static
    setting = chosen.configuration
    static = f"{setting.sm_clock_mhz} MHz, cap {setting.batch_cap}, TP {setting.tp_degree}"
    static += "" if scenario.best_static_holds else " (misses)"
    rule = "none holds"
    if scenario.best_rule is not None:
        rule = f"{scenario.best_rule} {_saved_and_kept(scenario, _figures(scenario)[scenario.best_rule])}"
    cells = [
        scenario.workload,
        scenario.label,
        attainment_text(scenario.fastest.slo_attainment),
        f"{static} {_saved_and_kept(scenario, chosen.figures)}",
        rule,
    ]
    learned = scenario.learned
    if learned is None:
        cells += ["", "", "", "", ""]
    else:
        cells += [
            attainment_text(learned.attainment_min),
            _estimate(learned.saving_vs_fastest),
            _estimate(learned.saving_vs_best_static),
            "" if learned.saving_vs_best_rule is None else _estimate(learned.saving_vs_best_rule),
            "yes" if not learned.bars_missed else "no: " + "; ".join(learned.bars_missed),
        ]
    return "| " + " | ".join(cells) + " |"


def _saved_and_kept(scenario: ScenarioResult, figures: Figures) -> str:
    saved = 1.0 - figures.energy_j / scenario.fastest.energy_j
    return f"({_percent(saved)}, {attainment_text(figures.slo_attainment)})"


def _estimate(estimate: Estimate) -> str:
    if estimate.ci is None:
        return _percent(estimate.mean)
    low, high = estimate.ci
    return f"{_percent(estimate.mean)} [{100 * low:.1f}, {100 * high:.1f}]"


def _percent(share: float) -> str:
    return f"{100.0 * share:.1f} %"


def _place(scenario: ScenarioResult) -> dict[str, object]:
    return {
        "workload": scenario.workload,
        "slo_scale": scenario.slo_scale,
        "load": scenario.label,
        "rate_scale": scenario.rate_scale,
    }


def _write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
