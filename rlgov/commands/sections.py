"""Which commands a configuration file can speak of, and the record each section fills."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel


def sections() -> dict[str, type[BaseModel]]:
    """The record of settings of each section, in the order people meet them."""
    from rlgov.agents.train_config import TrainConfig
    from rlgov.config import (
        CharacterizeSettings,
        DemoSettings,
        ExportSettings,
        LoadSettings,
        ReplaySettings,
        ServeSettings,
        StudySettings,
        TuneSettings,
    )
    from rlgov.governor.settings import GovernSettings

    return {
        "demo": DemoSettings,
        "train": TrainConfig,
        "replay": ReplaySettings,
        "tune": TuneSettings,
        "study": StudySettings,
        "export": ExportSettings,
        "serve": ServeSettings,
        "govern": GovernSettings,
        "load": LoadSettings,
        "characterize": CharacterizeSettings,
    }
