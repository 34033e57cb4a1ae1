"""The decision problem: observation, action, guard, reward and the Gymnasium environments over them.

Importing this package registers ``rlgov/SimulatedServing-v0``, ``rlgov/ReplayedServing-v0`` and
``rlgov/LiveServing-v0`` where Gymnasium is installed. The decision code itself (observation, action, guard,
reward) needs only numpy.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("gymnasium") is not None:
    from rlgov.envs.registration import register

    register()
