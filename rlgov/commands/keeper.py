"""``rlgov keeper``: hands over to the keeper's own small program."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter


def keeper(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Lend GPU clocks to a governor, and take them back whatever happens to it.

    The same as the program ``rlgov-keeper``, which a service should start: it needs less memory.

    Args:
        arguments: Its arguments; ``rlgov keeper --help`` lists them.
    """
    from rlgov.hardware.keeper.main import run

    return run(arguments)
