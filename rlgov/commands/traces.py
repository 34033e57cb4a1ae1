"""Traces by the name a person gives: a file, or generated traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlgov.config import nearest
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from rlgov.workload.trace import Trace

SYNTHETIC = "synthetic:"


def open_trace(name: str, *, seed: int = 0) -> Trace:
    """Read a trace file, or generate ``synthetic:NAME``.

    Args:
        name: Path of a trace file, or ``synthetic:`` and the name of a specification.
        seed: Fixes generated traffic; a file is what it is.

    Raises:
        ConfigError: There is no such specification.
        TraceError: The file cannot be used.
    """
    if name.startswith(SYNTHETIC):
        import numpy as np

        from rlgov.workload.synthesis import SPECS, synthesize

        kind = name.removeprefix(SYNTHETIC)
        if kind not in SPECS:
            raise ConfigError(f"no generated traffic {kind!r}; {nearest(kind, SPECS)}")
        return synthesize(SPECS[kind], np.random.default_rng(seed))
    from rlgov.workload.readers import read_trace

    return read_trace(name)
