"""The page of the report: one HTML file that needs nothing else, with figures and tables in it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Field:
    """One column of a table on the page.

    ``digits`` are significant ones, 0 for a whole number; ``per`` turns a share into percent and the like.
    """

    column: str
    heading: str
    digits: int = 3
    per: float = 1.0


@dataclass(frozen=True, slots=True)
class Cell:
    """What is read, and what is sorted by (missing: after everything else)."""

    text: str
    key: str
    number: bool


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table on the page."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure on the page, or, without ``source``, why there is none."""

    name: str
    title: str
    caption: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One of the founding paper's experiments, for the workload to look at first and for the others."""

    title: str
    first: Picture
    others: tuple[Picture, ...]


MISSING = "–"  # noqa: RUF001  # a dash as wide as a digit


def table_of(frame: pd.DataFrame, fields: Sequence[Field]) -> TextTable:
    """Columns of a frame as text; a number with its significant digits, missing as a dash."""
    rows = tuple(
        tuple(cell(value, field.digits, field.per) for value, field in zip(row, fields, strict=True))
        for row in frame[[field.column for field in fields]].itertuples(index=False, name=None)
    )
    return TextTable(tuple(field.heading for field in fields), rows)


def cell(value: Any, digits: int = 3, per: float = 1.0) -> Cell:  # noqa: ANN401  # whatever a table holds
    """One value as text and as something to sort by."""
    if value is None or value is pd.NA or (isinstance(value, float) and not np.isfinite(value)):
        return Cell(MISSING, "", number=True)
    if isinstance(value, bool | np.bool_):
        word = "yes" if value else "no"
        return Cell(word, word, number=False)
    if isinstance(value, str):
        return Cell(value, value, number=False)
    number = per * float(value)
    return Cell(significant(number, digits), repr(number), number=True)


def significant(number: float, digits: int = 3) -> str:
    """So many significant digits (0: a whole number), no exponent; all digits before the point."""
    if number == 0 or digits == 0:
        return f"{number:.0f}"
    places = max(digits - 1 - int(np.floor(np.log10(abs(number)))), 0)
    return f"{number:.{places}f}"


def inline(path: Path) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def render(content: dict[str, Any]) -> str:
    """The page; every name that the template uses must be in ``content``."""
    environment = Environment(
        loader=PackageLoader("rlgov.characterize"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(content)
