"""Which policies, profiles and deployments belong together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlgov.governor.fitting import mismatches, same_card, same_model
from rlgov.governor.settings import GovernSettings
from rlgov.hardware.gpus import Gpu
from rlgov.simulation.profile import load_profile

PROFILE = load_profile("h100-qwen3-32b")
GPU = Gpu(
    uuid="GPU-a", name="NVIDIA H100 80GB HBM3", architecture="Hopper", driver_version="580", memory_bytes=1,
    power_limit_w=700.0, tdp_w=700.0, memory_clock_mhz=2619, sm_clocks_mhz=(1980,), mig=False,
    virtualization="none", persistence=True, compute_mode="default", energy_counter=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("profile", "driver", "same"),
    [
        ("H100 SXM 80GB", "NVIDIA H100 80GB HBM3", True),
        ("H100 SXM 80GB", "NVIDIA H200", False),
        ("A100 SXM 80GB", "NVIDIA A100-SXM4-80GB", True),
        ("B200", "NVIDIA B200", True),
        ("RTX 4090", "NVIDIA GeForce RTX 4090", True),
        ("RTX 4090", "NVIDIA GeForce RTX 3090", False),
        ("L40S", "NVIDIA L40", False),
        ("Stub", "NVIDIA Stub 80GB", True),
    ],
)
def test_cards_are_told_apart_by_what_names_them(profile: str, driver: str, *, same: bool) -> None:
    assert same_card(profile, driver) is same


def test_a_folder_of_the_model_counts_as_the_model() -> None:
    assert same_model("Qwen/Qwen3-32B", "/models/qwen3-32b/")
    assert not same_model("Qwen/Qwen3-32B", "Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    ("changes", "model", "said"),
    [
        ({}, "Qwen/Qwen3-32B", ""),
        ({}, "", ""),
        ({"name": "NVIDIA H200"}, "", "the GPUs are NVIDIA H200"),
        ({"tdp_w": 350.0}, "", "the GPUs have 350 W"),
        ({}, "meta-llama/Llama-3.1-8B", "serves meta-llama/Llama-3.1-8B"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, Any], model: str, said: str) -> None:
    told = mismatches(PROFILE, PROFILE.limits(), bundle=None, gpus=(replace(GPU, **changes),), model=model)
    assert (said in "; ".join(told)) if said else told == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"control": Path("a"), "attach": "http://127.0.0.1:8000"},
        {"attach": "127.0.0.1:8000"},
        {"tp": 2},
        {"token_env": "TOKEN"},
        {"interval_s": 60.0},
        {"gpus": ()},
        {"mode": "reckless"},
        {"force": True},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GovernSettings(**wrong)
