"""What a person may set of a governor: ``rlgov govern``, and its section of the configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlgov.agents.fallback import FallbackSettings
from rlgov.config import Settings
from rlgov.envs.guard import GuardSettings
from rlgov.envs.watch import WatchSettings
from rlgov.governor.adaptation import AdaptationSettings
from rlgov.governor.journal import RotationSettings
from rlgov.governor.listen import DEFAULT_SOCKET
from rlgov.governor.safety import SafetySettings

DEFAULT_CONTROL = Path("runs/serve/control.sock")


class GovernSettings(Settings):
    """A policy beside a serving stack: it watches, shows what it would do, or acts within limits."""

    policy: str | None = None
    """Bundle of a learned policy, or a baseline by name (ecofreq, fastest). Without one it only watches."""
    mode: Literal["observe", "shadow", "active"] = "shadow"
    """``observe``: watch. ``shadow``: decide and do not act. ``active``: act. ``rlgov tell`` changes it."""
    control: Path | None = None
    """Control socket of ``rlgov serve``; runs/serve/control.sock if neither this nor attach is given."""
    attach: str | None = None
    """Address of a vLLM that runs already: its TP degree is fixed, its batch cap needs the plugin."""
    tp: PositiveInt | None = None
    """With attach: the TP degree vLLM was started with; the profile's largest if not given."""
    token_env: str | None = None
    """With attach: environment variable with the plugin's token, for the batch cap."""
    profile: str | None = None
    """Profile name or path of a profile file; the bundle's own if not given."""
    slo_scale: PositiveFloat = 1.0
    """Multiple of the profile's latency limits."""
    interval_s: Annotated[float, Field(ge=0.1, le=5.0)] | None = None
    """Length of a control interval; the profile's if not given, which is what the policy was trained at."""
    gpus: tuple[str, ...] = ("auto",)
    """GPUs by UUID, or ``none``; ``auto``: those the stack was given (attach: all of this machine)."""
    clocks: Literal["auto", "keeper", "direct", "zeusd", "none"] = "auto"
    """Who sets the clocks: ``auto`` is the keeper where its socket is, else this process itself."""
    keeper_socket: Path = Path("/run/rlgov/keeper.sock")
    """Socket of ``rlgov keeper``."""
    zeusd_socket: Path = Path("/var/run/zeusd.sock")
    """Socket of zeusd."""
    journal: Path | None = Path("runs/govern/journal")
    """Folder of the journal; ``rlgov replay --journal`` and ``rlgov report`` read it."""
    listen: tuple[str, ...] = (str(DEFAULT_SOCKET),)
    """Where metrics, status and orders are: Unix sockets (paths) or HOST:PORT."""
    token_file: Path | None = None
    """File with the token that orders over TCP have to show."""
    tensorboard: Path | None = None
    """Folder for TensorBoard's events; none are written if not given."""
    adapt: bool = False
    """Let predictions follow what is measured: those of the savings, and of the baseline that stands in for a
    policy. A deployment too far from its profile is told, with what to measure anew."""
    adaptation_file: Path = Path("runs/govern/adaptation.json")
    """With adapt: what was found, for the next run of this profile on these GPUs."""
    guard: GuardSettings = GuardSettings()
    """How tightly the policy is held; as in training, unless there is a reason."""
    watch: WatchSettings = WatchSettings()
    """When serving counts as stalled, and how much harm a policy may do."""
    safety: SafetySettings = SafetySettings()
    """When the governor takes its hands off."""
    fallback: FallbackSettings = FallbackSettings()
    """When the baseline decides in the learned policy's place."""
    adaptation: AdaptationSettings = AdaptationSettings()
    """With adapt: how fast predictions follow, and how far is too far."""
    rotation: RotationSettings = RotationSettings()
    """How much of the journal is kept."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.control is not None and self.attach is not None:
            msg = "control and attach name two deployments; give one of them"
            raise ValueError(msg)
        if self.attach is not None and not self.attach.startswith(("http://", "https://")):
            msg = f"attach {self.attach!r} is no address of a server; give one such as http://127.0.0.1:8000"
            raise ValueError(msg)
        if self.attach is None and (self.tp is not None or self.token_env is not None):
            msg = "tp and token_env go with attach; `rlgov serve` tells both by itself"
            raise ValueError(msg)
        if not self.gpus:
            msg = "name GPUs by UUID, or auto, or none"
            raise ValueError(msg)
        return self
