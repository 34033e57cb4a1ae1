"""Deployments whose true parameters are known, and their characterisations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlgov.characterize.benches import open_bench
from rlgov.characterize.campaign import run_campaign
from rlgov.characterize.workloads import length_class
from rlgov.clock import SystemClock
from rlgov.config import CharacterizeSettings
from rlgov.simulation.cards import find_card
from rlgov.simulation.create import Offer, create_profile
from rlgov.simulation.model import Experts, Model
from rlgov.simulation.physics import draw_parameters
from rlgov.simulation.profile import Parameters, Profile, load_profile

MIXTURE = Model(
    name="Qwen/Qwen3-30B-A3B",
    layers=48,
    hidden=2048,
    heads=32,
    kv_heads=4,
    head_dim=128,
    parameters=30.53e9,
    lookup_parameters=151936 * 2048.0,
    bytes_per_weight=2.0,
    bytes_per_kv_value=2.0,
    source="config.json of the model on Hugging Face",
    experts=Experts(count=128, per_token=8, parameters=48 * 128 * 3 * 2048 * 768.0, bytes_per_weight=2.0),
)

Campaign = Callable[..., Path]
Perturb = Callable[[Profile, int], Profile]


@pytest.fixture(scope="session")
def dense() -> Profile:
    """A dense model on an H100, by physics alone: nothing of it was measured."""
    model = load_profile("h100-qwen3-32b").model
    return create_profile(find_card("h100"), model, Offer(tp_degrees=(4, 2, 1)))


@pytest.fixture(scope="session")
def mixture() -> Profile:
    """A mixture of experts on another card, by physics alone."""
    return create_profile(find_card("b200"), MIXTURE, Offer(tp_degrees=(4, 2, 1)))


@pytest.fixture(scope="session")
def perturbed() -> Perturb:
    """Draws a truth: every parameter anywhere in its range."""

    def draw(base: Profile, seed: int) -> Profile:
        values = draw_parameters(base, np.random.default_rng(seed)).values
        known = {
            n: p.model_copy(update={"value": values.get(n, p.value)}) for n, p in base.parameters.items()
        }
        return base.model_copy(update={"parameters": Parameters.model_validate(known)})

    return draw


@pytest.fixture(scope="session")
def characterised(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Runs a small campaign on a simulated profile, as `rlgov characterize` does; returns its folder."""

    def run(profile: Profile, **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("run")
        path = folder / "truth.yaml"
        path.write_text(profile.to_yaml(), encoding="utf-8")
        clocks = profile.deployment.sm_clocks_mhz
        known: dict[str, Any] = {
            "clocks": tuple(clocks[i] for i in (0, 3, 6, 9)),
            "caps": (128, 32, 8),
            "tp": (4, 2),
            "classes": ("short-in/short-out", "long-in/short-out", "short-in/long-out"),
            "warm_up_s": 5,
            "measure_s": 15,
            "iterations": True,
        }
        chosen = CharacterizeSettings(out=folder / "run", profile=str(path), **(known | settings))
        lengths = [length_class(name) for name in chosen.classes]
        bench = open_bench(chosen, {each.name: each for each in lengths}, SystemClock())
        try:
            run_campaign(chosen, bench, lengths, SystemClock())
        finally:
            bench.close()
        return folder / "run"

    return run
