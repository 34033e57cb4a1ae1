"""The command line: which commands there are, where settings come from, how errors end.

Only the light core is imported here. A command's module, and with it torch or numba, is imported when
that command runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter, ValidationError
from cyclopts.config import Dict, Env

from rlgov import __version__
from rlgov.errors import RlgovError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ENVIRONMENT_PREFIX = "RLGOV_"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
COMMANDS_WITH_SETTINGS = frozenset(
    {
        "config",
        "demo",
        "train",
        "replay",
        "tune",
        "study",
        "export",
        "serve",
        "govern",
        "load",
        "characterize",
    }
)
TRAIN_MODULES = frozenset(
    {
        "gymnasium",
        "matplotlib",
        "numba",
        "pandas",
        "pyarrow",
        "sb3_contrib",
        "scipy",
        "stable_baselines3",
        "tensorboard",
        "torch",
    }
)
LIVE_MODULES = frozenset({"aiohttp", "httptools", "prometheus_client", "pynvml", "uvloop"})

_HELP = """A governor for LLM serving: the least energy that still meets the latency objectives.

Settings: a flag wins over an environment variable (RLGOV_TRAIN_SEED for train --seed), that one over the
file named with --config, and the file over the default. `rlgov config show` tells which is in force.
"""

# Name, module and function, one line of help. Given here, so that help needs no import.
_COMMANDS = (
    ("demo", "demo:demo", "Train a small policy, replay a trace against the baselines, draw the result."),
    ("train", "train:train", "Train a policy by PPO on a simulated deployment."),
    ("replay", "replay:replay", "Put a trace through policies and baselines, deterministically."),
    ("tune", "tune:tune", "Fit the knobs of a control rule on a trace's training span."),
    ("study", "study:study", "Set learned policies against every static setting and every tuned rule."),
    ("export", "export:export", "Turn a trained model into a bundle without pickle."),
    ("serve", "serve:serve", "Run vLLM behind a gateway that holds, caps and moves its requests."),
    ("govern", "govern:govern", "Watch a deployment, show what a policy would do, or let it act."),
    ("load", "load:load", "Send a trace's requests to a running server, and measure its latencies."),
    (
        "characterize",
        "characterize:characterize",
        "Measure latency and energy over clocks, batch caps, TP degrees, lengths and load.",
    ),
    ("calibrate", "calibrate:calibrate", "Fit a profile to measurements, and say how well it holds."),
    ("status", "status:status", "What a running governor sees, decides and does, and what to check next."),
    ("tell", "status:tell", "Tell a running governor how far it may go, or to begin again."),
    ("report", "report:report", "What a governed run saved, or would have saved had it acted."),
    ("deploy", "deploy:deploy", "Unit files, manifests and a dashboard to run the governor in production."),
    ("keeper", "keeper:keeper", "Lend GPU clocks to a governor, and take them back whatever happens to it."),
    ("doctor", "doctor:doctor", "What works on this machine, and what to do about what does not."),
)
_TRACE_COMMANDS = (
    ("show", "trace:show", "Summarise and plot a trace."),
    ("fetch", "trace:fetch", "Download a public trace, verify and keep it."),
    ("synth", "trace:synth", "Generate a trace from a seed."),
)
_PROFILE_COMMANDS = (
    ("list", "profile:list_profiles", "Name the profiles that come with rlgov."),
    ("show", "profile:show", "What a profile holds, and what follows from it."),
    ("create", "profile_create:create", "Write a profile by physics alone: a data sheet and a config.json."),
    ("gpus", "profile_create:gpus", "The GPUs that `profile create` knows, and the source of every number."),
)
_CONFIG_COMMANDS = (
    ("show", "config:show", "Every setting in force, and where it comes from."),
    ("schema", "config:schema", "The JSON schema of the configuration file."),
)


def build_app() -> App:
    """The application with every command, none of them imported yet."""
    app = App(
        name="rlgov",
        help=_HELP,
        help_format="plaintext",
        version=__version__,
        # No flags such as --empty-traces and --no-json: an absent flag says the same.
        default_parameter=Parameter(negative_iterable=(), consume_multiple=True),
        suppress_keyboard_interrupt=False,
    )
    _add(app, _COMMANDS)
    for name, commands, about in (
        ("trace", _TRACE_COMMANDS, "Show, fetch or generate request traces."),
        ("profile", _PROFILE_COMMANDS, "The simulated deployments: a GPU, a model, its limits."),
        ("config", _CONFIG_COMMANDS, "Settings in force, and the schema of the configuration file."),
    ):
        group = App(name=name, help=about)
        _add(group, commands)
        app.command(group)
    app.meta.suppress_keyboard_interrupt = False
    app.meta.default(_launcher(app))
    return app


def _add(app: App, commands: Sequence[tuple[str, str, str]]) -> None:
    for name, target, about in commands:
        app.command(f"rlgov.commands.{target}", name=name, help=about)


def _launcher(app: App) -> Callable[..., Any]:
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[Path | None, Parameter(env_var="RLGOV_CONFIG", group="Everywhere")] = None,
    ) -> Any:  # noqa: ANN401  # whatever the command returns
        """Run a command.

        Args:
            tokens: The command and its arguments.
            config: YAML file with a section a command.
        """
        app.config = sources(config, tokens)
        command, bound, wanted = app.parse_args(tokens, print_error=False, exit_on_error=False)
        # `config show` asks for the application itself, with its sources, by an argument of this name.
        inner = {"application": app} if "application" in wanted else {}
        return command(*bound.args, **bound.kwargs, **inner)

    return launch


def sources(config: Path | None, tokens: Sequence[str]) -> tuple[Env | Dict, ...]:
    """Where values come from after flags, strongest first; unknown names are refused at once.

    Args:
        config: The configuration file, if one was named.
        tokens: The command line; a command without settings needs no schema loaded.
    """
    environment = Env(ENVIRONMENT_PREFIX)
    if config is None and not COMMANDS_WITH_SETTINGS.intersection(tokens[:1]):
        return (environment,)
    from rlgov.commands.sections import sections
    from rlgov.config import check_environment, read_config_file

    schemas = sections()
    check_environment(os.environ, schemas, ENVIRONMENT_PREFIX)
    if config is None:
        return (environment,)
    return (environment, Dict(read_config_file(config, schemas), source=str(config)))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and give its exit code.

    Args:
        arguments: What follows the program's name; the process's own if not given.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = build_app().meta(
            tokens, print_error=False, exit_on_error=False, result_action="return_value"
        )
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) went away. Whatever is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except (CycloptsError, RlgovError, ImportError, OSError) as error:
        message = _explain(error)
        if message is None:
            raise
        return _fail(message)
    return result if isinstance(result, int) else 0


def _explain(error: Exception) -> str | None:
    """One line for an error that the person at the keyboard can do something about, None for any other."""
    if isinstance(error, CycloptsError):
        return _usage(error)
    if isinstance(error, OSError):
        return None if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, ImportError):
        missing = _missing_module(error)
        for extra, modules in (("train", TRAIN_MODULES), ("live", LIVE_MODULES)):
            if missing in modules:
                return f"this command needs {missing}; install it with: pip install 'rlgov[{extra}]'"
        return None
    return str(error)


def _usage(error: CycloptsError) -> str:
    cause = error.__cause__
    if isinstance(error, ValidationError) and cause is not None:
        import pydantic  # loaded by now, but not for --help

        from rlgov.config import explain

        if isinstance(cause, pydantic.ValidationError):
            return explain(cause)
    return " ".join(str(error).split())


def _missing_module(error: ImportError) -> str | None:
    """The top-level module that could not be found; the command line's library wraps the error once."""
    for link in (error, error.__cause__):
        if isinstance(link, ModuleNotFoundError) and link.name:
            return link.name.split(".")[0]
    return None


def _fail(message: str, code: int = EXIT_ERROR) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"rlgov: {message}\n")
    return code


def main() -> NoReturn:
    """Entry point of the ``rlgov`` program."""
    if sys.argv[1:2] == ["keeper"]:
        # In place of this process: it runs as root for months, and needs next to nothing of what is here.
        os.execv(sys.executable, [sys.executable, "-m", "rlgov.hardware.keeper", *sys.argv[2:]])  # noqa: S606  # no shell is meant
    sys.exit(run())
