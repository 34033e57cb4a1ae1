"""The vllm program, played by environments that hold only what is looked at."""

from __future__ import annotations

import venv
from pathlib import Path

import pytest

import rlgov
from rlgov.doctor.engine import check_vllm, find_program, interpreter_of
from rlgov.doctor.finding import Finding, Level


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of its own, without packages; the current folder and PATH are empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    venv.create(tmp_path / ".venv-vllm", with_pip=False, symlinks=True)
    return tmp_path / ".venv-vllm"


def _install(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    (packages,) = (folder / "lib").glob("python*/site-packages")
    info = packages / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")


def _program(folder: Path, first_line: str | None = None) -> Path:
    program = folder / "bin" / "vllm"
    program.write_text(f"{first_line or '#!' + str(folder / 'bin' / 'python')}\n", encoding="utf-8")
    program.chmod(0o755)
    return program


PLUGINS = "[vllm.general_plugins]\nrlgov = x:y\n[vllm.endpoint_plugins]\nrlgov = x:y\n"


def _levels(findings: list[Finding]) -> dict[str, Level]:
    return {finding.check: finding.level for finding in findings}


def test_vllm_with_the_plugin_is_fine(folder: Path) -> None:
    _program(folder)
    _install(folder, "vllm", "0.32.1")
    _install(folder, "rlgov", rlgov.__version__, PLUGINS)
    findings = list(check_vllm(None))
    assert _levels(findings) == {"vllm": Level.OK, "plugin": Level.OK}
    assert "0.32.1" in findings[0].said


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "1.0", "unknown"])
def test_releases_the_plugin_was_not_proven_in_are_a_warning(folder: Path, version: str) -> None:
    _program(folder)
    _install(folder, "vllm", version)
    _install(folder, "rlgov", rlgov.__version__, PLUGINS)
    first, _ = check_vllm(None)
    assert first.level is Level.WARN
    assert version in first.said
    assert "vllm>=0.32" in first.remedy


@pytest.mark.parametrize(
    ("version", "plugins"), [(rlgov.__version__, "[console_scripts]\nrlgov = x:y\n"), ("0.0.1", PLUGINS)]
)
def test_a_plugin_that_is_absent_or_another_is_a_warning(folder: Path, version: str, plugins: str) -> None:
    _program(folder)
    _install(folder, "vllm", "0.32.0")
    _install(folder, "rlgov", version, plugins)
    findings = list(check_vllm(None))
    assert _levels(findings) == {"vllm": Level.OK, "plugin": Level.WARN}
    assert f"pip install --no-deps rlgov=={rlgov.__version__}" in findings[1].remedy


def test_without_vllm_serving_is_not_possible(folder: Path) -> None:
    (nothing,) = check_vllm(None)
    assert nothing.level is Level.FAIL
    (named,) = check_vllm(Path("no-such-vllm"))
    assert named.level is Level.FAIL
    assert "no-such-vllm" in named.said
    _program(folder)
    (empty,) = check_vllm(None)
    assert empty.level is Level.FAIL
    assert "no vLLM is installed" in empty.said
    _program(folder, f"#!{folder / 'bin' / 'python-that-left'}")
    (broken,) = check_vllm(None)
    assert broken.level is Level.FAIL
    assert "python-that-left" in broken.said


def test_the_named_program_comes_before_the_path_and_that_before_the_local_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = _program(folder)
    assert find_program(None) == local.relative_to(tmp_path)
    on_path = tmp_path / "bin"
    on_path.mkdir()
    (on_path / "vllm").symlink_to(local)
    monkeypatch.setenv("PATH", str(on_path))
    assert find_program(None) == on_path / "vllm"
    assert find_program(local) == local


@pytest.mark.parametrize("first_line", ["#!/usr/bin/env python3", "#!/bin/sh", "import sys"])
def test_a_program_that_does_not_name_its_python_has_it_beside_it(folder: Path, first_line: str) -> None:
    program = _program(folder, first_line)
    assert interpreter_of(program) == folder / "bin" / "python"
    (folder / "bin" / "python").unlink()
    assert interpreter_of(program) is None
    assert _levels(list(check_vllm(None))) == {"vllm": Level.WARN}
