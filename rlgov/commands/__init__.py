"""The commands of ``rlgov``, one module a command, imported only when called."""

from __future__ import annotations
