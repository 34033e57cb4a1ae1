"""What a governing process carries."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "gymnasium", "pandas", "numba", "scipy", "matplotlib", "stable_baselines3", "tensorboard")


def loaded_by(code: str) -> set[str]:
    asked = f"import sys\n{code}\nprint(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", asked], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.split())


def test_governing_loads_nothing_heavy() -> None:
    modules = (
        "rlgov.commands.govern",
        "rlgov.governor.core",
        "rlgov.governor.loop",
        "rlgov.governor.opening",
        "rlgov.governor.surface",
        "rlgov.agents.bundle",
        "rlgov.agents.fallback",
        "rlgov.envs.guard",
        "rlgov.envs.observation",
        "rlgov.hardware.keeper.client",
    )
    assert loaded_by("\n".join(f"import {module}" for module in modules)) == set()


def test_deciding_loads_nothing_heavy() -> None:
    code = """
from rlgov.agents.baselines import PolicyContext, by_name
from rlgov.governor.core import Core
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
profile = load_profile("h100-qwen3-32b")
tables = build_tables(profile)
Core(profile.limits(), by_name("ecofreq", PolicyContext(profile.limits(), tables)))
"""
    assert loaded_by(code) == set()
