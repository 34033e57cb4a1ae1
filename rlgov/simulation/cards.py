"""Cards by name: data sheets with a source for every number, and priors of what no sheet states."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Self

import yaml
from pydantic import Field, model_validator

from rlgov.errors import ProfileError
from rlgov.simulation.part import Part, Positive
from rlgov.simulation.profile import Gpu, Parameters

_FILE = "gpus.yaml"
_SHEET = ("tdp_w", "hbm_bytes", "hbm_bytes_per_s", "peak_bf16_flop_per_s", "peak_fp8_flop_per_s",
          "peak_fp4_flop_per_s", "sm_clock_min_mhz", "sm_clock_max_mhz", "sm_clock_step_mhz")  # fmt: skip


class Figure(Part):
    """A number and where it was read; unchecked ones are general knowledge or of a sister part."""

    value: Positive
    source: str
    checked: bool = True


class Prior(Part):
    """What is assumed about a card beyond its sheet."""

    value: float
    low: float
    high: float
    source: str


class Card(Part):
    """One card of the table; units as in :class:`rlgov.simulation.profile.Gpu`."""

    name: str
    aliases: tuple[str, ...]
    tdp_w: Figure
    hbm_bytes: Figure
    hbm_bytes_per_s: Figure
    peak_bf16_flop_per_s: Figure  # at the boost clock, dense
    sm_clock_min_mhz: Figure
    sm_clock_max_mhz: Figure
    sm_clock_step_mhz: Figure
    link: str
    all_reduce_bytes_per_s: dict[int, Figure]  # by TP degree
    peak_fp8_flop_per_s: Figure | None = None
    peak_fp4_flop_per_s: Figure | None = None
    sm_clock_boost_mhz: Figure | None = None  # of the peaks, where the driver offers higher clocks
    priors: dict[str, Prior] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> Self:
        unknown = set(self.priors) - set(Parameters.model_fields)
        if unknown:
            msg = f"priors of {self.name} that no profile has: {sorted(unknown)}"
            raise ValueError(msg)
        return self

    def figures(self) -> dict[str, Figure]:
        """The sheet's numbers that are known, by name."""
        found = {name: getattr(self, name) for name in _SHEET}
        return {name: figure for name, figure in found.items() if figure is not None}

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Names of the numbers that were not read from a sheet, a driver or a measurement."""
        links = {f"all_reduce_bytes_per_s.{tp}": f for tp, f in self.all_reduce_bytes_per_s.items()}
        return tuple(name for name, figure in (self.figures() | links).items() if not figure.checked)

    def gpu(self) -> Gpu:
        """As a profile carries it. Peaks are scaled from the boost clock to the highest the driver offers."""
        values = {name: figure.value for name, figure in self.figures().items()}
        if self.sm_clock_boost_mhz is not None:
            faster = self.sm_clock_max_mhz.value / self.sm_clock_boost_mhz.value
            values |= {name: value * faster for name, value in values.items() if name.startswith("peak_")}
        sources = dict.fromkeys(figure.source for figure in self.figures().values())
        doubt = tuple(name for name in self.unchecked if "." not in name)
        note = f"; not verified: {', '.join(doubt)}" if doubt else ""
        return Gpu.model_validate({"name": self.name, "source": "; ".join(sources) + note, **values})


@cache
def cards() -> dict[str, Card]:
    """Every card of the table by its name on the command line."""
    text = (resources.files("rlgov.simulation") / _FILE).read_text(encoding="utf-8")
    return {name: Card.model_validate(raw) for name, raw in yaml.safe_load(text).items()}


def find_card(name: str) -> Card:
    """A card by its name in the table, its full name or an alias; case does not matter.

    Raises:
        ProfileError: It is not in the table; the message lists those that are.
    """
    wanted = name.lower().replace(" ", "-").replace("_", "-")
    table = cards()
    for key, card in table.items():
        if wanted in {key, card.name.lower().replace(" ", "-"), *card.aliases}:
            return card
    close = get_close_matches(wanted, table, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    msg = f"no GPU {name!r} in the table; {hint}it has {', '.join(sorted(table))} (see `rlgov profile gpus`)"
    raise ProfileError(msg)
