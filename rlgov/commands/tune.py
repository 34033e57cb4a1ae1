"""``rlgov tune``: a control rule's knobs, fitted on a trace's training span with a stated effort."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from rlgov.commands.output import Json, Progress, put_fields, put_json
from rlgov.commands.traces import open_trace
from rlgov.config import TuneSettings, nearest
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlgov.agents.baselines.space import PolicyContext
    from rlgov.agents.playback import Schedule
    from rlgov.agents.policy import Policy
    from rlgov.agents.replay import StaticPoint
    from rlgov.agents.tuning import Outcome
    from rlgov.records import Limits
    from rlgov.simulation.profile import Profile
    from rlgov.simulation.tables import PhysicsTables
    from rlgov.workload.trace import Trace


def tune(*, settings: Annotated[TuneSettings, Parameter(name="*")], json: Json = False) -> None:
    """Fit the knobs of a control rule on a trace's training span.

    Every static setting is run on the span first; the search begins at the rule's defaults and at what
    comes nearest to the best of them. Those runs are the same for every rule and do not count as effort.

    Args:
        settings: What to tune, and with how much effort.
        json: Report as JSON.
    """
    import numpy as np

    from rlgov.agents.baselines import FAMILIES, PolicyContext
    from rlgov.agents.baselines.static import static_name
    from rlgov.agents.baselines.tuned import write_tuned
    from rlgov.agents.playback import cut
    from rlgov.agents.replay import best_static
    from rlgov.agents.tuning import tune as run_tuning
    from rlgov.simulation.physics import build_tables
    from rlgov.simulation.profile import load_profile

    if settings.family not in FAMILIES:
        raise ConfigError(f"no rule {settings.family!r} to tune; {nearest(settings.family, FAMILIES)}")
    profile = load_profile(settings.profile)
    limits = profile.limits()
    limits = limits.with_service_level(limits.service_level.scaled(settings.slo_scale))
    tables = build_tables(profile)
    training, _ = open_trace(settings.trace).split(settings.train_fraction)
    episode, schedule = cut(training, interval_s=limits.interval_s, rate_scale=settings.rate_scale)
    with Progress() as progress:
        statics = _every_static(limits, tables, episode, schedule, progress)
    static = best_static(statics, settings.target_attainment)
    context = PolicyContext(limits, tables, static.configuration, settings.seed)
    with Progress() as progress:
        result = run_tuning(
            FAMILIES[settings.family],
            _evaluator(settings, profile, context, episode, schedule, progress),
            settings.budget,
            np.random.default_rng(settings.seed),
            context=context,
            target_attainment=settings.target_attainment,
        )
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / f"{settings.family}.json"
    record = result.record(profile=profile.name, trained_on=(settings.trace,))
    write_tuned(record, path)
    if json:
        found = {"file": str(path), "best_static": asdict(static.configuration)}
        put_json(record.model_dump(mode="json") | found)
        return
    fields: dict[str, object] = dict(record.parameters)
    fields |= {
        "energy": f"{result.best.outcome.energy_j / 1000:.1f} kJ",
        "attainment": f"{100 * result.best.outcome.slo_attainment:.2f} %",
        "evaluations": len(result.trials),
        "best static": f"{static_name(static.configuration)}, {static.figures.energy_j / 1000:.1f} kJ",
        "file": path,
    }
    short = "" if result.feasible else f" (misses the target of {100 * settings.target_attainment:g} %)"
    put_fields(f"{settings.family}, tuned{short}", fields)


def _every_static(
    limits: Limits, tables: PhysicsTables, episode: Trace, schedule: Schedule, progress: Progress
) -> list[StaticPoint]:
    """What each static setting does with the training span."""
    from rlgov.agents.baselines.static import every_static
    from rlgov.agents.playback import figures, hold
    from rlgov.agents.replay import StaticPoint
    from rlgov.simulation.batch import SimulationBatch

    batch = SimulationBatch(limits, 1, tables, capacity=max(1, len(episode)))
    settings = [policy.start_configuration(limits) for policy in every_static(limits)]
    points = []
    for done, configuration in enumerate(settings, start=1):
        run = hold(batch, episode, tables, schedule, configuration)
        points.append(StaticPoint(configuration, figures(run)))
        progress(done, len(settings), "static settings")
    return points


def _evaluator(
    settings: TuneSettings,
    profile: Profile,
    context: PolicyContext,
    episode: Trace,
    schedule: Schedule,
    progress: Progress,
) -> Callable[[Policy], Outcome]:
    """Runs a policy on the training span; counts the runs."""
    from rlgov.agents.playback import figures, play
    from rlgov.agents.tuning import Outcome
    from rlgov.deployments.simulated import SimulatedDeployment

    limits = context.limits
    done = 0

    def evaluate(policy: Policy) -> Outcome:
        nonlocal done
        deployment = SimulatedDeployment(
            profile,
            episode,
            service_level=limits.service_level,
            start=policy.start_configuration(limits),
            tables=context.tables,
        )
        reduced = figures(play(deployment, policy, schedule))
        done += 1
        progress(done, settings.budget, f"tuning {settings.family}")
        return Outcome(reduced.energy_j, reduced.slo_attainment)

    return evaluate
