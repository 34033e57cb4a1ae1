"""Gymnasium learns the ids whichever is imported first, and the decision code loads none of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

KNOWN = "'rlgov/SimulatedServing-v0' in gymnasium.registry and 'rlgov/LiveServing-v0' in gymnasium.registry"


def fresh(code: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import gymnasium, rlgov.envs",
        "import rlgov.envs, gymnasium",
        "import rlgov.envs.registration, gymnasium",
        "import rlgov.envs.guard; from gymnasium import spaces; import gymnasium",
        "import rlgov.envs.serving_env, gymnasium",
    ],
)
def test_ids_are_known(imports: str) -> None:
    assert fresh(f"{imports}\nprint({KNOWN})") == "True"


def test_an_environment_is_made_by_its_module_and_id() -> None:
    code = "import gymnasium; print(type(gymnasium.make('rlgov.envs:rlgov/SimulatedServing-v0').unwrapped))"
    assert "ServingEnv" in fresh(code)


def test_gymnasium_is_as_it_would_be_without_us() -> None:
    code = (
        "import rlgov.envs, gymnasium, inspect, sys\n"
        "print(type(gymnasium.__loader__).__module__, bool(inspect.getsource(gymnasium)), "
        "any('Gymnasium' in type(f).__name__ for f in sys.meta_path))"
    )
    assert fresh(code).endswith("True False")


def test_the_decision_code_loads_no_gymnasium() -> None:
    code = "import rlgov.envs.guard, rlgov.envs.observation, sys; print('gymnasium' in sys.modules)"
    assert fresh(code) == "False"
