"""``rlgov train``: PPO on a simulated deployment."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from rlgov.agents.train_config import TrainConfig
from rlgov.commands.output import Json, put_fields, put_json


def train(*, settings: Annotated[TrainConfig, Parameter(name="*")], json: Json = False) -> None:
    """Train a policy by PPO on a simulated deployment.

    Ctrl-C saves a checkpoint and ends; the same command with --resume goes on from there.

    Args:
        settings: What to train, and how.
        json: Report as JSON.
    """
    from rlgov.agents.train import train as run_training

    result = run_training(settings)
    if json:
        put_json(
            {
                "out": str(result.out),
                "steps": result.steps,
                "interrupted": result.interrupted,
                "best": None if result.best is None else dict(result.best),
                "bundle": None if result.bundle is None else str(result.bundle),
            }
        )
        return
    fields: dict[str, object] = {"run folder": result.out, "steps": f"{result.steps:,}"}
    fields |= {f"best {name}": f"{value:.4g}" for name, value in (result.best or {}).items()}
    if result.bundle is not None:
        fields["bundle"] = result.bundle
    put_fields("stopped" if result.interrupted else "trained", fields)
