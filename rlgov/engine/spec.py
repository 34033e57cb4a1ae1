"""What one engine is: the value from which it is launched, and found again after a crash of rlgov."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003  # the journal of the switch reads the annotations at run time

from rlgov.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One ``vllm serve``.

    Token and environment are left out of its ``repr``, which may end up in a log.
    """

    engine_id: str
    """Drawn for each launch, so that counters of two launches are never mixed up."""
    command: tuple[str, ...]
    """The vLLM program, e.g. ("/opt/vllm/bin/vllm",); ``serve MODEL ...`` is appended."""
    model: str
    tp_degree: int
    gpu_uuids: tuple[str, ...]
    """Empty without GPUs."""
    host: str
    """Where the engine listens; a loopback address, since the gateway is what clients talk to."""
    port: int
    max_num_seqs: int
    arguments: tuple[str, ...]
    """The operator's own arguments for vLLM, passed through."""
    environment: dict[str, str] = field(repr=False)
    """Added to the environment rlgov runs in."""
    log_path: Path
    token: str = field(repr=False)
    """What the plugin's calls must bring along."""
    plugin: bool
    """Whether rlgov's plugin is loaded; rlgov must then be installed in vLLM's environment, too."""
    start_timeout_s: float = 900
    shutdown_timeout_s: float = 120
    """How long vLLM lets requests in flight finish after SIGTERM."""

    def __post_init__(self) -> None:
        if not self.command:
            raise ConfigError(f"engine {self.engine_id} has no command; name the vllm program")
        if not (self.engine_id and self.token):
            raise ConfigError("an engine needs an id and a token of its own; draw them for each launch")
        for name in ("tp_degree", "max_num_seqs", "port"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} of engine {self.engine_id} must be at least 1: {getattr(self, name)}"
                )
        if self.gpu_uuids and len(self.gpu_uuids) < self.tp_degree:
            raise ConfigError(
                f"engine {self.engine_id} has {len(self.gpu_uuids)} GPUs for a TP degree of "
                f"{self.tp_degree}; give it as many GPUs, or lower the degree"
            )
        if self.shutdown_timeout_s <= 0 or self.start_timeout_s <= 0:
            raise ConfigError(
                f"time limits of engine {self.engine_id} must be above 0 s: with a shutdown timeout of 0 "
                "vLLM aborts every request in flight"
            )
