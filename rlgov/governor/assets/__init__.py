"""Files for production, as package data: units, manifests, a compose file and a dashboard."""

from __future__ import annotations

from importlib import resources

from rlgov.errors import ConfigError

TARGETS = ("systemd", "kubernetes", "compose", "grafana")


def deployment_files(target: str) -> dict[str, str]:
    """The files of one way to deploy, by name.

    Args:
        target: One of :data:`TARGETS`.

    Raises:
        ConfigError: There is no such way.
    """
    if target not in TARGETS:
        raise ConfigError(f"cannot deploy to {target!r}; there are {', '.join(TARGETS)}")
    folder = resources.files(__name__) / target
    found = sorted((entry for entry in folder.iterdir() if entry.is_file()), key=lambda entry: entry.name)
    return {entry.name: entry.read_text(encoding="utf-8") for entry in found}
