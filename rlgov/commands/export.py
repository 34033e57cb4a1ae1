"""``rlgov export``: a trained model as a bundle without pickle."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from rlgov.commands.output import Json, put_fields, put_json
from rlgov.config import ExportSettings


def export(*, settings: Annotated[ExportSettings, Parameter(name="*")], json: Json = False) -> None:
    """Turn a trained model into a bundle: weights without pickle, with everything needed to run them.

    Training writes a bundle of its best model when it ends; this is for a run that was stopped, or for
    its newest checkpoint.

    Args:
        settings: Which run, which model, and where to.
        json: Report as JSON.
    """
    from rlgov.agents.bundle import load_bundle
    from rlgov.agents.train import export_run

    path = export_run(settings.run, settings.out, model=settings.model)
    bundle = load_bundle(path)
    manifest = bundle.manifest
    record = {
        "file": str(path),
        "name": manifest.name,
        "profile": manifest.profile_name,
        "digest": bundle.digest,
        "bytes": path.stat().st_size,
    }
    if json:
        put_json(record)
    else:
        put_fields("bundle", record)
