"""How commands speak: one JSON value with ``--json``, otherwise lines for people."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from collections.abc import Mapping

Json = Annotated[bool, Parameter(name="--json", negative="")]
"""The flag of every command that reports."""


def put_json(value: Any) -> None:  # noqa: ANN401  # anything that JSON can hold
    """Write one JSON value to standard output; a number that JSON lacks (NaN) is an error, not a surprise."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def put_fields(title: str, fields: Mapping[str, object]) -> None:
    """Write a titled, aligned list of names and values to standard output."""
    width = max((len(name) for name in fields), default=0)
    lines = [title, *(f"  {name:<{width}}  {value}" for name, value in fields.items())]
    sys.stdout.write("\n".join(lines) + "\n")
