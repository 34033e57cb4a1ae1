"""What the log of an engine that failed says: the line that tells most, and what to do about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

TAIL_LINES = 30
TAIL_BYTES = 256 * 1024
KEPT_LOGS = 5

# In the order of how sure they are. The root cause comes early in vLLM's log: what follows it are the errors
# of the processes that waited for the one that failed.
_CAUSES: tuple[tuple[str, str], ...] = (
    (
        (
            r"OutOfMemoryError|CUDA out of memory|No available memory for the cache blocks"
            r"|Free memory on device|is larger than the available KV cache memory"
            r"|To serve at least one request"
        ),
        (
            "the GPUs have too little free memory for this TP degree: use a larger one, lower "
            "--max-model-len, set --gpu-memory-utilization, or see with nvidia-smi who else uses them"
        ),
    ),
    (
        r"Address already in use|Errno 98",
        "another process listens on the port: end it, or choose another",
    ),
    (
        (
            r"is not a local folder and is not a valid model identifier|RepositoryNotFoundError|Repo id must"
            r"|does not appear to have a file named|GatedRepoError|LocalEntryNotFoundError"
            r"|OfflineModeIsEnabled|Can't load the configuration of|We couldn't connect to"
        ),
        "the model was not found: check its name or folder, the access to the model hub, and its token",
    ),
    (
        r"unrecognized arguments|: error: argument|expected one argument|invalid choice:",
        "this vLLM does not know one of the arguments: see `vllm serve --help=all`",
    ),
    (
        r"must be divisible by tensor parallel size|must be divisible by tp_size|is not divisible by",
        "the model cannot be split this way: leave this TP degree out",
    ),
    (
        r"World size .* is larger than the number of|Not enough GPUs|invalid device ordinal",
        "there are fewer GPUs than the TP degree needs: leave this degree out, or give more GPUs",
    ),
    (
        r"Not enough allowed NUMA nodes",
        "on a CPU each rank needs cores of its own: set VLLM_CPU_OMP_THREADS_BIND, e.g. '0|1' for TP 2",
    ),
    (
        r"No module named 'rlgov|Failed to load plugin rlgov|Error resolving .*rlgov",
        (
            "rlgov is not installed in vLLM's environment: install it there (without its extras), or run "
            "without the plugin"
        ),
    ),
    (
        r"No such file or directory: .*ninja|ninja: command not found",
        "vLLM compiles kernels with ninja: install it in vLLM's environment",
    ),
)
_ERROR = re.compile(r"(?:^|\s)[A-Za-z_][\w.]*(?:Error|Exception)\b(?::|$)")
_CONSEQUENCE = re.compile(
    r"See root cause above|Engine core initialization failed|WorkerProc initialization failed"
)
_PREFIX = re.compile(
    r"^(?:\([\w ]+pid=\d+\)\s*)?(?:(?:ERROR|INFO|WARNING|CRITICAL)\s+[\d:. -]+\[[^\]]*\]\s*)?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The telling line of a log, and the remedy; empty where the log tells nothing."""

    line: str
    remedy: str


def diagnose(text: str) -> Diagnosis:
    """Find the cause of a failure in a log."""
    lines = [_PREFIX.sub("", line).strip() for line in text.splitlines()]
    for pattern, remedy in _CAUSES:
        for line in lines:
            if re.search(pattern, line):
                return Diagnosis(line, remedy)
    errors = [line for line in lines if _ERROR.search(line)]
    causes = [line for line in errors if not _CONSEQUENCE.search(line)]
    told = [line for line in lines if line and not line.startswith(("Traceback", 'File "'))]
    return Diagnosis((causes or errors or told or [""])[-1], "")


def read_tail(path: Path) -> str:
    """The end of a log; empty if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - TAIL_BYTES, 0))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def failure(what: str, path: Path) -> str:
    """A message for a failed engine: the telling line and the remedy first, then where and the log's end."""
    text = read_tail(path)
    found = diagnose(text)
    message = [f"{what}: {found.line}" if found.line else f"{what}; its log is empty"]
    if found.remedy:
        message.append(f"Remedy: {found.remedy}.")
    last = text.splitlines()[-TAIL_LINES:]
    message.append(f"Log: {path}" + (", which ends with" if last else ""))
    return "\n".join([*message, *(f"  {line}" for line in last)])


def rotate(path: Path) -> None:
    """Keep the logs of earlier starts as ``NAME.1`` (the latest) up to ``NAME.5``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, KEPT_LOGS + 1))]
    for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
        if newer.exists():
            newer.replace(older)
