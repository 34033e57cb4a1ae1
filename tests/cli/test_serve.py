"""How flags, profile and machine become a stack's settings, and which are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlgov import cli
from rlgov.commands.serve import stack_settings
from rlgov.config import ServeSettings
from rlgov.engine.model_files import read_shape
from rlgov.engine.stack_settings import StackSettings, offer
from rlgov.engine.switch.feasibility import ModelShape
from rlgov.engine.switch.machine import Strategy
from rlgov.errors import ConfigError
from rlgov.simulation.profile import load_profile

PROFILE = load_profile("h100-qwen3-32b")
GPUS = tuple(f"GPU-{i}" for i in range(8))


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "vllm"
    path.write_text("#!/bin/sh\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def _settled(
    program: Path, *arguments: str, profile: Any = None, gpus: Any = (), **flags: Any
) -> StackSettings:
    return stack_settings(ServeSettings(vllm=program, **flags), arguments, profile, gpus, 80e9)


def test_a_profile_gives_what_flags_leave_open(program: Path) -> None:
    settled = _settled(program, profile=PROFILE, gpus=GPUS)
    shape = PROFILE.deployment
    assert settled.model == PROFILE.model.name
    assert (settled.tp_degrees, settled.batch_caps) == (shape.tp_degrees, shape.batch_caps)
    assert settled.max_num_batched_tokens == shape.max_num_batched_tokens
    assert settled.gpu_uuids == GPUS[:4]
    assert settled.kv_capacity_tokens == PROFILE.limits().kv_capacity_tokens
    assert settled.switch_s == PROFILE.limits().switch_s
    assert offer(settled).strategy is Strategy.SLEEP


def test_flags_win_over_the_profile(program: Path) -> None:
    settled = _settled(
        program, profile=PROFILE, gpus=GPUS[:2], tp=(1, 2), max_num_seqs=32, switch="restart", start_tp=1,
        max_num_batched_tokens=2048,
    )  # fmt: skip
    assert settled.tp_degrees == (2, 1)
    assert settled.batch_caps == (32, 16, 8)
    assert settled.max_num_batched_tokens == 2048
    assert (offer(settled).start_degree, offer(settled).strategy) == (1, Strategy.RESTART)


def test_without_a_profile_there_are_defaults(program: Path) -> None:
    settled = _settled(program, model="m")
    assert settled.tp_degrees == (1,)
    assert settled.batch_caps == (256, 128, 64, 32, 16, 8)
    assert settled.allotted_gpus == 1
    assert _settled(program, model="m", max_num_seqs=4).batch_caps == (4,)


def test_vllms_own_arguments_are_understood_where_they_matter(program: Path) -> None:
    settled = _settled(
        program, "--max-num-batched-tokens=512", "--gpu_memory_utilization", "0.5", model="m", gpus=GPUS[:1]
    )
    assert settled.max_num_batched_tokens == 512
    assert settled.room.utilization == 0.5


@pytest.mark.parametrize(
    ("arguments", "flags", "said"),
    [
        ((), {}, "name one with --model"),
        (("--port", "1"), {"model": "m"}, "rlgov's own --port"),
        (("--max-num-batched-tokens", "x"), {"model": "m"}, "whole number"),
        (("--max-num-batched-tokens", "8"), {"model": "m", "max_num_batched_tokens": 8}, "given twice"),
        (("--gpu-memory-utilization", "x"), {"model": "m"}, "must be a number"),
        ((), {"model": "m", "batch_caps": (64,), "max_num_seqs": 8}, "above --max-num-seqs"),
        ((), {"model": "m", "tp": (2,), "start_tp": 4}, "none of those offered"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    program: Path, arguments: tuple[str, ...], flags: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        _settled(program, *arguments, **flags)


def test_a_model_folder_tells_heads_and_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 12}), encoding="utf-8")
    (tmp_path / "a.safetensors").write_bytes(b"x" * 10)
    assert read_shape(str(tmp_path)) == ModelShape(12, 10.0)
    (tmp_path / "config.json").write_text('{"text_config": {"num_attention_heads": 6}}', encoding="utf-8")
    assert read_shape(str(tmp_path)).attention_heads == 6
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert read_shape(str(tmp_path)).attention_heads is None
    assert read_shape("nobody/such-model") == ModelShape()


def test_a_cached_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"num_attention_heads": 8}', encoding="utf-8")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert read_shape("some/model") == ModelShape(8, None)


def test_a_misspelt_flag_is_not_taken_for_one_of_vllms(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--model", "m", "--tpp", "2"]) == cli.EXIT_ERROR
    assert "--tpp" in capsys.readouterr().err


def test_an_absent_program_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["serve", "--model", "m", "--gpus", "none", "--vllm", str(tmp_path / "none")]
    assert cli.run([*arguments, "--run", str(tmp_path / "run")]) == cli.EXIT_ERROR
    assert "no such program" in capsys.readouterr().err


def test_serving_imports_nothing_heavy() -> None:
    code = (
        "import sys, rlgov.commands.serve, rlgov.engine.stack, rlgov.hardware.hardware, uvloop\n"
        "import rlgov.simulation.profile, rlgov.doctor.engine\n"
        "heavy = ('torch', 'gymnasium', 'pandas', 'scipy', 'numba')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
