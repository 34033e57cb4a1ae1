"""Opens the deployment that a person names: a profile, a stack of ``rlgov serve``, a vLLM that runs."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from rlgov.characterize.iterations import IterationSource, NoIterations, PluginIterations, StackIterations
from rlgov.characterize.live import LOAD_FOLDER, LiveBench
from rlgov.characterize.measure import Place
from rlgov.characterize.meter_log import LoggedGpus
from rlgov.characterize.server import ask_server
from rlgov.characterize.simulated import SimulatedBench
from rlgov.config import DEFAULT_PROFILE
from rlgov.deployments.attached import PluginCap, attach_live
from rlgov.deployments.live_open import open_gpus, open_live
from rlgov.engine.control.client import StackClient
from rlgov.errors import ConfigError
from rlgov.records import Configuration, Limits, ServiceLevel
from rlgov.simulation.profile import load_profile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rlgov.characterize.bench import Bench
    from rlgov.characterize.server import Server
    from rlgov.characterize.workloads import Lengths
    from rlgov.clock import Clock
    from rlgov.config import CharacterizeSettings
    from rlgov.deployments.live import LiveDeployment
    from rlgov.deployments.live_open import GpuGroup, HardwareChoice
    from rlgov.engine.samples import StackLimits

_INTERVAL_S: Final = 1.0
_ANSWER_S: Final = 10.0
_ABOUT_CLOCKS: Final = 8  # taken of all that a GPU has where neither profile nor person names any
_ANY_LEVEL: Final = ServiceLevel(1.0, 0.075)  # counts misses, which no point uses


def open_bench(
    settings: CharacterizeSettings,
    workloads: Mapping[str, Lengths],
    clock: Clock,
    *,
    hardware: GpuGroup | None = None,
) -> Bench:
    """Open what the settings name. Nothing is moved before the first point.

    Args:
        settings: Which deployment.
        workloads: Lengths by name.
        clock: For live deployments.
        hardware: GPUs that are open already, instead of those that the settings name; taken over.

    Raises:
        RlgovError: It cannot be reached, or does not offer what is asked for.
    """
    if settings.deployment == "simulated":
        profile = load_profile(settings.profile or DEFAULT_PROFILE)
        base = profile.limits()
        limits = widened(base, settings, profile.gpu.grid_clocks_mhz, base.batch_caps[0])
        return SimulatedBench(profile, workloads, settings.seed, limits)
    with ExitStack() as undo:
        if settings.deployment == "live":
            return _open_live(settings, workloads, clock, hardware, undo)
        return _open_attached(settings, workloads, clock, hardware, undo)


def widened(
    limits: Limits, settings: CharacterizeSettings, supported_mhz: Iterable[int], largest_cap: int
) -> Limits:
    """The limits, with clocks and caps that are asked for and can be had: no policy depends on the axes."""
    clocks = {*limits.sm_clocks_mhz, *(set(settings.clocks) & set(supported_mhz))}
    caps = {*limits.batch_caps, *(cap for cap in settings.caps if cap <= largest_cap)}
    return replace(
        limits,
        sm_clocks_mhz=tuple(sorted(clocks, reverse=True)),
        batch_caps=tuple(sorted(caps, reverse=True)),
    )


def thinned(supported_mhz: tuple[int, ...]) -> tuple[int, ...]:
    """About eight of the supported clocks, the fastest and the slowest too; without a GPU any number."""
    if not supported_mhz:
        return (1,)
    step = max((len(supported_mhz) - 1) / (_ABOUT_CLOCKS - 1), 1.0)
    count = min(len(supported_mhz), _ABOUT_CLOCKS)
    return tuple(supported_mhz[round(i * step)] for i in range(count))


def _open_live(
    settings: CharacterizeSettings,
    workloads: Mapping[str, Lengths],
    clock: Clock,
    hardware: GpuGroup | None,
    undo: ExitStack,
) -> Bench:
    with StackClient(settings.control, timeout_s=_ANSWER_S) as client:
        offer, state = client.limits(), client.state()
    server = ask_server(settings.url, settings.api_key_env)
    gpus = _gpus(settings, hardware, offer.gpu_uuids, clock)
    undo.callback(gpus.close)
    supported = gpus.clocks.supported_mhz
    base = _profile_limits(settings) or _offered(offer, supported)
    limits = widened(base, settings, supported, offer.batch_caps[0])
    start = None
    if state.tp_degree in limits.tp_degrees:  # no switch before the first point needs one
        start = Configuration(limits.sm_clocks_mhz[0], limits.batch_caps[0], state.tp_degree)
    iterations = StackIterations(StackClient(settings.control, timeout_s=_ANSWER_S))
    undo.callback(iterations.close)
    deployment = open_live(settings.control, limits, clock, hardware=gpus, start=start)
    undo.pop_all()
    notes = (f"live: TP switches by {offer.strategy}",)
    place = Place("live", offer.model, _gpu_name(gpus), measured_clock=gpus.present)
    return _bench(
        deployment,
        gpus,
        iterations=iterations,
        place=place,
        notes=notes,
        settings=settings,
        workloads=workloads,
        clock=clock,
        server=server,
    )


def _open_attached(
    settings: CharacterizeSettings,
    workloads: Mapping[str, Lengths],
    clock: Clock,
    hardware: GpuGroup | None,
    undo: ExitStack,
) -> Bench:
    token = _token(settings)
    gpus = _gpus(settings, hardware, None, clock)
    undo.callback(gpus.close)
    supported = gpus.clocks.supported_mhz
    profile = _profile_limits(settings)
    iterations: IterationSource = NoIterations()
    if token is not None:
        largest = PluginCap(settings.url, token, _ANSWER_S).largest
        iterations = PluginIterations(settings.url, token, _ANSWER_S)
        undo.callback(iterations.close)
    else:
        largest = profile.batch_caps[0] if profile is not None else max(settings.caps, default=0)
        if len(settings.caps) > 1 or not largest:
            msg = (
                "without the plugin's token the batch cap is vLLM's own --max-num-seqs: give that as the one "
                "cap, or name the token's environment variable with --token-env"
            )
            raise ConfigError(msg)
    base = profile or _plain_limits((largest,), settings.tp, thinned(supported))
    limits = widened(base, settings, supported, largest)
    if token is None:
        limits = replace(limits, batch_caps=(largest,))
    # The axes up to what this engine can run at once.
    limits = replace(
        limits, batch_caps=tuple(cap for cap in limits.batch_caps if cap <= largest), tp_degrees=settings.tp,
        kv_capacity_tokens=(0,), switch_s=(0.0,), allotted_gpus=settings.tp[0],
    )  # fmt: skip
    server = ask_server(settings.url, settings.api_key_env)
    deployment = attach_live(settings.url, limits, clock, tp_degree=settings.tp[0], gpus=gpus, token=token)
    undo.pop_all()
    place = Place("attach", server.model, _gpu_name(gpus), measured_clock=gpus.present)
    notes = ("attach: tokens, queue and batch are as a metrics page tells them",)
    return _bench(
        deployment,
        gpus,
        iterations=iterations,
        place=place,
        notes=notes,
        settings=settings,
        workloads=workloads,
        clock=clock,
        server=server,
    )


def _bench(  # noqa: PLR0913  # the parts that both kinds of live deployment have
    deployment: LiveDeployment,
    gpus: LoggedGpus,
    *,
    iterations: IterationSource,
    place: Place,
    notes: tuple[str, ...],
    settings: CharacterizeSettings,
    workloads: Mapping[str, Lengths],
    clock: Clock,
    server: Server,
) -> Bench:
    flags: tuple[str, ...] = ("--vocabulary", str(settings.vocabulary))
    if settings.api_key_env is not None:
        flags += ("--api-key-env", settings.api_key_env)
    return LiveBench(
        deployment,
        gpus,
        iterations,
        url=settings.url,
        out=settings.out / LOAD_FOLDER,
        workloads=workloads,
        seed=settings.seed,
        clock=clock,
        place=place,
        versions=server.versions,
        most_tokens=server.most_tokens,
        load_arguments=flags,
        switch_timeout_s=settings.switch_timeout_s,
        notes=notes,
    )


def _gpus(
    settings: CharacterizeSettings, hardware: GpuGroup | None, allotted: tuple[str, ...] | None, clock: Clock
) -> LoggedGpus:
    if hardware is None:
        named = settings.gpus
        choice: HardwareChoice = named[0] if named in {("auto",), ("none",)} else named
        hardware = open_gpus(choice, allotted, clock)
    return LoggedGpus(hardware)


def _profile_limits(settings: CharacterizeSettings) -> Limits | None:
    return None if settings.profile is None else load_profile(settings.profile).limits()


def _offered(offer: StackLimits, supported_mhz: tuple[int, ...]) -> Limits:
    limits = _plain_limits(offer.batch_caps, offer.tp_degrees, thinned(supported_mhz))
    return replace(
        limits,
        allotted_gpus=offer.allotted_gpus,
        kv_capacity_tokens=offer.kv_capacity_tokens,
        switch_s=offer.switch_s,
        max_num_batched_tokens=offer.max_num_batched_tokens,
    )


def _plain_limits(
    batch_caps: tuple[int, ...], tp_degrees: tuple[int, ...], clocks_mhz: tuple[int, ...]
) -> Limits:
    return Limits(
        sm_clocks_mhz=clocks_mhz,
        batch_caps=batch_caps,
        tp_degrees=tp_degrees,
        interval_s=_INTERVAL_S,
        service_level=_ANY_LEVEL,
        allotted_gpus=max(tp_degrees),
        tdp_w=0.0,  # not known, and nothing here asks for it
        kv_capacity_tokens=(0,) * len(tp_degrees),
        switch_s=(0.0,) * len(tp_degrees),
        max_num_batched_tokens=0,
    )


def _gpu_name(gpus: LoggedGpus) -> str | None:
    return next(iter(gpus.names), None)


def _token(settings: CharacterizeSettings) -> str | None:
    if settings.token_env is None:
        return None
    token = os.environ.get(settings.token_env)
    if not token:
        msg = f"environment variable {settings.token_env} is not set; put the plugin's token there"
        raise ConfigError(msg)
    return token
