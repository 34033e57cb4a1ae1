"""Profiles: what they hold, and what is said when they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlgov.errors import ProfileError
from rlgov.simulation.profile import KV_BLOCK_TOKENS, Profile, load_profile, parse_profile, profile_names

DEFAULT = "h100-qwen3-32b"


@pytest.fixture(params=profile_names())
def profile(request: pytest.FixtureRequest) -> Profile:
    return load_profile(str(request.param))


def _edited(**changes: object) -> str:
    raw = load_profile(DEFAULT).model_dump(mode="json")
    for path, value in changes.items():
        *parents, last = path.split("__")
        part = raw
        for name in parents:
            part = part[name]
        part[last] = value
    return yaml.safe_dump(raw)


def test_the_default_profiles_are_shipped() -> None:
    assert {DEFAULT, "h100-qwen3-8b"} <= set(profile_names())


def test_a_profile_survives_the_round_trip_through_yaml(profile: Profile) -> None:
    assert parse_profile(profile.to_yaml(), origin="test") == profile


def test_a_profile_loads_from_a_path(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(profile.to_yaml(), encoding="utf-8")
    assert load_profile(path) == profile


def test_every_parameter_names_its_source_and_holds_its_range(profile: Profile) -> None:
    for name, parameter in profile.parameters.items():
        assert parameter.source, name
        assert parameter.low <= parameter.value <= parameter.high, name
        if parameter.kind == "fitted":
            assert parameter.error is not None, f"{name} is fitted and states no error"


def test_limits_put_the_fastest_setting_first() -> None:
    limits = load_profile(DEFAULT).limits()
    assert limits.fastest.sm_clock_mhz == 1980
    assert limits.fastest.batch_cap == 256
    assert limits.tp_degrees == (4, 2, 1)
    assert limits.allotted_gpus == 4
    assert (limits.service_level.ttft_s, limits.service_level.tpot_s) == (1.0, 0.075)


def test_clocks_lie_on_the_supported_grid(profile: Profile) -> None:
    grid = profile.gpu.grid_clocks_mhz
    gpu = profile.gpu
    assert (grid[0], grid[-1], grid[1] - grid[0]) == (
        gpu.sm_clock_min_mhz, gpu.sm_clock_max_mhz, gpu.sm_clock_step_mhz,
    )  # fmt: skip
    assert set(profile.limits().sm_clocks_mhz) <= set(grid)


def test_kv_capacity_grows_faster_than_tp() -> None:
    profile = load_profile(DEFAULT)
    four, two, one = profile.limits().kv_capacity_tokens
    assert two > 2 * one
    assert four > 2 * two
    assert one % KV_BLOCK_TOKENS == 0


def test_a_cold_standby_takes_longer_to_switch() -> None:
    asleep = load_profile(DEFAULT)
    cold = parse_profile(_edited(standby="cold"), origin="test")
    assert min(cold.limits().switch_s) > max(asleep.limits().switch_s)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"voltage": 1.0}, "unknown field voltage"),
        ({"gpu__tdp_watts": 700}, "unknown field gpu.tdp_watts"),
        ({"gpu__tdp_w": -1}, "gpu.tdp_w"),
        ({"gpu__tdp_w": "much"}, "gpu.tdp_w"),
        ({"gpu__tdp_w": float("inf")}, "gpu.tdp_w"),
        ({"deployment__sm_clocks_mhz": [1980, 1000]}, "1000"),
        ({"deployment__batch_caps": [8, 16]}, "batch_caps"),
        ({"deployment__allotted_gpus": 2}, "allotted"),
        ({"model__parameters": 1e12}, "do not fit"),
        ({"all_reduce": []}, "all_reduce"),
        ({"schema_version": 2}, "schema_version"),
        ({"parameters__prefill_mfu__value": 0.9}, "outside its range"),
    ],
)
def test_a_wrong_profile_is_refused_by_file_and_field(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ProfileError, match=r"mine\.yaml") as caught:
        parse_profile(_edited(**changes), origin="mine.yaml")
    assert named in str(caught.value)


def test_a_missing_field_is_named() -> None:
    raw = load_profile(DEFAULT).model_dump(mode="json")
    del raw["parameters"]["wake_s"]
    with pytest.raises(ProfileError, match=r"missing field parameters\.wake_s"):
        parse_profile(yaml.safe_dump(raw), origin="mine.yaml")


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "", "a: [1\n"])
def test_text_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(ProfileError, match=r"mine\.yaml"):
        parse_profile(text, origin="mine.yaml")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ProfileError, match=DEFAULT):
        load_profile("h100-qwen3-33b")


def test_an_absent_file_is_a_profile_error(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"absent\.yaml"):
        load_profile(tmp_path / "absent.yaml")
