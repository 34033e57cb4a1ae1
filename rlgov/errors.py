"""Errors of rlgov. Every message says what is wrong, where, and what to do about it."""

from __future__ import annotations


class RlgovError(Exception):
    """Base of every error rlgov raises on purpose."""


class ConfigError(RlgovError):
    """A setting, flag or configuration file cannot be used."""


class TraceError(RlgovError):
    """A request trace is malformed; the message names file, line and field."""


class ProfileError(RlgovError):
    """A profile is malformed or does not cover what was asked of it."""


class BundleError(RlgovError):
    """A policy bundle is damaged, of another schema, or made for another deployment."""


class JournalError(RlgovError):
    """A journal cannot be read, or holds something else than was asked for."""


class DeploymentError(RlgovError):
    """A deployment cannot start, or was used out of order."""


class EngineError(DeploymentError):
    """A vLLM engine cannot start, died, or does not answer as it should."""


class HardwareError(RlgovError):
    """A GPU cannot be read or set; the message says what the driver answered and what to do."""


class TelemetryError(DeploymentError):
    """A measurement cannot be read: a metrics page that is damaged, foreign or cannot be reached."""


class CharacterizationError(RlgovError):
    """A characterisation cannot be run, or what it wrote cannot be read."""


class CalibrationError(RlgovError):
    """Measurements cannot be fitted; the message says which rows, columns or settings are missing."""
