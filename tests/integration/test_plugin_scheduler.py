"""The plugin in vLLM's own schedulers; that for overlapping iterations a CPU engine never uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_counts_as_an_account_kept_request_by_request(vllm_program: Path, tmp_path: Path) -> None:
    writer = HERE.parent / "fakes" / "tiny_model.py"
    subprocess.run([sys.executable, str(writer), str(tmp_path / "model")], check=True)
    done = subprocess.run(
        [
            str(vllm_program.with_name("python")),
            str(HERE / "drive_scheduler.py"),
            str(tmp_path / "model"),
            "1",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads(done.stdout.splitlines()[-1])
    assert {run["class"] for run in runs} == {"GovernedAsyncScheduler", "GovernedScheduler"}
    assert all(run["account"]["preemptions"] > 0 and run["cached"] > 0 for run in runs)
    for run in runs:
        assert run["note"] == ""
        for name, value in run["account"].items():
            counted = run["counted"][name]
            assert counted == pytest.approx(value, abs=1e-6), f"{name} of {run['class']}"
