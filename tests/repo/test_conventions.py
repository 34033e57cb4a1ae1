"""Rules of the repository that no linter knows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from shutil import which

import pytest

TEXT = {".py", ".toml", ".md", ".yaml", ".yml", ".txt", ".cfg", ""}


def _tracked(repository: Path) -> list[Path]:
    if which("git") is None or not (repository / ".git").exists():
        pytest.skip("needs a git checkout to know which files belong to the repository")
    listed = subprocess.run(
        ["git", "ls-files", "-z"],  # noqa: S607  # whichever git the developer uses
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    )
    paths = [repository / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_every_lint_exception_has_a_reason(repository: Path) -> None:
    lines = (repository / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    codes = [line for line in lines if re.match(r'\s+"[A-Z]+\d*",', line)]
    assert codes
    assert [line for line in codes if "#" not in line] == []


def test_every_ignored_type_error_has_code_and_reason(repository: Path) -> None:
    bare = []
    for path in _tracked(repository):
        if path.suffix != ".py":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if re.search(r"#\s*type:\s*ignore", line) and not re.search(
                r"type: ignore\[[\w, -]+\]\s+#\s*\w", line
            ):
                bare.append(f"{path.relative_to(repository)}:{number}")
    assert bare == []


def test_nothing_is_left_to_do(repository: Path) -> None:
    marks = re.compile(r"TO[D]O|FIX[M]E|X[X]X")  # written so that this line is not one of them
    found = [
        f"{path.relative_to(repository)}:{number}"
        for path in _tracked(repository)
        if path.suffix in {".py", ".toml", ".yaml", ".md"} or path.name == "Makefile"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if marks.search(line)
    ]
    assert found == []


def test_runs_holds_only_its_readme(repository: Path) -> None:
    runs = [path.name for path in _tracked(repository) if path.parent.name == "runs"]
    assert runs == ["README.md"]


def test_ci_runs_what_make_runs(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make ")]
    assert commands[-1] == "make test"
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "check", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.skipif(which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("python", "said"),
    [("no-such-python", "Install Python 3.11 or newer"), ("old-python", "needs Python 3.11 or newer")],
)
def test_make_says_which_python_it_needs(repository: Path, tmp_path: Path, python: str, said: str) -> None:
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.8.1" && exit 0\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "install", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"],  # noqa: S607  # the developer's make
        cwd=repository,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert "make PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_layers_of_the_import_contract_cover_every_module(repository: Path) -> None:
    """A module outside the contract could import anything."""
    settings = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    named = {part.strip(" ()") for layer in contract["layers"] for part in layer.split("|")}
    modules = {
        f"rlgov.{path.stem}"
        for path in (repository / "rlgov").iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").is_file()
    }
    assert modules - named == set()


def test_the_program_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlgov", "--version"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", done.stdout)
