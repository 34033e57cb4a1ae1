"""A profile for the tiny model: its axes and SLO are what matters, its physics is invented."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlgov.simulation.profile import Profile, load_profile

if TYPE_CHECKING:
    from pathlib import Path

BATCH_CAPS = (32, 16, 4, 1)
TP_DEGREES = (2, 1)
SM_CLOCKS_MHZ = (1980, 1680, 1380, 1080)  # of the stand-in for the NVIDIA driver


def write_tiny_profile(path: Path) -> Path:
    """Write it. The GPU's figures are an H100's; a policy trained on them knows nothing of this machine."""
    raw = load_profile("h100-qwen3-8b").model_dump(mode="json")
    raw |= {
        "name": "tiny",
        "description": "the tiny model of the integration tests, on GPUs that are not there",
        "decode_rows": [],
        "all_reduce": [{"tp_degree": 2, "bytes_per_s": 292e9, "source": "invented"}],
        "standby": "cold",
    }
    raw["model"] |= {
        "name": "tiny",
        "layers": 2,
        "hidden": 128,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 32,
        "parameters": 400_000.0,
        "lookup_parameters": 40_960.0,
    }
    raw["deployment"] |= {
        "allotted_gpus": 2,
        "tp_degrees": TP_DEGREES,
        "sm_clocks_mhz": SM_CLOCKS_MHZ,
        "batch_caps": BATCH_CAPS,
    }
    # What two cores can hold: they also start engines meanwhile.
    raw["deployment"]["service_level"] |= {"ttft_s": 4.0, "tpot_s": 0.5}
    path.write_text(Profile.model_validate(raw).to_yaml(), encoding="utf-8")
    return path
