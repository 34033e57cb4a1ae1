"""Opens a governor from what a person named, and refuses what does not fit together."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rlgov.agents.baselines import PolicyContext, by_name
from rlgov.agents.bundle import Bundle, BundlePolicy, load_bundle, software_versions
from rlgov.agents.fallback import with_fallback
from rlgov.characterize.server import ask_server
from rlgov.config import DEFAULT_PROFILE
from rlgov.deployments.attached import attach_live
from rlgov.deployments.live_open import open_live
from rlgov.engine.control.client import StackClient
from rlgov.errors import BundleError, CharacterizationError, ConfigError
from rlgov.governor.adaptation import Adaptation
from rlgov.governor.adaptation_file import Owner
from rlgov.governor.core import Core
from rlgov.governor.fitting import mismatches
from rlgov.governor.gpus import GovernedGpus, open_group
from rlgov.governor.records import Governed, Mode
from rlgov.governor.rivals import FileClaim, NoStackClaim
from rlgov.governor.settings import DEFAULT_CONTROL
from rlgov.simulation.forecast import Forecast, stated_error
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile

if TYPE_CHECKING:
    from rlgov.agents.policy import Policy
    from rlgov.clock import Clock
    from rlgov.deployments.live import LiveDeployment
    from rlgov.governor.rivals import StackClaim
    from rlgov.governor.settings import GovernSettings
    from rlgov.records import Limits
    from rlgov.simulation.profile import Profile

_PATIENCE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Opened:
    """Everything a governor needs. Close the deployment: that gives all of it back."""

    deployment: LiveDeployment
    core: Core
    gpus: GovernedGpus
    governed: Governed
    mismatches: tuple[str, ...]
    claim: StackClaim
    """Keeps other governors from acting on the same stack; give it up when the deployment is closed."""
    adaptation_owner: Owner
    """Of what adaptation finds: the profile and these GPUs."""


def open_governor(settings: GovernSettings, clock: Clock) -> Opened:
    """Connect to a deployment and its GPUs, load the policy, check that all belong together.

    Nothing is moved, and no right is needed, before the loop acts.

    Raises:
        ConfigError: It shall be active and must not: the message says why, and what to do.
        BundleError: The policy's file is damaged.
        DeploymentError: The deployment cannot be reached, or does not offer what the profile needs.
        HardwareError: A GPU is not there or does not answer.
    """
    bundle = _bundle(settings.policy)
    profile = load_profile(settings.profile or (DEFAULT_PROFILE if bundle is None else _own(bundle)))
    wanted = _limits(profile, settings)
    with ExitStack() as undo:
        model, allotted = _stack(settings)
        gpus = open_group(settings, allotted, wanted.interval_s, clock)
        undo.callback(gpus.close)
        deployment = _deployment(settings, wanted, gpus, clock)
        undo.pop_all()
        undo.callback(deployment.close)
        limits = deployment.limits
        unfit = mismatches(profile, limits, bundle=bundle, gpus=gpus.gpus, model=model)
        mode = Mode(settings.mode)
        if mode is Mode.ACTIVE:
            _refuse(settings, gpus, unfit, deployment)
        tables = build_tables(profile)
        policy = _policy(settings, bundle, PolicyContext(limits, tables))
        forecast, error = Forecast(tables, limits), stated_error(profile)
        adaptation = None
        if settings.adapt:
            adaptation = Adaptation(
                settings.adaptation, limits, forecast, stated_error=error, advice=_advice(settings, profile)
            )
        core = Core(
            limits,
            policy,
            mode=mode,
            guard=settings.guard,
            watch=settings.watch,
            safety=settings.safety,
            mismatches=unfit,
            clocks=str(gpus.kind),
            forecast=forecast,
            forecast_error=error,
            adaptation=adaptation,
        )
        undo.pop_all()
    governed = Governed(
        policy="none" if policy is None else policy.name,
        policy_digest=str(getattr(policy, "digest", "")),
        profile=profile.name,
        gpu_names=tuple(gpu.name for gpu in gpus.gpus),
        gpu_uuids=tuple(gpu.uuid for gpu in gpus.gpus),
        model=model or profile.model.name,
        limits=limits,
        versions=software_versions(),
        started_wall_s=clock.wall_s(),
        target=settings.attach or str(settings.control or DEFAULT_CONTROL),
    )
    owner = Owner.of(profile, governed.gpu_uuids)
    claim: StackClaim = NoStackClaim()
    if settings.attach is None:
        control = settings.control or DEFAULT_CONTROL
        claim = FileClaim(control.with_name(f"{control.name}.governor"))
    return Opened(deployment, core, gpus, governed, unfit, claim, owner)


def _advice(settings: GovernSettings, profile: Profile) -> str:
    """The commands that measure this deployment anew."""
    if settings.attach is None:
        where = f"--deployment live --control {settings.control or DEFAULT_CONTROL}"
    else:
        where = f"--deployment attach --url {settings.attach}"
    name = settings.profile or profile.name
    return (
        "see first whether heat, a power limit or another tenant explains it; if it stays, measure anew at a "
        f"quiet time: rlgov characterize {where} --profile {name} --out runs/characterize, then "
        f"rlgov calibrate runs/characterize --profile {name} --out anew.yaml"
    )


def _bundle(policy: str | None) -> Bundle | None:
    """The bundle, where a file is named; its digest is checked."""
    if policy is None or not (Path(policy).is_file() or Path(policy).suffix == ".safetensors"):
        return None
    if Path(policy).suffix == ".json":
        return None  # a tuned rule
    return load_bundle(Path(policy))


def _own(bundle: Bundle) -> str:
    return bundle.manifest.profile_name


def _limits(profile: Profile, settings: GovernSettings) -> Limits:
    limits = profile.limits()
    return replace(
        limits,
        interval_s=limits.interval_s if settings.interval_s is None else settings.interval_s,
        service_level=limits.service_level.scaled(settings.slo_scale),
    )


def _stack(settings: GovernSettings) -> tuple[str, tuple[str, ...] | None]:
    """Model and GPUs of the stack; of an attached vLLM the model, where it tells."""
    if settings.attach is not None:
        try:
            server = ask_server(settings.attach, None)
        except CharacterizationError:  # not up yet, or it asks for a key: the profile's word stands
            return "", None
        return server.root or server.model, None
    with StackClient(settings.control or DEFAULT_CONTROL, timeout_s=_PATIENCE_S) as client:
        offer = client.limits()
    return offer.model, offer.gpu_uuids


def _deployment(settings: GovernSettings, wanted: Limits, gpus: GovernedGpus, clock: Clock) -> LiveDeployment:
    if settings.attach is None:
        return open_live(settings.control or DEFAULT_CONTROL, wanted, clock, hardware=gpus, acting=False)
    token = None
    if settings.token_env is not None:
        token = os.environ.get(settings.token_env)
        if not token:
            raise ConfigError(
                f"environment variable {settings.token_env} is not set; put the plugin's token there, or "
                "leave --token-env out"
            )
    return attach_live(
        settings.attach,
        wanted,
        clock,
        tp_degree=settings.tp or wanted.tp_degrees[0],
        gpus=gpus,
        token=token,
        acting=False,
    )


def _policy(settings: GovernSettings, bundle: Bundle | None, context: PolicyContext) -> Policy | None:
    """The policy; None where it cannot decide here at all, which the mismatches tell."""
    if bundle is None:
        return None if settings.policy is None else by_name(settings.policy, context)
    try:
        learned = BundlePolicy(bundle)
        learned.start(context.limits, 1)
    except BundleError:
        if Mode(settings.mode) is Mode.ACTIVE:
            raise
        return None
    assert context.tables is not None  # noqa: S101  # made a moment ago
    return with_fallback(learned, context.tables, context.limits, settings.fallback)


def _refuse(
    settings: GovernSettings, gpus: GovernedGpus, unfit: tuple[str, ...], deployment: LiveDeployment
) -> None:
    """Raise ConfigError unless it may be active."""
    if settings.policy is None:
        raise ConfigError("--mode active needs a policy: name a bundle, or a baseline such as ecofreq")
    if unfit:
        raise ConfigError(
            f"--mode active is refused: {'; '.join(unfit)}. Name the right --profile, train for this "
            "deployment, or begin with --mode shadow"
        )
    if not deployment.metered:
        raise ConfigError(
            f"--mode active is refused: nothing meters the energy of these GPUs ({gpus.hardware.note}); run "
            "it where NVML shows them (see `rlgov doctor`), or begin with --mode shadow"
        )
    if not gpus.clocks.present and settings.clocks != "none":
        raise ConfigError(
            f"--mode active is refused: clocks cannot be set here: {gpus.note}. Say --clocks none to govern "
            "batch cap and TP degree only"
        )
