"""``rlgov export``: a trained model as a bundle without pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rlgov.commands.output import Json, put_fields, put_json
from rlgov.config import ExportSettings
from rlgov.errors import ConfigError

BUNDLE_NAMES = {"best": "policy.safetensors", "last": "policy-last.safetensors"}


def export(*, settings: Annotated[ExportSettings, Parameter(name="*")], json: Json = False) -> None:
    """Turn a trained model into a bundle: weights without pickle, with everything needed to run them.

    Training writes a bundle of its best model when it ends; this is for a run that was stopped, or for
    its newest checkpoint.

    Args:
        settings: Which run, which model, and where to.
        json: Report as JSON.
    """
    from rlgov.agents.bundle import load_bundle

    out = settings.out or settings.run / BUNDLE_NAMES[settings.model]
    _write(settings, out)
    bundle = load_bundle(out)
    record: dict[str, object] = {
        "file": str(out),
        "name": bundle.manifest.name,
        "profile": bundle.manifest.profile_name,
        "digest": bundle.digest,
        "size_bytes": out.stat().st_size,
    }
    if json:
        put_json(record)
    else:
        put_fields("bundle", record)


def _write(settings: ExportSettings, out: Path) -> None:
    import torch

    from rlgov.agents.ppo import build_ppo, load_checkpoint
    from rlgov.agents.train import SimulatedEnvironments, export_trained, load_config, seen_observations

    source = _source(settings)
    config = load_config(settings.run / "config.yml")
    torch.set_num_threads(1)  # as in training: small matrices, and equal rounding
    env = SimulatedEnvironments(config).training()
    try:
        model = build_ppo(env, config.ppo, config.seed)
        if settings.model == "best":
            model.set_parameters(str(source), device="cpu")
        else:
            load_checkpoint(model, source)
        # A bundle carries what observations looked like in training, so some episodes are played again.
        export_trained(model, seen_observations(model, env, config), config, out)
    finally:
        env.close()


def _source(settings: ExportSettings) -> Path:
    from rlgov.agents.callbacks import checkpoints

    if not (settings.run / "config.yml").is_file():
        raise ConfigError(f"{settings.run} is no training run (no config.yml); name its folder with --run")
    if settings.model == "best":
        best = settings.run / "best_model.zip"
        if not best.is_file():
            raise ConfigError(f"{best} does not exist: no model was evaluated yet; try --model last")
        return best
    found = checkpoints(settings.run / "checkpoints")
    if not found:
        raise ConfigError(
            f"{settings.run} holds no checkpoint yet; train on with --resume, or try --model best"
        )
    return found[-1]
