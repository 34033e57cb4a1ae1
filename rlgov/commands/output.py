"""How commands speak: one JSON value with ``--json``, otherwise lines for people."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

WIDTH_WITHOUT_TERMINAL = 140

Json = Annotated[bool, Parameter(name="--json", negative="")]
"""The flag of every command that reports."""


def put_json(value: Any) -> None:  # noqa: ANN401  # anything that JSON can hold
    """Write one JSON value to standard output; a number that JSON lacks (NaN) is an error, not a surprise."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def console() -> Console:
    """Where tables go: standard output, wide enough for every column when nobody's window limits it."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL, file=sys.stdout)


def put_fields(title: str, fields: Mapping[str, object]) -> None:
    """Write a titled, aligned list of names and values to standard output."""
    width = max((len(name) for name in fields), default=0)
    lines = [title, *(f"  {name:<{width}}  {value}" for name, value in fields.items())]
    sys.stdout.write("\n".join(lines) + "\n")


class Progress:
    """Progress on standard error: a bar on a terminal, elsewhere a line for every tenth."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._tenths = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Tell that ``done`` of ``total`` jobs are finished, the last one being of ``what``."""
        if self._terminal:
            if self._bar is None:
                self._bar = tqdm(total=total, file=sys.stderr, leave=False)
            self._bar.set_description(what, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        tenths = 10 * done // total
        if tenths > self._tenths:
            self._tenths = tenths
            sys.stderr.write(f"{what}: {done} of {total}\n")
