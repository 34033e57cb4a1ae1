"""Naming policies: every name, every file, and every way to get one wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlgov.agents.baselines import FAMILIES, NAMES, TUNED_RULES, PolicyContext, by_name
from rlgov.agents.baselines.static import every_static, parse_static, static_name
from rlgov.agents.baselines.tuned import TunedRecord, read_tuned, write_tuned
from rlgov.errors import BundleError, ConfigError
from rlgov.records import WINDOW_FIELDS, Configuration
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile

PROFILE = load_profile("h100-qwen3-32b")
LIMITS = PROFILE.limits()
CONTEXT = PolicyContext(LIMITS, build_tables(PROFILE), best_static=LIMITS.configuration((3, 1, 1)), seed=5)


@pytest.mark.parametrize("name", [*NAMES, f"static:{LIMITS.sm_clocks_mhz[2]}/{LIMITS.batch_caps[1]}/2"])
def test_every_name_builds_a_policy_that_decides_for_many(name: str) -> None:
    policy = by_name(name, CONTEXT)
    assert policy.name == name
    assert LIMITS.index(policy.start_configuration(LIMITS)) is not None
    policy.start(LIMITS, 7)
    rows = np.zeros((7, len(WINDOW_FIELDS)))
    rows[:, WINDOW_FIELDS.index("duration_s")] = 1.0
    asked = policy.decide(np.zeros((7, 3), np.float32), rows, np.ones((7, sum(LIMITS.axis_sizes)), np.bool_))
    assert asked.shape == (7, 3)
    assert asked.dtype == np.int64
    assert ((asked >= 0) & (asked < LIMITS.axis_sizes)).all()


def test_published_rules_and_statics_run_without_the_guard() -> None:
    assert not any(by_name(name, CONTEXT).guarded for name in ("fastest", "best-static", *TUNED_RULES))
    assert by_name("random", CONTEXT).guarded


@pytest.mark.parametrize(
    ("name", "nearest"), [("fastes", "fastest"), ("ecofrq", "ecofreq"), ("two_level", "two-level")]
)
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {nearest}"):
        by_name(name, CONTEXT)


@pytest.mark.parametrize("name", ["static:1980", "static:a/b/c", "static:1980/256/4/1", "static:1980/256/3"])
def test_a_static_setting_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        by_name(name, CONTEXT)


def test_static_names_are_parsed_back() -> None:
    configuration = Configuration(1380, 64, 2)
    assert parse_static(static_name(configuration)) == configuration


def test_every_static_covers_the_grid_once_and_begins_with_the_fastest() -> None:
    settings = [policy.start_configuration(LIMITS) for policy in every_static(LIMITS)]
    assert len(set(settings)) == len(settings) == np.prod(LIMITS.axis_sizes)
    assert settings[0] == LIMITS.fastest


def test_best_static_and_ecofreq_say_what_they_lack() -> None:
    bare = PolicyContext(LIMITS)
    with pytest.raises(ConfigError, match="every static setting"):
        by_name("best-static", bare)
    with pytest.raises(ConfigError, match="physics tables"):
        by_name("ecofreq", bare)


@pytest.mark.parametrize("family", TUNED_RULES)
def test_a_tuned_baseline_survives_its_file(family: str, tmp_path: Path) -> None:
    parameters = {**FAMILIES[family].defaults(LIMITS), "batch_cap": LIMITS.batch_caps[1]}
    record = TunedRecord(family=family, parameters=parameters, profile="p", energy_j=1.5, slo_attainment=0.99)
    path = tmp_path / "tuned.json"
    write_tuned(record, path)
    assert read_tuned(path) == record
    policy = by_name(str(path), CONTEXT)
    assert policy.name == family
    assert policy.start_configuration(LIMITS).batch_cap == LIMITS.batch_caps[1]


@pytest.mark.parametrize(
    "change", [{"family": "no-such"}, {"parameters": {"no_such": 1}}, {"schema_version": 99}, {"more": 1}]
)
def test_a_tuned_file_that_does_not_fit_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"family": "two-level", "parameters": {}, **change}), encoding="utf-8")
    with pytest.raises(ConfigError):
        by_name(str(path), CONTEXT)


def test_another_file_is_taken_for_a_bundle(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    path.write_bytes(b"not a bundle at all")
    with pytest.raises(BundleError, match="not a policy bundle"):
        by_name(str(path), CONTEXT)
