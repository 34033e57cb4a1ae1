"""``rlgov serve``: vLLM behind a gateway, told what to do over a control socket."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from rlgov.commands.output import Json, put_fields, put_json
from rlgov.config import ServeSettings
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlgov.engine.stack import Stack
    from rlgov.engine.stack_settings import StackSettings
    from rlgov.engine.switch.feasibility import ModelShape
    from rlgov.simulation.profile import DeploymentShape, Profile

LOG = logging.getLogger(__name__)
DEFAULTS = ServeSettings()
EXIT_INTERRUPTED = 130
DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_BATCHED_TOKENS = 8192
SMALLEST_DEFAULT_CAP = 8
DEFAULT_GPU_SHARE = 0.9  # vLLM's own --gpu-memory-utilization


def serve(
    *vllm_argument: str,
    settings: Annotated[ServeSettings, Parameter(name="*")] = DEFAULTS,
    json: Json = False,
) -> int:
    """Run vLLM behind a gateway that holds, caps and moves its requests, until a signal ends it.

    Clients speak to the gateway as they would to vLLM; a governor speaks to the control socket. SIGTERM and
    Ctrl-C let requests in flight finish and stop the engines, a second one ends them at once. After a crash
    the engines serve on: start again with the same --run, and they are taken over.

    Args:
        vllm_argument: vLLM's own arguments, after --, such as: rlgov serve --model M -- --max-model-len 8192
        settings: What to run.
        json: Say where it listens as JSON.
    """
    import uvloop

    from rlgov.simulation.profile import load_profile

    profile = load_profile(settings.profile) if settings.profile is not None else None
    gpus, memory_bytes = _gpus(settings.gpus)
    arguments = (*settings.vllm_arguments, *vllm_argument)
    wanted = stack_settings(settings, arguments, profile, gpus, memory_bytes)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _allow_connections()
    return uvloop.run(_serve(wanted, json=json))


def stack_settings(
    settings: ServeSettings,
    arguments: tuple[str, ...],
    profile: Profile | None,
    gpus: tuple[str, ...],
    memory_bytes: float | None,
) -> StackSettings:
    """What to run, from flags, profile and machine.

    Args:
        settings: Flags.
        arguments: vLLM's own arguments.
        profile: What flags leave open.
        gpus: UUIDs of the GPUs that may be used.
        memory_bytes: Of the smallest of them.

    Raises:
        ConfigError: Something is missing, or does not fit together.
    """
    from rlgov.engine.arguments import check_arguments
    from rlgov.engine.gateway.settings import GatewaySettings
    from rlgov.engine.stack_settings import StackSettings, Timing
    from rlgov.engine.switch.feasibility import GpuRoom
    from rlgov.engine.switch.machine import Strategy

    check_arguments(arguments)
    model = settings.model or (profile.model.name if profile is not None else None)
    if model is None:
        raise ConfigError("no model to serve; name one with --model, or a profile with --profile")
    shape = profile.deployment if profile is not None else None
    limits = profile.limits() if profile is not None else None
    degrees = _descending(settings.tp) or (shape.tp_degrees if shape is not None else (1,))
    if shape is not None and settings.gpus == DEFAULTS.gpus:
        gpus = gpus[: shape.allotted_gpus]
    kv = dict(zip(limits.tp_degrees, limits.kv_capacity_tokens, strict=True)) if limits is not None else {}
    switch_s = dict(zip(limits.tp_degrees, limits.switch_s, strict=True)) if limits is not None else {}
    return StackSettings(
        model=model,
        command=(str(_program(settings.vllm)),),
        run=settings.run.absolute(),
        tp_degrees=degrees,
        batch_caps=_caps(settings, shape.batch_caps if shape is not None else ()),
        gateway=GatewaySettings(
            host=settings.host,
            port=settings.port,
            max_held=settings.max_held,
            hold_timeout_s=settings.hold_timeout_s,
        ),
        shape=_shape(model, profile),
        room=GpuRoom(memory_bytes if gpus else None, _gpu_share(arguments)),
        gpu_uuids=gpus,
        start_degree=settings.start_tp,
        strategy=None if settings.switch == "auto" else Strategy(settings.switch),
        max_num_batched_tokens=_batched_tokens(settings, arguments, shape),
        arguments=arguments,
        control=settings.control.absolute() if settings.control is not None else None,
        plugin=settings.plugin,
        restart_hung=settings.restart_hung,
        kv_capacity_tokens=tuple(kv.get(degree, 0) for degree in degrees),
        switch_s=tuple(switch_s.get(degree, 0.0) for degree in degrees),
        timing=Timing(
            start_timeout_s=settings.start_timeout_s,
            drain_timeout_s=settings.drain_timeout_s,
            shutdown_timeout_s=settings.shutdown_timeout_s,
        ),
    )


def _descending(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(numbers), reverse=True))


def _caps(settings: ServeSettings, of_profile: tuple[int, ...]) -> tuple[int, ...]:
    """The batch caps offered; the first one is the engines' own maximum."""
    caps = _descending(settings.batch_caps) or of_profile
    largest = settings.max_num_seqs or (caps[0] if caps else DEFAULT_MAX_NUM_SEQS)
    if settings.batch_caps and caps[0] > largest:
        raise ConfigError(f"batch cap {caps[0]} is above --max-num-seqs {largest}; leave it out")
    if not caps:
        caps = (largest,)
        while caps[-1] // 2 >= SMALLEST_DEFAULT_CAP:
            caps += (caps[-1] // 2,)
    return _descending((largest, *(cap for cap in caps if cap < largest)))


def _batched_tokens(settings: ServeSettings, arguments: Sequence[str], shape: DeploymentShape | None) -> int:
    given = _value(arguments, "--max-num-batched-tokens")
    if given is not None:
        if settings.max_num_batched_tokens is not None:
            raise ConfigError("--max-num-batched-tokens is given twice; leave it out after --")
        if not given.isdecimal():
            raise ConfigError(f"--max-num-batched-tokens must be a whole number, not {given!r}")
        return int(given)
    of_profile = shape.max_num_batched_tokens if shape is not None else DEFAULT_BATCHED_TOKENS
    return settings.max_num_batched_tokens or of_profile


def _gpu_share(arguments: Sequence[str]) -> float:
    given = _value(arguments, "--gpu-memory-utilization")
    try:
        return DEFAULT_GPU_SHARE if given is None else float(given)
    except ValueError:
        raise ConfigError(f"--gpu-memory-utilization must be a number, not {given!r}") from None


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """What vLLM's arguments give for a flag."""
    for position, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            return value if given else "".join(arguments[position + 1 : position + 2])
    return None


def _shape(model: str, profile: Profile | None) -> ModelShape:
    """From the model's own files where they lie here, else from the profile."""
    from rlgov.engine.model_files import read_shape
    from rlgov.engine.switch.feasibility import ModelShape

    read = read_shape(model)
    if profile is None or profile.model.name != model:
        return read
    return ModelShape(
        read.attention_heads or profile.model.heads, read.weight_bytes or profile.model.weight_bytes
    )


def _program(named: Path | None) -> Path:
    from rlgov.doctor.engine import find_program

    program = find_program(named)
    if program is None:
        raise ConfigError(
            f"{named or 'vllm'}: no such program; name that of an environment with vLLM with --vllm"
        )
    return program.absolute()


def _gpus(wanted: tuple[str, ...]) -> tuple[tuple[str, ...], float | None]:
    """UUIDs of the GPUs to use, and the memory of the smallest."""
    from rlgov.clock import SystemClock
    from rlgov.hardware.hardware import open_hardware

    if wanted == ("none",):
        return (), None
    with open_hardware(None if wanted == ("all",) else wanted, SystemClock()) as hardware:
        gpus = hardware.gpus
    return tuple(gpu.uuid for gpu in gpus), min((float(gpu.memory_bytes) for gpu in gpus), default=None)


def _allow_connections() -> None:
    """Every stream takes two descriptors: ask for as many as this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(wanted: StackSettings, *, json: bool) -> int:
    from rlgov.clock import SystemClock
    from rlgov.engine.stack import Stack

    stack = Stack(wanted, SystemClock())
    asked = asyncio.Semaphore(0)  # released by every signal
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.release)
    starting = asyncio.ensure_future(stack.start())
    ended = asyncio.ensure_future(asked.acquire())
    await asyncio.wait({starting, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        LOG.warning("asked to end before the first engine served")
        starting.cancel()
        await asyncio.wait({starting})
        return EXIT_INTERRUPTED
    try:
        await starting
        _say(stack, wanted, json=json)
        await ended
    finally:
        ended.cancel()
    LOG.info("ending: requests in flight may finish; a second signal ends them at once")
    closing = asyncio.ensure_future(stack.close())
    again = asyncio.ensure_future(asked.acquire())
    await asyncio.wait({closing, again}, return_when=asyncio.FIRST_COMPLETED)
    if not closing.done():
        LOG.warning("ending at once")
        closing.cancel()
        await asyncio.wait({closing})
        await stack.close(grace_s=0.0)
    again.cancel()
    return 0


def _say(stack: Stack, wanted: StackSettings, *, json: bool) -> None:
    """Where it listens and what it offers."""
    limits = stack.limits()
    fields: dict[str, object] = {
        "url": f"http://{wanted.gateway.host}:{stack.port}",
        "control": str(stack.control_path),
        "model": limits.model,
        "tp_degrees": list(limits.tp_degrees),
        "tp_degree": stack.state().tp_degree,
        "batch_caps": list(limits.batch_caps),
        "switch": limits.strategy,
        "run": str(wanted.run),
    }
    if json:
        put_json(fields)
    else:
        put_fields("rlgov serves", fields)
    sys.stdout.flush()
