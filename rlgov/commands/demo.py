"""``rlgov demo``: a small run of everything."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from rlgov.commands.output import Json, put_json
from rlgov.config import DemoSettings

DEFAULTS = DemoSettings()


def demo(*, settings: Annotated[DemoSettings, Parameter(name="*")] = DEFAULTS, json: Json = False) -> None:
    """Train a small policy, replay a trace against the baselines, draw the result: a few minutes.

    Args:
        settings: Where, and on what.
        json: Report as JSON.
    """
    from rlgov.agents.demo import run_demo

    result = run_demo(settings.out, profile=settings.profile, seed=settings.seed, quiet=json)
    if json:
        put_json(result)
