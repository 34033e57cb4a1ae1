"""Tuned baselines on disk: family, parameters and what they were tuned on, as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA_VERSION: Final = 1
TARGET_ATTAINMENT: Final = 0.99


class TunedRecord(BaseModel):
    """A tuned baseline as stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    family: str
    parameters: dict[str, bool | int | float | None]
    profile: str = ""
    trained_on: tuple[str, ...] = ()
    target_attainment: float = TARGET_ATTAINMENT
    energy_j: float | None = None  # on the spans it was tuned on
    slo_attainment: float | None = None
    evaluations: int = 0


def write_tuned(record: TunedRecord, path: Path) -> None:
    """Store a tuned baseline; equal records give equal bytes."""
    path.write_text(json.dumps(record.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")


def read_tuned(path: Path) -> TunedRecord:
    """A stored tuned baseline. Raises ConfigError that names the file and the field."""
    try:
        record = TunedRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        msg = f"{path}: not a tuned baseline ({error}); give a file that tuning wrote"
        raise ConfigError(msg) from error
    if record.schema_version != SCHEMA_VERSION:
        msg = (
            f"{path}: schema_version {record.schema_version}, this version reads {SCHEMA_VERSION}; tune again"
        )
        raise ConfigError(msg)
    return record
