"""What can go wrong between a governor and its keeper."""

from __future__ import annotations

from rlgov.errors import HardwareError


class KeeperGone(HardwareError):  # noqa: N818  # says what happened; every error here is a HardwareError
    """The keeper cannot be reached, or went away. Its next start at the latest restores what was locked."""


class KeeperRefused(HardwareError):  # noqa: N818  # as KeeperGone
    """The keeper answered, and said no.

    Args:
        message: Why, and what to do.
        code: The keeper's word for it.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class LeaseLost(HardwareError):  # noqa: N818  # as KeeperGone
    """The lease ended: it was not renewed in time, or the keeper ended it. The clocks are restored."""


class ForeignWriter(HardwareError):  # noqa: N818  # as KeeperGone
    """Somebody else changed the clock of a GPU: it is theirs until it is re-armed.

    Args:
        message: What was seen, and what to do.
        gpus: The GPUs, by UUID.
    """

    def __init__(self, message: str, gpus: tuple[str, ...]) -> None:
        super().__init__(message)
        self.gpus = gpus
