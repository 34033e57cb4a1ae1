"""The run folder of a serving stack: who owns it, and what it was doing, written before it is done.

``state.json`` is replaced as a whole (written beside it, synchronised, renamed), so a crash at any
instant leaves the state before or the state after, never half of one. It names every engine that may
exist, also one that is only about to be launched.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from rlgov.config import explain
from rlgov.engine.identity import ProcessIdentity, boot_id
from rlgov.engine.spec import EngineSpec
from rlgov.engine.switch.machine import Step, Switch
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

STATE_SCHEMA = 1
STATE_FILE = "state.json"
LOCK_FILE = "lock"
PRIVATE_MODE = 0o600  # the state holds the engines' tokens


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One engine that exists or is about to."""

    spec: EngineSpec
    identity: ProcessIdentity | None  # None: the launch has been announced, not confirmed
    phase: str  # as samples.EngineInfo.phase


@dataclass(frozen=True, slots=True)
class SwitchRecord:
    """The switch in progress."""

    old_id: str | None
    new_id: str | None
    old_degree: int
    new_degree: int
    state: Switch


@dataclass(frozen=True, slots=True)
class StackRecord:
    """Everything a later run needs to know of this one."""

    schema_version: int
    boot_id: str
    model: str
    tp_degree: int  # the degree that serves, or should
    routed: str | None  # engine that takes new requests
    engines: tuple[EngineRecord, ...]
    switch: SwitchRecord | None = None
    switch_s: dict[int, float] = field(default_factory=dict)  # measured, by degree
    kv_capacity_tokens: dict[int, int] = field(default_factory=dict)  # measured, by degree


for _kind in (EngineSpec, ProcessIdentity, Step, Switch, EngineRecord, SwitchRecord, StackRecord):
    with_config(ConfigDict(extra="forbid"))(_kind)
_RECORD = TypeAdapter(StackRecord)


@dataclass(frozen=True, slots=True)
class _Boot:
    """What every version's state has."""

    boot_id: str


_BOOT = TypeAdapter(_Boot)


class RunFolder:
    """A folder that at most one serving stack owns at a time.

    Args:
        path: Made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def lock(self) -> None:
        """Own the folder until :meth:`unlock` or the end of this process, however it ends.

        Raises:
            ConfigError: Another stack owns it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_MODE)
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be used ({error.strerror}); name a writable folder with --run"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise ConfigError(
                f"{self.path}: another `rlgov serve` runs in this folder; stop it, or name another with --run"
            ) from error
        self._lock = handle

    def unlock(self) -> None:
        """Give the folder up; safe to call twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def load(self) -> StackRecord | None:
        """What an earlier run of this boot left; None if there is nothing to take over.

        Raises:
            ConfigError: There is a state that cannot be understood.
        """
        path = self.path / STATE_FILE
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            if _BOOT.validate_json(text).boot_id != boot_id():
                return None  # its engines ended with their machine
            return _RECORD.validate_json(text)
        except ValidationError as error:
            raise ConfigError(
                f"{path}: not a state of this version of rlgov ({explain(error)}). Its engines may still "
                "run: stop them with the version that started them, or by hand, and remove the file"
            ) from error

    def save(self, record: StackRecord) -> None:
        """Replace the state, durably. Raises OSError where the folder cannot be written."""
        path = self.path / STATE_FILE
        beside = path.with_suffix(".new")
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PRIVATE_MODE)
        with os.fdopen(handle, "wb") as stream:
            stream.write(_RECORD.dump_json(record))
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
        folder = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
