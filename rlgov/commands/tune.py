"""``rlgov tune``: a control rule's knobs, fitted on a trace's training span with a stated effort."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from rlgov.commands.output import Json, Progress, put_fields, put_json
from rlgov.commands.traces import open_trace
from rlgov.config import TuneSettings, nearest
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlgov.agents.baselines.space import PolicyContext
    from rlgov.agents.policy import Policy
    from rlgov.agents.tuning import Outcome
    from rlgov.simulation.profile import Profile


def tune(*, settings: Annotated[TuneSettings, Parameter(name="*")], json: Json = False) -> None:
    """Fit the knobs of a control rule on a trace's training span.

    Args:
        settings: What to tune, and with how much effort.
        json: Report as JSON.
    """
    import numpy as np

    from rlgov.agents.baselines import FAMILIES, PolicyContext
    from rlgov.agents.baselines.tuned import write_tuned
    from rlgov.agents.tuning import tune as run_tuning
    from rlgov.simulation.physics import build_tables
    from rlgov.simulation.profile import load_profile

    if settings.family not in FAMILIES:
        raise ConfigError(f"no rule {settings.family!r} to tune; {nearest(settings.family, FAMILIES)}")
    profile = load_profile(settings.profile)
    limits = profile.limits()
    limits = limits.with_service_level(limits.service_level.scaled(settings.slo_scale))
    context = PolicyContext(limits, build_tables(profile), limits.fastest, settings.seed)
    with Progress() as progress:
        result = run_tuning(
            FAMILIES[settings.family],
            _evaluator(settings, profile, context, progress),
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
        put_json(record.model_dump(mode="json") | {"file": str(path)})
        return
    fields: dict[str, object] = dict(record.parameters)
    fields |= {
        "energy": f"{result.best.outcome.energy_j / 1000:.1f} kJ",
        "attainment": f"{100 * result.best.outcome.slo_attainment:.2f} %",
        "evaluations": len(result.trials),
        "file": path,
    }
    short = "" if result.feasible else f" (misses the target of {100 * settings.target_attainment:g} %)"
    put_fields(f"{settings.family}, tuned{short}", fields)


def _evaluator(
    settings: TuneSettings, profile: Profile, context: PolicyContext, progress: Progress
) -> Callable[[Policy], Outcome]:
    """Runs a policy on the training span; counts the runs."""
    from rlgov.agents.playback import cut, figures, play
    from rlgov.agents.tuning import Outcome
    from rlgov.deployments.simulated import SimulatedDeployment

    limits = context.limits
    training, _ = open_trace(settings.trace).split(settings.train_fraction)
    episode, schedule = cut(training, interval_s=limits.interval_s, rate_scale=settings.rate_scale)
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
