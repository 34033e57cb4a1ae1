"""What the administrator says, and who may say it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlgov.errors import ConfigError
from rlgov.hardware.keeper.options import default_socket, read_options
from rlgov.hardware.keeper.values import KeeperSettings


def written(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_without_a_word_everything_has_a_place() -> None:
    options = read_options([], {})
    assert options.settings == KeeperSettings()
    assert options.socket == Path("/run/rlgov/keeper.sock") == default_socket({})
    assert options.gpus is None
    assert options.action == "run"
    systemd = {"RUNTIME_DIRECTORY": "/run/one:/run/two", "RLGOV_CLAIMS_DIR": "/run/claims"}
    options = read_options([], systemd)
    assert (options.state_dir, options.claims_dir) == (Path("/run/one"), Path("/run/claims"))


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = written(
        tmp_path / "keeper.toml",
        'floor_mhz = 1000\nceiling_mhz = 1800\nlongest_lease_s = 5\ngpu = ["GPU-1"]\ngroup = "rlgov"\n'
        'socket = "/run/s"\nstate_dir = "/run/d"\nclaims_dir = "/run/c"\nrestore_clock_mhz = 1600\n',
    )
    options = read_options(["--config", path, "--floor-mhz", "1200", "--gpu", "GPU-2", "--gpu", "GPU-3"], {})
    assert options.settings == KeeperSettings(
        floor_mhz=1200, ceiling_mhz=1800, longest_lease_s=5.0, restore_clock_mhz=1600
    )
    assert options.gpus == ("GPU-2", "GPU-3")
    assert (options.group, options.socket, options.state_dir) == ("rlgov", Path("/run/s"), Path("/run/d"))
    assert read_options(["--config", path], {}).gpus == ("GPU-1",)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod go-w"):
        read_options(["--config", written(tmp_path / "keeper.toml", "", mode)], {})


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "keeper.toml", "")
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="chown root"):
        read_options(["--config", path], {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flor_mhz = 1000", "'flor_mhz' is no setting"),
        ("floor_mhz = 1000.5", "must be a whole number"),
        ("floor_mhz = true", "must be a whole number"),
        ("longest_lease_s = '3'", "must be a number"),
        ("gpu = 'GPU-1'", "must be a list"),
        ("gpu = [1]", "must be a list"),
        ("backend = 'dcgm'", "nvml or zeusd"),
        ("floor_mhz = ", "keeper.toml"),
        ("floor_mhz = 2000\nceiling_mhz = 1000", "lies above"),
        ("longest_lease_s = 14", "promises restored clocks within 15"),
        ("longest_lease_s = 0.5", "between 1 and 12"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_options(["--config", written(tmp_path / "keeper.toml", text)], {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_options(["--config", str(tmp_path / "nowhere.toml")], {})


@pytest.mark.parametrize(
    ("flags", "action", "named"),
    [
        (["--restore-all"], "restore_all", ()),
        (["--restore-left"], "restore_left", ()),
        (["--rearm"], "rearm", ()),
        (["--rearm", "GPU-1", "GPU-2"], "rearm", ("GPU-1", "GPU-2")),
        (["--status"], "status", ()),
    ],
)
def test_one_thing_at_a_time(
    flags: list[str], action: str, named: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    options = read_options(flags, {})
    assert (options.action, options.named) == (action, named)
    with pytest.raises(SystemExit):
        read_options([*flags, "--status" if action != "status" else "--rearm"], {})
    assert "not allowed with" in capsys.readouterr().err
