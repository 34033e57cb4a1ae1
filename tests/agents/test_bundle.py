"""A bundle decides exactly as the model it was exported from, and refuses to be anything else."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO

from rlgov.agents.baselines import PolicyContext, by_name
from rlgov.agents.bundle import (
    METADATA_KEY,
    Bundle,
    BundlePolicy,
    Layer,
    Manifest,
    ObservationStatistics,
    Origin,
    export_bundle,
    load_bundle,
    write_bundle,
)
from rlgov.envs.observation import FEATURES, HIGH, LOW
from rlgov.errors import BundleError, ConfigError
from rlgov.records import WINDOW_FIELDS, Limits, ServiceLevel

LIMITS = Limits(
    sm_clocks_mhz=(1980, 1830, 1680, 1530, 1380, 1230, 1080, 930, 780, 600),
    batch_caps=(256, 128, 64, 32, 16, 8),
    tp_degrees=(4, 2, 1),
    interval_s=1.0,
    service_level=ServiceLevel(ttft_s=1.0, tpot_s=0.075),
    allotted_gpus=4,
    tdp_w=700.0,
    kv_capacity_tokens=(400_000, 180_000, 60_000),
    switch_s=(5.0, 5.0, 5.0),
    max_num_batched_tokens=8192,
)
SIZES = LIMITS.axis_sizes
CHOICES = sum(SIZES)
ORIGIN = Origin("learned", "h100-qwen3-32b", "0" * 64, "1" * 64)


class _Shapes(gym.Env[NDArray[np.float32], NDArray[np.int64]]):
    """An environment of the right spaces; nobody steps it."""

    observation_space = gym.spaces.Box(LOW, HIGH, dtype=np.float32)
    action_space = gym.spaces.MultiDiscrete(np.array(SIZES))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed, options=options)
        return LOW.copy(), {}

    def action_masks(self) -> NDArray[np.bool_]:
        return np.ones(CHOICES, np.bool_)


def observations(count: int, seed: int = 0) -> NDArray[np.float32]:
    uniform = np.random.default_rng(seed).random((count, LOW.size))
    return np.clip(LOW + uniform * (HIGH - LOW), LOW, HIGH).astype(np.float32)


def masks(count: int, seed: int = 1) -> NDArray[np.bool_]:
    """Random masks with at least one choice an axis."""
    rng = np.random.default_rng(seed)
    mask = rng.random((count, CHOICES)) < 0.6
    first = np.cumsum((0, *SIZES[:-1]))
    for start, size in zip(first, SIZES, strict=True):
        mask[np.arange(count), start + rng.integers(0, size, count)] = True
    return mask


def model(*, masked: bool, activation: type[torch.nn.Module] = torch.nn.Tanh, seed: int = 0) -> Any:
    """A model whose actions vary: fresh action layers of SB3 are nearly constant."""
    torch.set_num_threads(1)
    kind = MaskablePPO if masked else PPO
    net = {"net_arch": {"pi": [64, 64], "vf": [32]}, "activation_fn": activation}
    made: Any = kind(
        "MlpPolicy", _Shapes(), policy_kwargs=net, seed=seed, device="cpu", n_steps=8, batch_size=8
    )
    with torch.no_grad():
        made.policy.action_net.weight.mul_(100.0)
        made.policy.action_net.bias.normal_(generator=torch.Generator().manual_seed(seed))
    return made


def export(path: Path, **changes: Any) -> Bundle:
    arguments = {"origin": ORIGIN, "limits": LIMITS, "observations": observations(300), **changes}
    return export_bundle(arguments.pop("model", None) or model(masked=True), path, **arguments)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bundle") / "policy.safetensors"
    export(file)
    return file


def policy_of(path: Path) -> BundlePolicy:
    policy = BundlePolicy(load_bundle(path))
    policy.start(LIMITS, 1)
    return policy


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("activation", [torch.nn.Tanh, torch.nn.ReLU])
def test_actions_equal_those_of_the_model(
    *, masked: bool, activation: type[torch.nn.Module], tmp_path: Path
) -> None:
    count = 5000
    seen, mask = observations(count, 2), masks(count)
    for seed in range(2):
        made = model(masked=masked, activation=activation, seed=seed)
        export(tmp_path / "policy.safetensors", model=made)
        policy = policy_of(tmp_path / "policy.safetensors")
        asked = policy.decide(seen, np.zeros((count, len(WINDOW_FIELDS))), mask)
        masking = {"action_masks": mask} if masked else {}
        expected, _ = made.predict(seen, deterministic=True, **masking)
        assert (asked == expected).all()
        assert min(len(np.unique(asked[:, axis])) for axis in range(3)) > 1  # the test would notice


def test_probability_is_the_model_s(path: Path) -> None:
    made = model(masked=True)
    seen, mask = observations(500, 3), masks(500, 4)
    index, probability = policy_of(path).act(seen, mask)
    with torch.no_grad():
        distribution = made.policy.get_distribution(torch.as_tensor(seen), action_masks=mask)
        expected = distribution.log_prob(torch.as_tensor(index)).exp().numpy()
    np.testing.assert_allclose(probability, expected, rtol=1e-4)


def test_one_decided_alone_equals_it_among_many(path: Path) -> None:
    policy, seen, mask = policy_of(path), observations(64, 5), masks(64, 6)
    rows = np.zeros((64, len(WINDOW_FIELDS)))
    together = policy.decide(seen, rows, mask)
    alone = [policy.decide(seen[i : i + 1], rows[i : i + 1], mask[i : i + 1])[0] for i in range(64)]
    assert (together == np.stack(alone)).all()


def constant(path: Path, logits: NDArray[np.float32]) -> BundlePolicy:
    """A policy that gives ``logits`` whatever it sees, but NaN for what is not finite."""
    statistics = ObservationStatistics.of(observations(10))
    manifest = export(path).manifest
    network = manifest.network.model_copy(update={"widths": (LOW.size, CHOICES)})
    layer = Layer(np.zeros((CHOICES, LOW.size), np.float32), logits)
    write_bundle(path, manifest.model_copy(update={"network": network}), (layer,), statistics)
    return policy_of(path)


def test_ties_go_to_the_fastest_allowed_and_no_choice_to_the_fastest(tmp_path: Path) -> None:
    policy = constant(tmp_path / "p", np.zeros(CHOICES, np.float32))
    mask = np.ones((3, CHOICES), np.bool_)
    mask[1, [0, 1, SIZES[0]]] = False
    mask[2] = False
    index, probability = policy.act(observations(3), mask)
    assert index.tolist() == [[0, 0, 0], [2, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(probability, [1 / np.prod(SIZES), 1 / (8 * 5 * 3), 0.0])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_garbage_observations_get_the_fastest(garbage: float, tmp_path: Path) -> None:
    rising = np.arange(CHOICES, dtype=np.float32)  # prefers the slowest
    policy = constant(tmp_path / "p", rising)
    seen = observations(2)
    seen[1, 3] = garbage
    index = policy.decide(seen, np.zeros((2, len(WINDOW_FIELDS))), np.ones((2, CHOICES), np.bool_))
    assert index.tolist() == [[size - 1 for size in SIZES], [0, 0, 0]]


def test_nan_logits_never_win(path: Path) -> None:
    policy = policy_of(path)
    weight, bias = policy._layers[-1]
    spoiled = bias.copy()
    spoiled[[1, SIZES[0] + 2]] = np.nan, np.inf
    policy._layers[-1] = (weight, spoiled)
    index, probability = policy.act(observations(2000, 8), np.ones((2000, CHOICES), np.bool_))
    assert not (index[:, 0] == 1).any()
    assert not (index[:, 1] == 2).any()
    assert np.isfinite(probability).all()


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    made = model(masked=True)
    with torch.no_grad():
        made.policy.action_net.bias[0] = float("nan")
    with pytest.raises(BundleError, match="finite"):
        export(tmp_path / "policy.safetensors", model=made)
    assert not list(tmp_path.iterdir())


def test_a_wrong_width_of_observation_is_refused(path: Path) -> None:
    with pytest.raises(BundleError, match=f"expected observations \\(n, {LOW.size}\\)"):
        policy_of(path).act(np.zeros((1, 3), np.float32), np.ones((1, CHOICES), np.bool_))


def test_equal_exports_are_equal_bytes(path: Path, tmp_path: Path) -> None:
    again = export(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert again.digest == load_bundle(path).digest
    other = export(tmp_path / "other", origin=replace(ORIGIN, training_digest="2" * 64))
    assert other.digest != again.digest


def test_what_is_loaded_is_what_was_exported(path: Path, tmp_path: Path) -> None:
    written, read = export(tmp_path / "p"), load_bundle(path)
    assert written.manifest == read.manifest
    assert read.manifest.samples == 300
    assert read.manifest.network.masked
    assert [f.name for f in read.manifest.features] == [f.name for f in FEATURES]
    for name in ("mean", "std", "low", "high", "covariance"):
        np.testing.assert_array_equal(getattr(written.statistics, name), getattr(read.statistics, name))
    assert policy_of(path).digest == read.digest


def test_a_bundle_holds_no_pickle_and_runs_without_torch(path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(path.read_bytes())  # noqa: S301 - that it cannot be is the point
    program = (
        "import sys, pathlib\n"
        "from rlgov.agents.bundle import BundlePolicy, load_bundle\n"
        "BundlePolicy(load_bundle(pathlib.Path(sys.argv[1])))\n"
        "print([m for m in ('torch', 'stable_baselines3', 'scipy', 'pandas') if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_noticed(data: st.DataObject, path: Path, tmp_path: Path) -> None:
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    # half of the draws go to the header, which is a small part of the file
    last = data.draw(st.sampled_from([header, len(content)])) - 1
    at = data.draw(st.integers(0, last))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    damaged = tmp_path / "damaged"
    damaged.write_bytes(bytes(content))
    with pytest.raises(BundleError):
        load_bundle(damaged)


@pytest.mark.parametrize("length", [0, 7, 8, 100, 5000])
def test_a_truncated_file_is_refused(length: int, path: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BundleError, match="not a policy bundle"):
        load_bundle(short)


def test_missing_and_huge_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(tmp_path / "absent")
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(65 * 1024 * 1024)
    with pytest.raises(BundleError, match="larger than"):
        load_bundle(huge)


def reseal(path: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A forged copy whose checksum is right but whose manifest says something else."""
    bundle = load_bundle(path)
    manifest = bundle.manifest.model_copy(update=changes)
    tensors = load(path.read_bytes())
    # written by hand: write_bundle would refuse
    from rlgov.agents.bundle import _digest

    sealed = manifest.model_copy(update={"sha256": _digest(manifest, tensors)})
    target.write_bytes(save(tensors, metadata={METADATA_KEY: sealed.canonical()}))
    return target


def test_another_schema_is_refused_even_with_a_good_checksum(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="bundle schema 2, this version reads 1"):
        load_bundle(reseal(path, tmp_path / "p", {"schema_version": 2}))


def test_a_network_that_does_not_fit_its_tensors_is_refused(path: Path, tmp_path: Path) -> None:
    network = load_bundle(path).manifest.network
    for widths, match in (
        ((LOW.size, 64, CHOICES), "not expected"),
        ((LOW.size, 64, 32, CHOICES), "must be finite float32 of shape"),
        ((3, 64, 64, CHOICES), "cannot map"),
    ):
        forged = reseal(path, tmp_path / "p", {"network": network.model_copy(update={"widths": widths})})
        with pytest.raises(BundleError, match=match):
            load_bundle(forged)


def test_unknown_manifest_fields_are_refused(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    text = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][METADATA_KEY]
    extended = json.dumps({**json.loads(text), "more": 1}, sort_keys=True, separators=(",", ":"))
    (tmp_path / "p").write_bytes(save(load(content), metadata={METADATA_KEY: extended}))
    with pytest.raises(BundleError, match="more"):
        load_bundle(tmp_path / "p")


def test_a_policy_refuses_another_observation_table(path: Path, tmp_path: Path) -> None:
    features = list(load_bundle(path).manifest.features)
    features[2] = features[2].model_copy(update={"high": 123.0})
    forged = reseal(path, tmp_path / "p", {"features": tuple(features)})
    with pytest.raises(BundleError, match=f"differing: {features[2].name}"):
        BundlePolicy(load_bundle(forged))
    forged = reseal(path, tmp_path / "p", {"observation_schema": 99})
    with pytest.raises(BundleError, match="observation schema 99"):
        BundlePolicy(load_bundle(forged))


@pytest.mark.parametrize(
    ("field", "value"), [("batch_caps", (256, 128, 64, 32, 16, 4)), ("interval_s", 2.0), ("allotted_gpus", 8)]
)
def test_a_policy_refuses_a_deployment_with_other_actions(field: str, value: Any, path: Path) -> None:
    with pytest.raises(BundleError, match=field):
        policy_of(path).start(replace(LIMITS, **{field: value}), 1)


def test_another_service_level_is_no_other_deployment(path: Path) -> None:
    policy_of(path).start(LIMITS.with_service_level(LIMITS.service_level.scaled(2.0)), 4)


def test_a_deployment_starts_at_the_largest_degree_or_at_the_one_asked_for(path: Path) -> None:
    bundle = load_bundle(path)
    assert policy_of(path).start_configuration(LIMITS) == LIMITS.fastest
    for tp in LIMITS.tp_degrees:
        start = BundlePolicy(bundle, start_tp=tp).start_configuration(LIMITS)
        assert start == replace(LIMITS.fastest, tp_degree=tp)
    with pytest.raises(ConfigError, match=r"3.*\(4, 2, 1\)"):
        BundlePolicy(bundle, start_tp=3).start_configuration(LIMITS)


def test_a_bundle_is_named_by_its_path_with_the_degree_to_start_at_behind_it(
    path: Path, tmp_path: Path
) -> None:
    context = PolicyContext(LIMITS)
    plain, small = by_name(str(path), context), by_name(f"{path}@1", context)
    assert plain.start_configuration(LIMITS) == LIMITS.fastest
    assert small.start_configuration(LIMITS) == replace(LIMITS.fastest, tp_degree=1)
    small.start(LIMITS, 1)
    rows = np.zeros((50, len(WINDOW_FIELDS)))
    for seen in (plain, small):  # where it starts is all that differs
        assert seen.name == ORIGIN.name
        assert seen.guarded
    decided = [seen.decide(observations(50), rows, masks(50)) for seen in (plain, small)]
    np.testing.assert_array_equal(decided[0], decided[1])

    odd = tmp_path / "policy@2"  # a file of that very name is meant before its degree is
    odd.write_bytes(path.read_bytes())
    assert by_name(str(odd), context).start_configuration(LIMITS) == LIMITS.fastest
    assert by_name(f"{odd}@2", context).start_configuration(LIMITS).tp_degree == 2


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("@3", r"\(4, 2, 1\)"),
        ("@", "no policy"),
        ("@two", "no policy"),
        ("@-1", "no policy"),
        ("x@2", "no policy"),
    ],
)
def test_a_degree_that_is_not_offered_and_a_malformed_name_are_refused(
    suffix: str, message: str, path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        by_name(f"{path}{suffix}", PolicyContext(LIMITS))


def test_distance_tells_training_range_from_elsewhere() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4000, 2))
    seen = np.stack((base[:, 0], base[:, 0] + 0.1 * base[:, 1], np.ones(4000)), axis=1).astype(np.float32)
    statistics = ObservationStatistics.of(seen)
    assert np.median(statistics.distance(seen)) < 2
    # inside the range of each feature, but not of their combination
    assert statistics.distance(np.array([[1.5, -1.5, 1.0]], np.float32))[0] > 10
    assert (statistics.low < statistics.mean)[:2].all()
    with pytest.raises(BundleError, match="m >= 2"):
        ObservationStatistics.of(seen[:1])


def test_other_networks_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="tanh or ReLU"):
        export(tmp_path / "p", model=model(masked=False, activation=torch.nn.ELU))


def test_limits_of_another_size_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot map"):
        export(tmp_path / "p", limits=replace(LIMITS, batch_caps=(256, 128)))


def test_manifest_text_is_canonical() -> None:
    manifest = Manifest.model_validate(json.loads(_example()))
    assert manifest.canonical() == _example()


def _example() -> str:
    return (
        '{"features":[],"name":"n","network":{"activation":"tanh","masked":true,"widths":[1,2]},'
        '"observation_schema":1,"offer":{"allotted_gpus":4,"batch_caps":[8],"interval_s":1.0,'
        '"sm_clocks_mhz":[1980],"tp_degrees":[4]},"profile_digest":"","profile_name":"p","samples":2,'
        '"schema_version":1,"sha256":"","training_digest":"","versions":{}}'
    )
