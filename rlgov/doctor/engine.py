"""The vllm program: is it there, is it a release the plugin was proven in, does it see the plugin."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rlgov
from rlgov.doctor.finding import fail, ok, warn
from rlgov.engine.plugin.selftest import PROVEN, proven

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlgov.doctor.finding import Finding

LOCAL_PROGRAM = Path(".venv-vllm/bin/vllm")
ENTRY_POINTS = ("vllm.general_plugins", "vllm.endpoint_plugins")
_TIMEOUT_S = 60.0
_INSTALL = "pip install vllm in an environment of its own, and name its program with --vllm"

# Runs in vLLM's own interpreter; reads what is installed and imports none of it.
_QUESTION = """
import json
from importlib import metadata

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

print(json.dumps({
    "vllm": version("vllm"),
    "rlgov": version("rlgov"),
    "groups": [group for group in %s if any(e.name == "rlgov" for e in metadata.entry_points(group=group))],
}))
"""


def find_program(named: Path | None) -> Path | None:
    """The vllm program: the one named, else that on the PATH, else that of ``.venv-vllm`` here."""
    if named is not None:
        found = shutil.which(named)
        return Path(found) if found else None
    on_path = shutil.which("vllm")
    if on_path:
        return Path(on_path)
    return LOCAL_PROGRAM if shutil.which(LOCAL_PROGRAM) else None


def interpreter_of(program: Path) -> Path | None:
    """The Python that runs a program, by its first line, else the one that lies beside it."""
    with program.open("rb") as file:
        first = file.readline(1024).decode(errors="replace").strip()
    if first.startswith("#!"):
        words = first.removeprefix("#!").split()
        if words and Path(words[0]).name.startswith("python"):
            return Path(words[0])
    beside = program.parent / "python"
    return beside if beside.exists() else None


def check_vllm(named: Path | None) -> Iterator[Finding]:
    """Program, release and plugin.

    Args:
        named: The program, if the user named one.
    """
    program = find_program(named)
    if program is None:
        said = "not on the PATH" if named is None else f"{named} is no program"
        yield fail("vllm", said, _INSTALL)
        return
    interpreter = interpreter_of(program)
    if interpreter is None:
        yield warn("vllm", f"{program}: cannot tell which Python runs it", "name the vllm of an environment")
        return
    try:
        installed = _ask(interpreter)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        yield fail("vllm", f"{program}: its interpreter {interpreter} does not answer ({error})", _INSTALL)
        return
    yield from _judge(program, interpreter, installed)


def _judge(program: Path, interpreter: Path, installed: dict[str, Any]) -> Iterator[Finding]:
    version = installed["vllm"]
    low, high = (".".join(map(str, release)) for release in PROVEN)
    if version is None:
        yield fail("vllm", f"{program}: no vLLM is installed for {interpreter}", _INSTALL)
        return
    if proven(version):
        yield ok("vllm", f"{version} at {program}")
    else:
        yield warn(
            "vllm",
            f"{version} at {program}; the plugin was proven from {low} up to, not including, {high}",
            f"install vllm>={low},<{high}; with another one the gateway holds the batch cap",
        )
    missing = [group for group in ENTRY_POINTS if group not in installed["groups"]]
    if missing:
        yield warn(
            "plugin",
            f"vLLM does not see rlgov's plugin ({', '.join(missing)}): the gateway would hold the batch cap",
            f"{interpreter} -m pip install --no-deps rlgov=={rlgov.__version__}",
        )
    elif installed["rlgov"] != rlgov.__version__:
        yield warn(
            "plugin",
            f"vLLM has rlgov {installed['rlgov']}, this is {rlgov.__version__}",
            f"{interpreter} -m pip install --no-deps rlgov=={rlgov.__version__}",
        )
    else:
        yield ok("plugin", f"vLLM sees rlgov {installed['rlgov']}")


def _ask(interpreter: Path) -> dict[str, Any]:
    done = subprocess.run(  # noqa: S603  # the interpreter of the program that the user wants to serve with
        [str(interpreter), "-c", _QUESTION % repr(ENTRY_POINTS)],
        capture_output=True,
        text=True,
        check=True,
        timeout=_TIMEOUT_S,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
