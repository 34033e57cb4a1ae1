"""What a model's own files tell about the TP degrees it allows, where they lie on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rlgov.engine.switch.feasibility import ModelShape

CONFIG_FILE = "config.json"


def read_shape(model: str) -> ModelShape:
    """Attention heads and weight bytes of a model; None for what cannot be found here.

    Args:
        model: A folder, or a name whose files are in the hub's cache.
    """
    folder = _folder(model)
    if folder is None:
        return ModelShape()
    return ModelShape(_heads(folder), _weight_bytes(folder))


def _folder(model: str) -> Path | None:
    path = Path(model)
    if path.is_dir():
        return path
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    snapshots = hub / f"models--{model.replace('/', '--')}" / "snapshots"
    if not snapshots.is_dir():
        return None
    kept = [folder for folder in snapshots.iterdir() if (folder / CONFIG_FILE).is_file()]
    return max(kept, key=lambda folder: folder.stat().st_mtime, default=None)


def _heads(folder: Path) -> int | None:
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        # Models that see or hear keep the language part one level below.
        text = content.get("text_config", content)
        heads = text["num_attention_heads"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return heads if isinstance(heads, int) and heads > 0 else None


def _weight_bytes(folder: Path) -> float | None:
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return float(total) if total else None
