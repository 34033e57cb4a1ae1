"""Fixtures that more than one area of the tests uses."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared measurements and traces next to the checkout; the test is skipped without it."""
    shared = REPOSITORY.parent / "shared"
    if not (shared / "data").is_dir():
        pytest.skip(f"needs the measurements and traces in {shared.name}/data next to the checkout")
    return shared
