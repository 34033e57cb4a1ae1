"""Every failure mode has a row in tests/FAILURES.md, and every test it names is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from rlgov.governor.records import CONDITIONS

ROWS = 28
COLUMNS = 4
TEST = re.compile(r"tests/[\w/]+\.py::test_\w+")


def table(repository: Path) -> dict[int, list[str]]:
    """Number, failure, behaviour and tests of each row."""
    text = (repository / "tests" / "FAILURES.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["#", "failure", "what rlgov does", "shown by"]
    assert {len(row) for row in cells} == {COLUMNS}
    numbers = [int(row[0]) for row in cells[2:]]
    assert numbers == list(range(1, ROWS + 1))
    return dict(zip(numbers, cells[2:], strict=True))


@cache
def collected(path: Path) -> frozenset[str]:
    """Names of the tests that pytest would collect from a file, skipped ones left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return frozenset(
        node.name
        for node in functions
        if node.name.startswith("test_")
        and not any("mark.skip" in ast.unparse(mark) for mark in node.decorator_list)
    )


@pytest.mark.parametrize("number", range(1, ROWS + 1))
def test_a_failure_mode_is_described_and_its_tests_exist(repository: Path, number: int) -> None:
    _, failure, behaviour, shown = table(repository)[number]
    assert failure
    assert behaviour
    named = shown.split("<br>")
    assert len(named) >= 2
    assert len(set(named)) == len(named)
    for name in named:
        assert TEST.fullmatch(name), name
        path, _, function = name.partition("::")
        assert (repository / path).is_file(), name
        assert function in collected(repository / path), name


def test_conditions_named_in_the_table_are_the_governors(repository: Path) -> None:
    named = {
        word
        for row in table(repository).values()
        for word in re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)*)`", row[2])
    }
    assert named <= set(CONDITIONS)
    assert {"EngineStalled", "Blind", "ForeignWriter", "GpuLost", "OutOfDistribution"} <= named


def test_the_readme_leads_to_the_table(repository: Path) -> None:
    assert "(tests/FAILURES.md)" in (repository / "README.md").read_text(encoding="utf-8")
