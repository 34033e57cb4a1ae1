"""The shipped profiles: made by the code in the repository from published tables, fit to simulate with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlgov.calibration import shipped
from rlgov.errors import CalibrationError
from rlgov.simulation.profile import Profile, load_profile, profile_names


@pytest.fixture(scope="module")
def fresh(shared_dir: Path) -> dict[str, Profile]:
    return {profile.name: profile for profile in shipped.shipped_profiles(shared_dir / "data")}


def test_every_shipped_profile_comes_from_the_data(fresh: dict[str, Profile]) -> None:
    assert set(fresh) == set(profile_names())
    assert shipped.check(fresh) == []


def test_the_check_finds_a_number_that_does_not(fresh: dict[str, Profile]) -> None:
    profile = fresh["h200-llama-3.1-8b"]
    gpu = profile.gpu.model_copy(update={"tdp_w": profile.gpu.tdp_w * 1.01})
    (found,) = shipped.check({profile.name: profile.model_copy(update={"gpu": gpu})})
    assert "h200-llama-3.1-8b.gpu.tdp_w" in found


def test_the_command_writes_every_profile(
    shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped.main(data=shared_dir / "data", out=tmp_path)
    assert {path.stem for path in tmp_path.glob("*.yaml")} == set(profile_names())
    assert len(capsys.readouterr().out.splitlines()) == len(profile_names())
    for path in tmp_path.glob("*.yaml"):
        assert load_profile(path).name == path.stem


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=str(tmp_path)):
        list(shipped.shipped_profiles(tmp_path))


def test_a_card_without_published_rows_is_refused() -> None:
    with pytest.raises(CalibrationError, match="characterise this card"):
        shipped.setup_of("L40S")


def test_differences_name_the_place() -> None:
    a = yaml.safe_load("{x: [1.0, 2.0], error: one, y: {z: 3.0}}")
    assert shipped.differences(a, a) == []
    b = yaml.safe_load("{x: [1.0, 2.1], error: two, y: {z: 3.001}}")
    assert shipped.differences(a, b) == ["profile.x[1]: 2, shipped 2.1"]
    assert shipped.differences(a, {"x": 1}) == ["profile: fields ['error', 'y']"]
