"""``rlgov deploy``: the files that put keeper and governor into production."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from rlgov.commands.output import Json, put_json
from rlgov.errors import ConfigError


def deploy(
    target: Literal["systemd", "kubernetes", "compose", "grafana"],
    /,
    *,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Print or write the files to run the governor in production; each begins with what to adapt in it.

    Args:
        target: systemd: units for keeper, governor and a restore at boot. kubernetes: a DaemonSet for the
            keeper and a sidecar for a vLLM pod. compose: one machine. grafana: a dashboard.
        out: Folder to write them to; files that are there and differ are not overwritten. Printed without.
        json: Report as JSON: the files' contents by name.
    """
    from rlgov.governor.assets import deployment_files

    files = deployment_files(target)
    if out is None:
        if json:
            put_json(files)
        else:
            sys.stdout.write(_printed(files))
        return
    written = [str(_write(out / name, content)) for name, content in files.items()]
    if json:
        put_json(written)
    else:
        sys.stdout.write("".join(f"{path}\n" for path in written))


def _printed(files: dict[str, str]) -> str:
    """One file as it is; several under headings that each of their formats takes for a comment."""
    if len(files) == 1:
        (content,) = files.values()
        return content
    return "\n".join(f"# ---- {name}\n{content}" for name, content in files.items())


def _write(path: Path, content: str) -> Path:
    if path.exists():
        if path.read_text(encoding="utf-8") == content:
            return path
        raise ConfigError(f"{path}: is there and differs; move it away, or give another folder with --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path
