"""What crosses the control socket, as JSON: unknown fields, wrong types and other versions are refused.

The values are those of :mod:`rlgov.engine.samples`. Infinity, the last bound of a histogram, is written
as the string ``"Infinity"``, since JSON has no number for it.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator, with_config

from rlgov.engine import samples

SCHEMA_HEADER = "Rlgov-Schema"
LARGEST_LEASE_S = 3600.0

_VALUES = (
    samples.RequestRecord,
    samples.Traffic,
    samples.EngineSample,
    samples.EngineIterations,
    samples.EngineInfo,
    samples.StackState,
    samples.StackInterval,
    samples.StackLimits,
)
for _value in _VALUES:
    with_config(ConfigDict(extra="forbid", strict=True))(_value)
# Not strict about the type of its numbers: infinity comes as a string.
with_config(ConfigDict(extra="forbid", ser_json_inf_nan="strings"))(samples.Histogram)

STATE = TypeAdapter(samples.StackState)
LIMITS = TypeAdapter(samples.StackLimits)
INTERVAL = TypeAdapter(samples.StackInterval)
ITERATIONS = TypeAdapter(samples.EngineIterations)


@lru_cache(maxsize=1)
def schema_digest() -> str:
    """Twelve hexadecimal digits that differ where two sides would not understand each other."""
    schemas = [adapter.json_schema() for adapter in (STATE, LIMITS, INTERVAL, ITERATIONS)]
    schemas.append(ConfigurationRequest.model_json_schema())
    return hashlib.sha256(json.dumps(schemas, sort_keys=True).encode()).hexdigest()[:12]


class ConfigurationRequest(BaseModel):
    """What may be asked of a stack; what is left out stays as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    batch_cap: Annotated[int, Field(ge=1)] | None = None
    """Requests that may run at once; the largest cap restores the engine's own maximum."""
    tp_degree: Annotated[int, Field(ge=1)] | None = None
    lease_s: Annotated[float, Field(gt=0, le=LARGEST_LEASE_S)] | None = None
    """The cap falls back to the maximum when it is not asked for again within this time."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.batch_cap is None and self.tp_degree is None:
            msg = "asks for nothing; give batch_cap, tp_degree or both"
            raise ValueError(msg)
        return self
