"""What is installed is what lies in the folders."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import rlgov

SOURCES = ("rlgov", "envs", "agents")


@pytest.fixture(scope="module")
def pyproject(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


def _folders(repository: Path) -> dict[str, str]:
    """Package name to folder, for every folder with an __init__.py, each real folder once."""
    found = {}
    for top in SOURCES:
        for marker in (repository / top).rglob("__init__.py"):
            folder = marker.parent
            links = [part for part in (folder, *folder.parents) if part.is_symlink()]
            if links:
                continue
            relative = folder.relative_to(repository)
            name = ".".join(relative.parts)
            found[name if top == "rlgov" else f"rlgov.{name}"] = str(relative)
    return found


def test_packages_are_the_folders(repository: Path, pyproject: dict[str, Any]) -> None:
    setuptools = pyproject["tool"]["setuptools"]
    folders = _folders(repository)
    assert sorted(setuptools["packages"]) == sorted(folders)
    mapping = setuptools["package-dir"]
    for name, folder in folders.items():
        parent = name
        while parent not in mapping:
            parent = parent.rpartition(".")[0]
        below = name.removeprefix(parent).replace(".", "/")
        assert mapping[parent] + below == folder


@pytest.mark.parametrize("name", ["envs", "agents"])
def test_links_for_type_checkers_lead_to_the_code(repository: Path, name: str) -> None:
    link = repository / "rlgov" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert link.resolve() == repository / name


def test_version_has_one_source(pyproject: dict[str, Any]) -> None:
    assert "version" in pyproject["project"]["dynamic"]
    assert importlib.metadata.version("rlgov") == rlgov.__version__


def test_changelog_speaks_of_this_version(repository: Path) -> None:
    text = (repository / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{rlgov.__version__}]" in text or "## [Unreleased]" in text


def test_constraints_pin_every_dependency(repository: Path, pyproject: dict[str, Any]) -> None:
    """A fresh clone installs the same thing on every day: nothing of core, train or dev is left open."""
    pinned = set()
    for line in (repository / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, separator, version = line.partition("==")
            assert separator, f"not an exact pin: {line}"
            assert "+" not in version, f"a local version tag binds to one build: {line}"
            pinned.add(_normal(name))
    project = pyproject["project"]
    wanted = [*project["dependencies"]]
    for extra in ("train", "dev"):
        wanted += project["optional-dependencies"][extra]
    missing = [want for want in wanted if _normal(want.partition(">=")[0]) not in pinned]
    assert not missing


def test_the_core_asks_for_nothing_heavy(pyproject: dict[str, Any]) -> None:
    core = {_normal(want.partition(">=")[0]) for want in pyproject["project"]["dependencies"]}
    assert core.isdisjoint({"torch", "gymnasium", "pandas", "numba", "scipy", "matplotlib"})


@pytest.mark.slow
def test_wheel_holds_code_and_data(repository: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools in the environment: building offline allows no build isolation")
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((repository / name).read_bytes())
    wanted = set()
    for top in SOURCES:
        for path in sorted((repository / top).rglob("*")):
            relative = path.relative_to(repository)
            inside_link = any((repository / parent).is_symlink() for parent in (relative, *relative.parents))
            if inside_link or "__pycache__" in relative.parts or not path.is_file():
                continue
            target = copy / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            data = "assets" in relative.parts or path.name == "py.typed"
            if data or path.suffix in {".py", ".yaml", ".json"}:
                wanted.add(str(relative) if top == "rlgov" else f"rlgov/{relative}")
    # As in a checkout. The links must not carry the code into the wheel a second time.
    (copy / "rlgov" / "envs").symlink_to("../envs")
    (copy / "rlgov" / "agents").symlink_to("../agents")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(copy)], check=True)
    (wheel,) = tmp_path.glob("rlgov-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert wanted <= set(names)
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"rlgov", f"rlgov-{rlgov.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-")
