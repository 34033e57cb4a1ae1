"""A trained policy in one file without pickle, and the policy that runs it in numpy.

A bundle is a safetensors file: the policy network and what observations looked like in training as
tensors, and one metadata entry ``rlgov`` with everything else as canonical JSON (the manifest). A
sha256 in the manifest covers the rest of the manifest and every tensor. There is one metadata entry
because the order of several is not fixed in the format, and equal bundles shall be equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlgov.envs.observation import FEATURES, OBSERVATION_SCHEMA
from rlgov.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from stable_baselines3 import PPO

    from rlgov.records import Configuration, Limits

SCHEMA_VERSION: Final = 1
METADATA_KEY: Final = "rlgov"
MAX_BYTES: Final = 64 * 1024 * 1024  # a policy has some ten thousand weights; more is something else
LOW_QUANTILE, HIGH_QUANTILE = 0.001, 0.999
# Added to the variances before inverting: features that never moved in training (a single TP degree,
# say) would otherwise put every other observation infinitely far away.
RIDGE: Final = 1e-3
_PACKAGES = ("rlgov", "numpy", "torch", "stable-baselines3", "sb3-contrib", "gymnasium")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FeatureRange(_Record):
    """Name and bounds of one observation column."""

    name: str
    low: float
    high: float


class Offer(_Record):
    """The action table: what the policy's outputs stand for, fastest first."""

    sm_clocks_mhz: tuple[int, ...] = Field(min_length=1)
    batch_caps: tuple[int, ...] = Field(min_length=1)
    tp_degrees: tuple[int, ...] = Field(min_length=1)
    interval_s: float
    allotted_gpus: int

    @classmethod
    def of(cls, limits: Limits) -> Offer:
        """The part of limits that a policy depends on."""
        return cls(
            sm_clocks_mhz=limits.sm_clocks_mhz,
            batch_caps=limits.batch_caps,
            tp_degrees=limits.tp_degrees,
            interval_s=limits.interval_s,
            allotted_gpus=limits.allotted_gpus,
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of clocks, batch caps and TP degrees."""
        return len(self.sm_clocks_mhz), len(self.batch_caps), len(self.tp_degrees)


class NetworkLayout(_Record):
    """Fully connected layers of ``widths``; the last one gives the logits of all axes side by side."""

    widths: tuple[int, ...] = Field(min_length=2)
    activation: Literal["tanh", "relu"]
    masked: bool  # trained with action masks; without, masks are left to the guard


class Manifest(_Record):
    """Everything about a bundle but its tensors."""

    schema_version: int
    name: str
    observation_schema: int
    features: tuple[FeatureRange, ...]
    offer: Offer
    network: NetworkLayout
    profile_name: str
    profile_digest: str
    training_digest: str  # of the training configuration
    samples: int  # observations behind the statistics
    versions: dict[str, str]
    sha256: str = ""  # of the manifest without this field and of all tensors

    def canonical(self) -> str:
        """One text for equal manifests."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False
        )


class FeatureLike(Protocol):
    """What is read of an observation column."""

    @property
    def name(self) -> str: ...  # noqa: D102 - see the class
    @property
    def low(self) -> float: ...  # noqa: D102 - see the class
    @property
    def high(self) -> float: ...  # noqa: D102 - see the class


@dataclass(frozen=True, slots=True, eq=False)
class ObservationStatistics:
    """What observations looked like in training, so that service can tell when it is elsewhere."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    low: NDArray[np.float64]  # 0.1 % quantile
    high: NDArray[np.float64]  # 99.9 % quantile
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, observations: NDArray[np.float32]) -> ObservationStatistics:
        """Statistics of observations (m, features), m at least 2."""
        if observations.ndim != 2 or observations.shape[0] < 2:  # noqa: PLR2004 - a variance needs two
            msg = f"statistics need observations (m >= 2, features), got shape {observations.shape}"
            raise BundleError(msg)
        values = observations.astype(np.float64)
        low, high = np.quantile(values, (LOW_QUANTILE, HIGH_QUANTILE), axis=0)
        covariance = np.atleast_2d(np.cov(values, rowvar=False))
        return cls(values.mean(axis=0), values.std(axis=0), low, high, covariance)

    def distance(self, observations: NDArray[np.float32]) -> NDArray[np.float64]:
        """Mahalanobis distance of each row to the training observations, in standard deviations."""
        centred = observations.astype(np.float64) - self.mean
        ridged = self.covariance + RIDGE * np.eye(self.mean.size)
        squared = (centred * np.linalg.solve(ridged, centred.T).T).sum(axis=1)
        distance: NDArray[np.float64] = np.sqrt(np.maximum(squared, 0.0))
        return distance


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One fully connected layer: ``weight`` (out, in), ``bias`` (out,)."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A policy with everything needed to run it and to know whether it may be run."""

    manifest: Manifest
    layers: tuple[Layer, ...]
    statistics: ObservationStatistics

    @property
    def digest(self) -> str:
        """What identifies the policy in decisions and reports."""
        return self.manifest.sha256

    def check_observation(self, features: Sequence[FeatureLike], schema: int) -> None:
        """Raises BundleError unless the policy was trained on exactly this observation table."""
        here = tuple(FeatureRange(name=f.name, low=f.low, high=f.high) for f in features)
        if self.manifest.observation_schema != schema or self.manifest.features != here:
            different = sorted(
                {f.name for f in here} ^ {f.name for f in self.manifest.features}
                or {a.name for a, b in zip(here, self.manifest.features, strict=True) if a != b}
            )
            detail = f" (differing: {', '.join(different)})" if different else ""
            msg = (
                f"bundle {self.manifest.name} was trained on observation schema "
                f"{self.manifest.observation_schema}, this version has {schema}{detail}; train it again"
            )
            raise BundleError(msg)

    def check_limits(self, limits: Limits) -> None:
        """Raises BundleError unless a deployment offers exactly the actions the policy was trained on."""
        here = Offer.of(limits).model_dump()
        trained = self.manifest.offer.model_dump()
        for field, value in trained.items():
            if here[field] != value:
                msg = (
                    f"bundle {self.manifest.name} was trained for {field} {value}, the deployment has "
                    f"{here[field]}; use profile {self.manifest.profile_name} or train for this one"
                )
                raise BundleError(msg)


def software_versions() -> dict[str, str]:
    """Versions of what shapes a training run; a package that is not installed is left out."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a policy comes from."""

    name: str
    profile_name: str
    profile_digest: str
    training_digest: str


def export_bundle(
    model: PPO | Any,  # noqa: ANN401 - sb3-contrib has no types
    path: Path,
    *,
    origin: Origin,
    limits: Limits,
    observations: NDArray[np.float32],
    features: Sequence[FeatureLike] = FEATURES,
    versions: Mapping[str, str] | None = None,
) -> Bundle:
    """Write the policy of a Stable-Baselines3 PPO or sb3-contrib MaskablePPO as a bundle.

    Args:
        model: a model with MlpPolicy, tanh or ReLU, and a MultiDiscrete action space.
        path: the file; written whole or not at all.
        origin: name of the policy, and what it was trained on.
        limits: of the deployment it was trained on.
        observations: (m, features) seen in training.
        features: the observation table.
        versions: of the software; by default what is installed.
    """
    layers, activation = _policy_layers(model.policy)
    # sb3-contrib's maskable distributions are told apart by what they can do, so it need not be installed
    masked = hasattr(model.policy.action_dist, "apply_masking")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=origin.name,
        observation_schema=OBSERVATION_SCHEMA,
        features=tuple(FeatureRange(name=f.name, low=f.low, high=f.high) for f in features),
        offer=Offer.of(limits),
        network=NetworkLayout(
            widths=(layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in layers)),
            activation=activation,
            masked=masked,
        ),
        profile_name=origin.profile_name,
        profile_digest=origin.profile_digest,
        training_digest=origin.training_digest,
        samples=observations.shape[0],
        versions=dict(software_versions() if versions is None else versions),
    )
    return write_bundle(path, manifest, layers, ObservationStatistics.of(observations))


def write_bundle(
    path: Path, manifest: Manifest, layers: tuple[Layer, ...], statistics: ObservationStatistics
) -> Bundle:
    """Seal and write a bundle from its parts; equal parts give equal bytes."""
    tensors: dict[str, NDArray[Any]] = {
        f"statistics.{name}": np.ascontiguousarray(getattr(statistics, name))
        for name in ObservationStatistics.__dataclass_fields__
    }
    for i, layer in enumerate(layers):
        tensors[f"policy.{i}.weight"] = np.ascontiguousarray(layer.weight, dtype=np.float32)
        tensors[f"policy.{i}.bias"] = np.ascontiguousarray(layer.bias, dtype=np.float32)
    sealed = manifest.model_copy(update={"sha256": _digest(manifest, tensors)})
    bundle = _assemble(sealed, tensors, str(path))  # refuses to write what could not be read
    data = safetensors.numpy.save(tensors, metadata={METADATA_KEY: sealed.canonical()})
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(data)
    partial.replace(path)
    return bundle


def load_bundle(path: Path | str) -> Bundle:
    """Read and check a bundle. Raises BundleError when anything about it is not as it was written."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            msg = f"{path}: larger than {MAX_BYTES} bytes, so it is no policy bundle; give another file"
            raise BundleError(msg)
        data = path.read_bytes()
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); give the path of a policy bundle"
        raise BundleError(msg) from error
    try:
        tensors = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = header["__metadata__"][METADATA_KEY]
        raw = json.loads(text)
        found = raw["schema_version"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        msg = f"{path}: not a policy bundle, or a damaged one ({error}); export or copy it again"
        raise BundleError(msg) from error
    if found != SCHEMA_VERSION:
        msg = f"{path}: bundle schema {found!r}, this version reads {SCHEMA_VERSION}; export it again"
        raise BundleError(msg)
    try:
        manifest = Manifest.model_validate(raw)
        canonical = manifest.canonical()
    except (ValidationError, ValueError) as error:
        msg = f"{path}: damaged manifest ({error}); export or copy it again"
        raise BundleError(msg) from error
    if canonical != text or _digest(manifest, tensors) != manifest.sha256:
        msg = f"{path}: does not match its sha256, so it was changed or damaged; export or copy it again"
        raise BundleError(msg)
    return _assemble(manifest, tensors, str(path))


class BundlePolicy:
    """Runs a bundle in numpy: the most probable allowed index per axis, the fastest one on ties.

    The weights are float32, the arithmetic float64: matrix products differ in their last bits between
    machines, and in float64 that is too little to tip a decision, so replays agree everywhere.
    """

    guarded = True

    def __init__(self, bundle: Bundle, name: str | None = None, *, start_tp: int | None = None) -> None:
        """Make a policy of a bundle.

        Args:
            bundle: What to run.
            name: Another name for it.
            start_tp: TP degree that the deployment is started with; the largest by default. A switch
                of TP costs held requests, so an operator starts where the usual load will be.

        Raises:
            BundleError: The bundle was trained on another observation table.
        """
        bundle.check_observation(FEATURES, OBSERVATION_SCHEMA)
        self.bundle = bundle
        self.name = name or bundle.manifest.name
        self.start_tp = start_tp
        self._layers = [
            (layer.weight.T.astype(np.float64), layer.bias.astype(np.float64)) for layer in bundle.layers
        ]
        edges = np.cumsum((0, *bundle.manifest.offer.sizes)).tolist()
        self._axes = [slice(a, b) for a, b in pairwise(edges)]
        self._is_tanh = bundle.manifest.network.activation == "tanh"
        self._is_masked = bundle.manifest.network.masked

    @property
    def digest(self) -> str:
        """The bundle's, for ``Decision.policy_digest``."""
        return self.bundle.digest

    def start_configuration(self, limits: Limits) -> Configuration:
        """The fastest, at the TP degree to start with."""
        if self.start_tp is None:
            return limits.fastest
        configuration = replace(limits.fastest, tp_degree=self.start_tp)
        limits.index(configuration)  # refuses a degree that is not offered, with the choices
        return configuration

    def start(self, limits: Limits, n: int) -> None:  # noqa: ARG002 - it keeps no state
        """Raises BundleError when the deployment offers other actions than the policy was trained on."""
        self.bundle.check_limits(limits)

    def decide(
        self,
        observation: NDArray[np.float32],
        rows: NDArray[np.float64],  # noqa: ARG002 - a learned policy sees the observation only
        mask: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """Index per axis, shape (n, 3)."""
        return self._most_probable(self.logits(observation, mask))

    def act(
        self, observation: NDArray[np.float32], mask: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Index per axis (n, 3), and the probability (n,) training would have drawn it with."""
        logits = self.logits(observation, mask)
        index = self._most_probable(logits)
        probability = np.ones(index.shape[0])
        for axis, part in enumerate(self._axes):
            top = logits[np.arange(index.shape[0]), part.start + index[:, axis]]
            usable = np.isfinite(top)
            scaled = np.exp(logits[:, part] - np.where(usable, top, 0.0)[:, None])
            probability *= np.where(usable, 1.0 / np.maximum(scaled.sum(axis=1), 1.0), 0.0)
        return index, probability

    def logits(self, observation: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Logits (n, sum of sizes); minus infinity where masked or where the result is not a number."""
        expected = self.bundle.manifest.network.widths[0]
        if observation.ndim != 2 or observation.shape[1] != expected:  # noqa: PLR2004 - (n, features)
            msg = f"{self.name}: expected observations (n, {expected}), got shape {observation.shape}"
            raise BundleError(msg)
        sound = np.asarray(np.isfinite(observation).all(axis=1))
        x = np.where(sound[:, None], observation, 0.0).astype(np.float64)
        for weight, bias in self._layers[:-1]:
            x = x @ weight + bias
            x = np.tanh(x) if self._is_tanh else np.maximum(x, 0.0)
        weight, bias = self._layers[-1]
        x = x @ weight + bias
        allowed = np.isfinite(x) & sound[:, None]
        if self._is_masked:
            allowed &= mask
        return np.where(allowed, x, -np.inf)

    def _most_probable(self, logits: NDArray[np.float64]) -> NDArray[np.int64]:
        # argmax takes the first of equals, and the first is the fastest: so it also answers "none"
        return np.stack([logits[:, part].argmax(axis=1) for part in self._axes], axis=1).astype(np.int64)


def _digest(manifest: Manifest, tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(manifest.model_copy(update={"sha256": ""}).canonical().encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype.str}:{tensor.shape};".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def _assemble(manifest: Manifest, tensors: Mapping[str, NDArray[Any]], where: str) -> Bundle:
    """The bundle of a manifest and its tensors. Raises BundleError when they do not fit together."""
    widths, size = manifest.network.widths, len(manifest.features)
    if widths[0] != size or widths[-1] != sum(manifest.offer.sizes):
        msg = (
            f"{where}: a network of widths {widths} cannot map {size} features to "
            f"{manifest.offer.sizes} choices; export it with the limits and features it was trained on"
        )
        raise BundleError(msg)
    expected: dict[str, tuple[tuple[int, ...], type[np.floating[Any]]]] = {
        f"statistics.{name}": ((size, size) if name == "covariance" else (size,), np.float64)
        for name in ObservationStatistics.__dataclass_fields__
    }
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        expected[f"policy.{i}.weight"] = ((outputs, inputs), np.float32)
        expected[f"policy.{i}.bias"] = ((outputs,), np.float32)
    if set(tensors) != set(expected):
        differing = ", ".join(sorted(set(tensors) ^ set(expected)))
        msg = f"{where}: tensors missing or not expected: {differing}; export it again"
        raise BundleError(msg)
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype or not np.isfinite(tensor).all():
            msg = (
                f"{where}: {name} must be finite {np.dtype(dtype).name} of shape {shape}, "
                f"got {tensor.dtype} of {tensor.shape}; train or export it again"
            )
            raise BundleError(msg)
    layers = tuple(
        Layer(tensors[f"policy.{i}.weight"], tensors[f"policy.{i}.bias"]) for i in range(len(widths) - 1)
    )
    names = ObservationStatistics.__dataclass_fields__
    statistics = ObservationStatistics(**{name: tensors[f"statistics.{name}"] for name in names})
    return Bundle(manifest, layers, statistics)


def _policy_layers(policy: Any) -> tuple[tuple[Layer, ...], Literal["tanh", "relu"]]:  # noqa: ANN401 - see export_bundle
    # only exporting needs torch: running a bundle must not
    import torch  # noqa: PLC0415
    from stable_baselines3.common.torch_layers import FlattenExtractor  # noqa: PLC0415

    extractors = (policy.features_extractor, policy.pi_features_extractor)
    if not all(isinstance(extractor, FlattenExtractor) for extractor in extractors):
        msg = "only MlpPolicy can be exported: its features extractor must be FlattenExtractor"
        raise BundleError(msg)
    modules = [*policy.mlp_extractor.policy_net, policy.action_net]
    linear = [module for module in modules if isinstance(module, torch.nn.Linear)]
    between = [module for module in modules if not isinstance(module, torch.nn.Linear)]
    activations: dict[type[Any], Literal["tanh", "relu"]] = {torch.nn.Tanh: "tanh", torch.nn.ReLU: "relu"}
    alternating = len(between) == len(linear) - 1 and modules[::2] == linear
    if not alternating or len({type(module) for module in between}) > 1:
        msg = f"the policy network must alternate linear layers and one activation, got {modules}"
        raise BundleError(msg)
    kind = type(between[0]) if between else torch.nn.Tanh
    if kind not in activations:
        msg = f"activation {kind.__name__} cannot be exported; train with tanh or ReLU"
        raise BundleError(msg)
    layers = tuple(
        Layer(
            module.weight.detach().cpu().numpy().astype(np.float32),
            module.bias.detach().cpu().numpy().astype(np.float32),
        )
        for module in linear
    )
    return layers, activations[kind]
