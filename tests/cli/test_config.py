from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from rlgov.commands.sections import sections
from rlgov.config import ReplaySettings, Settings, check_environment, explain, nearest, read_config_file
from rlgov.errors import ConfigError

SECTIONS = sections()


def _file(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_section_by_section(tmp_path: Path) -> None:
    path = _file(tmp_path, "train:\n  seed: 3\n  ppo: {gamma: 0.9}\nreplay:\n")
    assert read_config_file(path, SECTIONS) == {"train": {"seed": 3, "ppo": {"gamma": 0.9}}}


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert read_config_file(_file(tmp_path, "# nothing yet\n"), SECTIONS) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trian:\n  seed: 1\n", "unknown section 'trian'; did you mean 'train'?"),
        ("train:\n  sede: 1\n", "unknown name train.sede; did you mean 'seed'?"),
        ("train:\n  ppo:\n    gama: 0.9\n", "unknown name train.ppo.gama; did you mean 'gamma'?"),
        ("train:\n  guard:\n    tp_dwel_s: 9\n", "did you mean 'tp_dwell_s'?"),
        ("train:\n  ppo: 3\n", "train.ppo must map names to values"),
        ("train: 3\n", "'train' must map names to values"),
        ("- train\n", "must map sections to settings"),
        ("train:\n  seed: [1\n", ":3: not valid YAML"),
        ("train:\n  a: 1\n\tb: 2\n", ":3: not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place_and_a_remedy(tmp_path: Path, text: str, said: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_config_file(path, SECTIONS)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)


def test_a_missing_file_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config_file(tmp_path / "none.yaml", SECTIONS)
    (tmp_path / "junk.yaml").write_bytes(b"\xff\xfe\x00junk")
    with pytest.raises(ConfigError, match="not a text file"):
        read_config_file(tmp_path / "junk.yaml", SECTIONS)


def test_a_variable_that_sets_nothing_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="RLGOV_TRAIN_SEDE names no setting; did you mean 'RLGOV_TRAIN_SEED'"
    ):
        check_environment({"RLGOV_TRAIN_SEDE": "1"}, SECTIONS)


def test_known_and_foreign_variables_are_taken() -> None:
    foreign = {"RLGOV_PORT_8080_TCP": "x", "RLGOV_CONFIG": "x", "HOME": "x"}
    check_environment({**foreign, "RLGOV_TRAIN_PPO_GAMMA": "0.9", "RLGOV_REPLAY_RATE_SCALE": "2"}, SECTIONS)


def test_errors_are_told_in_one_line() -> None:
    with pytest.raises(ValidationError) as caught:
        ReplaySettings.model_validate({"seeds": 0, "rate_scale": "fast"})
    told = explain(caught.value)
    assert "\n" not in told
    assert "rate_scale: " in told
    assert "not 'fast'" in told
    assert "seeds: " in told


def test_a_reversed_slice_is_refused() -> None:
    with pytest.raises(ValidationError, match="give a later end"):
        ReplaySettings(from_s=10.0, to_s=5.0)


def _models(model: type[BaseModel]) -> list[type[BaseModel]]:
    below = [field.annotation for field in model.model_fields.values()]
    nested = [kind for kind in below if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [model, *(deeper for kind in nested for deeper in _models(kind))]


@pytest.mark.parametrize("model", [model for top in SECTIONS.values() for model in _models(top)])
def test_every_setting_is_described_closed_and_immutable(model: type[BaseModel]) -> None:
    undescribed = [name for name, field in model.model_fields.items() if not field.description]
    assert undescribed == []
    assert model.model_config.get("extra") == "forbid"
    assert model.model_config.get("frozen") is True


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5))
def test_a_hint_names_something_known(name: str, known: list[str]) -> None:
    hint = nearest(name, known)
    assert any(word in hint or repr(word) in hint for word in known)


def test_settings_refuse_unknown_names() -> None:
    class Some(Settings):
        """For this test."""

        a: int = 1

    values: dict[str, Any] = {"b": 2}
    with pytest.raises(ValidationError, match="b"):
        Some.model_validate(values)
