"""Python, packages, limits of the system, the run folder."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rlgov.doctor.finding import fail, ok, warn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlgov.doctor.finding import Finding

GIB = 2**30
ENOUGH_FILES = 16_384
"""The gateway takes 8192 connections, and each request in flight has one to the engine as well."""
ENOUGH_SHARED_BYTES = GIB
ENOUGH_DISK_BYTES = GIB
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # asked for its free space only

# Top-level modules of the extras; what is missing is looked up, not imported.
EXTRAS = {
    "live": ("aiohttp", "httptools", "prometheus_client", "pynvml", "uvloop"),
    "train": (
        "gymnasium",
        "matplotlib",
        "numba",
        "pandas",
        "sb3_contrib",
        "scipy",
        "stable_baselines3",
        "tensorboard",
        "torch",
    ),
}
_OLDEST_PYTHON = (3, 11)


def check_python() -> Finding:
    """The interpreter."""
    said = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < _OLDEST_PYTHON:
        return fail("python", said, "rlgov needs Python 3.11 or newer")
    return ok("python", said)


def check_extras() -> Iterator[Finding]:
    """Packages of the extras: live is what serving needs, train is for training only."""
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        check = f"packages ({extra})"
        if not missing:
            yield ok(check, ", ".join(modules))
        else:
            report = fail if extra == "live" else warn
            what = "serving" if extra == "live" else "training and TensorBoard"
            yield report(
                check,
                f"{what}: {', '.join(missing)} missing",
                f"pip install 'rlgov[{extra}]'",
            )
    if _installed("pynvml") and _installed("nvidia-ml-py"):
        yield warn(
            "packages (pynvml)",
            "the deprecated distribution pynvml lies over nvidia-ml-py",
            "pip uninstall pynvml; then pip install --force-reinstall nvidia-ml-py",
        )


def check_files() -> Finding:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    said = f"{'unlimited' if soft == unlimited else soft} open files"
    if soft != unlimited and soft < ENOUGH_FILES:
        how = "as root, or in limits.conf, " if hard != unlimited and hard < ENOUGH_FILES else ""
        return warn(
            "open files",
            f"{said}: enough for about {soft // 2} requests at once",
            f"before rlgov serve {how}run: ulimit -n {ENOUGH_FILES}",
        )
    return ok("open files", said)


def check_shared_memory(folder: Path = SHARED_MEMORY) -> Finding:
    """Shared memory, by which the workers of one engine talk to each other."""
    if not folder.is_dir():
        return warn(
            "shared memory", f"there is no {folder}", "mount a tmpfs there: TP degrees above 1 need it"
        )
    free_bytes = shutil.disk_usage(folder).free
    said = f"{free_bytes / GIB:.1f} GiB free in {folder}"
    if free_bytes < ENOUGH_SHARED_BYTES:
        return warn(
            "shared memory",
            said,
            "TP degrees above 1 may fail: start the container with --ipc=host or --shm-size=8g",
        )
    return ok("shared memory", said)


def check_run_folder(folder: Path) -> Finding:
    """Whether the run folder can be made and written."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return fail(
            "run folder",
            f"{folder} cannot be written ({existing})",
            "name another one with --run, or have its rights changed",
        )
    free_bytes = shutil.disk_usage(existing).free
    said = f"{folder}, {free_bytes / GIB:.1f} GiB free"
    if free_bytes < ENOUGH_DISK_BYTES:
        return warn("run folder", said, "free some disk: logs and journals grow")
    return ok("run folder", said)


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
