"""The command line and environment of one ``vllm serve``, and what an operator may not set."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rlgov.engine.spec import EngineSpec

SCHEDULER = "rlgov.engine.plugin.scheduler.RlgovScheduler"
PLUGIN = "rlgov"
QUIET_PATHS = "/health,/metrics,/rlgov/v1/state,/rlgov/v1/cap"

_BY_STACK = "rlgov serve sets it for each engine"
_ONE_ENGINE = "rlgov talks to one API server with one engine behind it"
_PLAIN_HTTP = "rlgov talks to the engine by plain HTTP on a loopback port; end TLS in front of the gateway"
RESERVED: dict[str, str] = {
    "--model": "name the model with rlgov's own --model",
    "--host": f"{_BY_STACK}; where the gateway listens is rlgov's own --host",
    "--port": f"{_BY_STACK}; where the gateway listens is rlgov's own --port",
    "--tensor-parallel-size": "list the TP degrees with rlgov's own --tp",
    "-tp": "list the TP degrees with rlgov's own --tp",
    "--max-num-seqs": "set rlgov's own --max-num-seqs",
    "--scheduler-cls": "the plugin's scheduler holds the batch cap; run without it to use another",
    "--shutdown-timeout": "set rlgov's own time limit of a drain",
    "--uds": _BY_STACK,
    "--headless": _ONE_ENGINE,
    "--grpc": _ONE_ENGINE,
    "--api-server-count": _ONE_ENGINE,
    "-asc": _ONE_ENGINE,
    "--data-parallel-size": _ONE_ENGINE,
    "-dp": _ONE_ENGINE,
    "--pipeline-parallel-size": "an engine has as many GPUs as its TP degree",
    "-pp": "an engine has as many GPUs as its TP degree",
    "--root-path": _BY_STACK,
    "--ssl-keyfile": _PLAIN_HTTP,
    "--ssl-certfile": _PLAIN_HTTP,
    "--disable-log-stats": "rlgov reads the engine's metrics",
}
"""vLLM's arguments that are not the operator's to set, and what to do instead."""

_SHORTEST_PREFIX = 4  # "--xy": vLLM's parser takes unambiguous beginnings of an argument for the whole


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse what is rlgov's own, also as an abbreviation, with underscores, or inside a ``--config`` file.

    Raises:
        ConfigError: Naming the argument, and where to set it.
    """
    for position, argument in enumerate(arguments):
        if not argument.startswith("-") or re.fullmatch(r"-[\d.]+", argument):
            continue
        name, given, value = argument.partition("=")
        _check_name(_normal(name), argument)
        if _normal(name) == "--config":
            following = arguments[position + 1] if position + 1 < len(arguments) else ""
            _check_file(Path(value if given else following))


def api_key(spec: EngineSpec, inherited: Mapping[str, str] | None = None) -> str | None:
    """A key that the engine's own API asks for: the operator's ``--api-key``, else ``VLLM_API_KEY``."""
    for position, argument in enumerate(spec.arguments):
        name, given, value = argument.partition("=")
        if _normal(name) == "--api-key":
            return value if given else "".join(spec.arguments[position + 1 : position + 2])
    environment = {**(os.environ if inherited is None else inherited), **spec.environment}
    return environment.get("VLLM_API_KEY") or None


def command_line(spec: EngineSpec) -> list[str]:
    """The whole command line of an engine. Raises ConfigError as :func:`check_arguments`."""
    check_arguments(spec.arguments)
    own = {
        "--host": spec.host,
        "--port": str(spec.port),
        "--tensor-parallel-size": str(spec.tp_degree),
        "--max-num-seqs": str(spec.max_num_seqs),
        # Whole seconds, and never 0: that would abort what is in flight.
        "--shutdown-timeout": str(math.ceil(spec.shutdown_timeout_s)),
    }
    if spec.plugin:
        own["--scheduler-cls"] = SCHEDULER
    quiet = "--disable-access-log-for-endpoints"
    if not any(_normal(argument.partition("=")[0]) == quiet for argument in spec.arguments):
        own[quiet] = QUIET_PATHS  # asked every second: they would bury what matters in the log
    settings = [part for pair in own.items() for part in pair]
    return [*spec.command, "serve", spec.model, *settings, *spec.arguments]


def process_environment(spec: EngineSpec, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of an engine.

    Without an allow-list of the operator's, ``VLLM_PLUGINS`` names rlgov alone: vLLM loads no other plugin.

    Raises:
        ConfigError: The operator asks for vLLM's development mode, which opens unguarded calls.
    """
    if "VLLM_SERVER_DEV_MODE" in spec.environment:
        raise ConfigError(
            "VLLM_SERVER_DEV_MODE opens calls to everybody that stop or change the engine; leave it out"
        )
    environment = {**(os.environ if inherited is None else inherited), **spec.environment}
    environment.pop("VLLM_SERVER_DEV_MODE", None)
    environment["RLGOV_ENGINE_ID"] = spec.engine_id
    environment["RLGOV_PLUGIN_TOKEN"] = spec.token
    environment["RLGOV_PLUGIN"] = str(int(spec.plugin))
    if spec.plugin:
        listed = [name for name in environment.get("VLLM_PLUGINS", "").split(",") if name]
        environment["VLLM_PLUGINS"] = ",".join([*listed, *([] if PLUGIN in listed else [PLUGIN])])
    if spec.gpu_uuids:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(spec.gpu_uuids)
    scripts = Path(spec.command[0]).parent
    if (scripts.parent / "pyvenv.cfg").is_file():
        # As if the environment were activated: kernels are compiled by a `ninja` beside vllm.
        environment["PATH"] = os.pathsep.join([str(scripts), environment.get("PATH", os.defpath)])
    return environment


def _normal(name: str) -> str:
    return name.replace("_", "-") if name.startswith("--") else name


def _check_name(name: str, argument: str) -> None:
    for reserved, remedy in RESERVED.items():
        shortened = name.startswith("--") and len(name) >= _SHORTEST_PREFIX and reserved.startswith(name)
        if name == reserved or shortened:
            raise ConfigError(f"vLLM's argument {argument!r} is rlgov's own ({reserved}): {remedy}")


def _check_file(path: Path) -> None:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"vLLM's --config {path} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"vLLM's --config {path} must be a mapping of arguments")
    for name in settings:
        if str(name) == "api-key" or _normal(f"--{name}") == "--api-key":
            raise ConfigError(
                f"api-key in {path} is unknown to rlgov's own probes: give it as --api-key instead"
            )
        if str(name) not in {"model", "model_tag"}:  # the model on the command line wins
            _check_name(_normal(f"--{name}"), f"{name} in {path}")
