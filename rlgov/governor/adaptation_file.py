"""What adaptation has found, kept across runs: one JSON file, replaced as a whole, written beside the loop.

It belongs to one profile (by digest) and to the very GPUs it was measured on; under anything else it is not
taken. Times are kept as ages, because the monotonic clock does not outlive a reboot.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlgov.config import explain
from rlgov.errors import ConfigError
from rlgov.governor.adaptation import MOST_CONFIGURATIONS, Sample
from rlgov.records import Configuration
from rlgov.simulation.forecast import Scales

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rlgov.clock import Clock
    from rlgov.governor.adaptation import Adaptation
    from rlgov.simulation.profile import Profile

SCHEMA: Final = 1
SAVE_EVERY_S: Final = 60.0
MOST_BYTES: Final = 4_000_000
_CLOSE_S: Final = 2.0

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Kept(_Strict):
    configuration: tuple[_Count, _Count, _Count]  # MHz, cap, TP
    samples: list[tuple[Annotated[_Finite, Field(ge=0)], _Finite, _Finite]]  # age in s, time, power


class _State(_Strict):
    schema_version: int
    profile_digest: str
    gpu_uuids: list[str]
    saved_wall_s: _Finite
    time_scale: _Factor
    power_scale: _Factor
    kept: Annotated[list[_Kept], Field(max_length=MOST_CONFIGURATIONS)]


@dataclass(frozen=True, slots=True)
class Owner:
    """What a state is of."""

    profile_digest: str
    gpu_uuids: tuple[str, ...]

    @classmethod
    def of(cls, profile: Profile, gpu_uuids: Iterable[str]) -> Self:
        """Of this profile on these GPUs, whatever their order."""
        return cls(profile_digest(profile), tuple(sorted(gpu_uuids)))


def profile_digest(profile: Profile) -> str:
    """Sha256 of everything a profile says."""
    return hashlib.sha256(profile.model_dump_json().encode()).hexdigest()


def encode(adaptation: Adaptation, owner: Owner, now_s: float, wall_s: float) -> str:
    """The state as JSON."""
    scales = adaptation.scales
    kept = [
        _Kept(
            configuration=(at.sm_clock_mhz, at.batch_cap, at.tp_degree),
            samples=[
                (round(max(now_s - sample.at_s, 0.0), 1), round(sample.time, 4), round(sample.power, 4))
                for sample in samples
            ],
        )
        for at, samples in adaptation.samples().items()
    ]
    return _State(
        schema_version=SCHEMA,
        profile_digest=owner.profile_digest,
        gpu_uuids=list(owner.gpu_uuids),
        saved_wall_s=wall_s,
        time_scale=scales.time,
        power_scale=scales.power,
        kept=kept,
    ).model_dump_json()


def decode(text: str, adaptation: Adaptation, owner: Owner, now_s: float, wall_s: float) -> str:
    """Let adaptation go on from a saved state.

    Returns:
        Why it was not taken; empty when it was.
    """
    try:
        state = _State.model_validate_json(text)
    except ValidationError as error:
        return f"it is not understood ({explain(error)[:200]})"
    if state.schema_version != SCHEMA:
        return f"it is of schema {state.schema_version}, not {SCHEMA}"
    if Owner(state.profile_digest, tuple(state.gpu_uuids)) != owner:
        return "it is of another profile or other GPUs"
    since_s = max(wall_s - state.saved_wall_s, 0.0)  # a wall clock that went back makes nothing younger
    samples = {
        Configuration(*kept.configuration): [
            Sample(now_s - since_s - age_s, time, power) for age_s, time, power in kept.samples
        ]
        for kept in state.kept
    }
    adaptation.resume(Scales(state.time_scale, state.power_scale), dict(samples), now_s)
    return ""


def read_scales(path: Path, profile: Profile) -> Scales:
    """The factors of a saved state, for a report.

    Raises:
        ConfigError: There is no such state, or it is of another profile.
    """
    try:
        state = _State.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); `rlgov govern --adapt` writes it") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: no state of `rlgov govern --adapt` ({explain(error)[:200]})") from error
    if state.schema_version != SCHEMA or state.profile_digest != profile_digest(profile):
        raise ConfigError(f"{path}: is of another profile than {profile.name}; name the run's own --profile")
    return Scales(state.time_scale, state.power_scale)


class AdaptationFile:
    """Loads a state, and saves it now and then from a thread of its own: the loop never waits for a disk.

    Args:
        path: The file.
        adaptation: Whose state.
        owner: What its state is of.
        clock: For ages, and for when to save.
    """

    def __init__(self, path: Path, adaptation: Adaptation, owner: Owner, clock: Clock) -> None:
        self.path = path
        self.problem = ""
        """Why the state was not loaded or last not saved; empty when all went well."""
        self._adaptation = adaptation
        self._owner = owner
        self._clock = clock
        self._saved_s = clock.monotonic_s()
        self._wanted: queue.Queue[str | None] = queue.Queue(1)
        self._thread = threading.Thread(target=self._write_all, name="adaptation", daemon=True)
        self._thread.start()

    def load(self) -> bool:
        """Take the file's state if there is one and it belongs here; False otherwise."""
        try:
            if self.path.stat().st_size > MOST_BYTES:
                self.problem = f"{self.path}: too large to be a state of adaptation; it is not used"
                return False
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return False
        except (OSError, UnicodeDecodeError) as error:
            self.problem = f"{self.path}: not read ({error}); adaptation begins anew"
            return False
        now_s, wall_s = self._clock.monotonic_s(), self._clock.wall_s()
        why = decode(text, self._adaptation, self._owner, now_s, wall_s)
        self.problem = f"{self.path}: not used, because {why}; adaptation begins anew" if why else ""
        return not why

    def save(self, *, at_once: bool = False) -> None:
        """Hand the state over to be written, if it is time; never waits."""
        now_s = self._clock.monotonic_s()
        if not at_once and now_s - self._saved_s < SAVE_EVERY_S:
            return
        self._saved_s = now_s
        text = encode(self._adaptation, self._owner, now_s, self._clock.wall_s())
        with contextlib.suppress(queue.Empty):
            self._wanted.get_nowait()  # an older one that still waits
        with contextlib.suppress(queue.Full):
            self._wanted.put_nowait(text)

    def close(self) -> None:
        """Save what there is, and end; waits a moment for a slow disk. Safe to call twice."""
        if self._thread.is_alive():
            self.save(at_once=True)
            with contextlib.suppress(queue.Full):
                self._wanted.put(None, timeout=_CLOSE_S)
            self._thread.join(_CLOSE_S)

    def _write_all(self) -> None:
        while (text := self._wanted.get()) is not None:
            try:
                _replace(self.path, text)
            except OSError as error:
                self.problem = f"{self.path}: not saved ({error}); free space or name another file"
            else:
                self.problem = ""


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
