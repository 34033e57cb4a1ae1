"""The governor: a learned policy beside a serving stack, within limits, and given back whatever happens.

:mod:`~rlgov.governor.core` decides and does no I/O; :mod:`~rlgov.governor.loop` feeds it what a deployment
shows and carries out what it decided; the rest shows an operator what goes on.
"""

from __future__ import annotations
