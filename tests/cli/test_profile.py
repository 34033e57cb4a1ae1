"""``rlgov profile``: created from files, shown and listed; errors that say what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlgov import cli
from rlgov.simulation.profile import load_profile

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "Llama-3.1-8B" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA), encoding="utf-8")
    return path


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert cli.run(["profile", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.run(["profile", *arguments]) == cli.EXIT_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_created_profile_loads_and_says_what_it_rests_on(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "mine.yaml"
    create = ["create", "--gpu", "h200", "--model", str(config), "--out", str(out), "--tp", "2,1"]
    report = _json(capsys, *create, "--slo-tpot-s", "0.05", "--name", "mine")
    assert report["parameters"] == 8_030_261_248
    assert report["tp_degrees"] == [2, 1]
    assert report["tpot_s"] == 0.05
    profile = load_profile(out)
    assert profile.name == "mine"
    assert profile.model.name == "Llama-3.1-8B"
    shown = _json(capsys, "show", str(out))
    assert shown["follows"]["kind"] == "physics alone"
    assert len(shown["follows"]["isolated"]) == 2
    assert shown["follows"]["kv_capacity_tokens"] == report["kv_capacity_tokens"]
    assert cli.run(["profile", "show", str(out)]) == 0
    assert "by physics alone" in capsys.readouterr().out
    assert "exists" in _refused(capsys, *create)
    assert _json(capsys, *create, "--force")["file"] == str(out)


def test_the_first_guess_serves_a_model_without_any_further_setting(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.yaml"
    report = _json(capsys, "create", "--gpu", "rtx-4090", "--model", str(config.parent), "--out", str(out))
    assert report["tp_degrees"] == [4, 2, 1]
    assert "sm_clock_max_mhz" in report["not_verified"]


def test_what_cannot_be_created_is_refused_with_the_remedy(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--model", str(config), "--out", str(tmp_path / "p.yaml")]
    assert "b200, h100-sxm, h200-sxm" in _refused(capsys, "create", "--gpu", "tpu", *rest)
    assert "4,2,1" in _refused(capsys, "create", "--gpu", "h100", *rest, "--tp", "four")
    assert "--slo-ttft-s" in _refused(capsys, "create", "--gpu", "h100", *rest, "--slo-ttft-s", "0")
    wrong = ["--model", str(config), "--out", str(tmp_path / "p.json")]
    assert ".yaml" in _refused(capsys, "create", "--gpu", "h100", *wrong)
    config.write_text(json.dumps({"model_type": "llama", "hidden_size": 4096}), encoding="utf-8")
    told = _refused(capsys, "create", "--gpu", "h100", *rest)
    assert str(config) in told
    for field in ("num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        assert field in told
    assert not (tmp_path / "p.yaml").exists()


def test_shipped_profiles_are_listed_with_what_they_rest_on(capsys: pytest.CaptureFixture[str]) -> None:
    listed = {row["name"]: row for row in _json(capsys, "list")}
    assert listed["h100-qwen3-32b"]["kind"] == "measured"
    assert listed["h100-qwen3-32b"]["model"] == "Qwen/Qwen3-32B"
    assert cli.run(["profile", "list"]) == 0
    assert "h100-qwen3-8b" in capsys.readouterr().out


def test_gpus_are_listed_with_what_is_not_verified(capsys: pytest.CaptureFixture[str]) -> None:
    table = _json(capsys, "gpus")
    assert table["h100-sxm"]["tdp_w"]["value"] == 700
    assert table["b200"]["sm_clock_max_mhz"]["checked"] is False
    assert cli.run(["profile", "gpus"]) == 0
    shown = capsys.readouterr().out
    assert "1965*" in shown
    assert set(table) <= set(shown.split())
