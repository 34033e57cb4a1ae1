"""`rlgov status` and `rlgov tell`, against a surface that listens."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlgov import cli
from rlgov.errors import DeploymentError
from rlgov.governor.client import SurfaceClient
from rlgov.governor.listen import TcpAddress, UnixAddress
from rlgov.governor.records import Command, CommandKind, Condition, Mode, Severity, Tick
from rlgov.governor.surface import Surface

MakeTick = Callable[..., Tick]

PATIENCE_S = 120
ENOUGH = 4
HEAVY = ("torch", "gymnasium", "pandas", "numba", "scipy", "matplotlib", "aiohttp", "tensorboard")


@pytest.fixture
def control(listening: Surface) -> str:
    address = listening.addresses[0]
    assert isinstance(address, UnixAddress)
    return str(address.path)


@pytest.fixture
def url(listening: Surface) -> str:
    address = listening.addresses[1]
    assert isinstance(address, TcpAddress)
    return str(address)


def test_status_shows_what_matters(
    listening: Surface,
    control: str,
    make_tick: MakeTick,
    make_condition: Callable[..., Condition],
    capsys: pytest.CaptureFixture[str],
) -> None:
    held = make_condition("Throttled", Severity.INFO)
    for _ in range(3):
        listening.publish(make_tick(conditions=(held,)))
    assert cli.run(["status", "--control", control]) == 0
    shown = capsys.readouterr().out
    for part in ("Qwen3-32B by learned", "shadow, not acting", "Throttled", "look into Throttled", "1,980"):
        assert part in shown
    assert "25.0 %" in shown  # would be saved
    assert "lease 2.5 s, held" in shown


def test_status_ends_with_1_when_not_ready(
    listening: Surface,
    url: str,
    make_tick: MakeTick,
    make_condition: Callable[..., Condition],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["status", "--url", url]) == 1
    assert "no window was seen yet" in capsys.readouterr().out
    listening.publish(make_tick(conditions=(make_condition("Tripped", Severity.CRITICAL),)))
    assert cli.run(["status", "--url", url]) == 1
    assert "not ready: Tripped" in capsys.readouterr().out
    listening.publish(make_tick(seen={"blind": 1.0, "energy_j": None}))
    assert cli.run(["status", "--url", url]) == 1
    assert "blind" in capsys.readouterr().out


def test_status_as_json_is_the_page(
    listening: Surface, control: str, make_tick: MakeTick, capsys: pytest.CaptureFixture[str]
) -> None:
    listening.publish(make_tick(decision=None, prediction=None, ood_score=None, reason="OBSERVED"))
    assert cli.run(["status", "--control", control, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tick"]["reason"] == "OBSERVED"
    assert cli.run(["status", "--control", control]) == 0  # with nothing decided
    assert "OBSERVED" in capsys.readouterr().out


def test_nobody_there_is_told_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["status", "--control", str(tmp_path / "none")]) == 2
    assert "start `rlgov govern`" in capsys.readouterr().err
    assert cli.run(["status", "--control", "a", "--url", "http://b"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert cli.run(["status", "--url", "ftp://b"]) == 2
    assert "no address of a governor" in capsys.readouterr().err


@pytest.fixture
def stranger() -> Iterator[str]:
    """The address of something that is no governor."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"schema": 99}' if self.path == "/status" else b"<html>")

        do_POST = do_GET  # noqa: N815  # the base class's spelling

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_no_governor_is_not_believed(stranger: str) -> None:
    client = SurfaceClient(stranger)
    with pytest.raises(DeploymentError, match="version 99"):
        client.status()
    with pytest.raises(DeploymentError, match="not as a governor does"):
        client.order(Command(CommandKind.REARM))


def test_orders_are_passed_on(listening: Surface, control: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tell", "active", "--control", control]) == 0
    assert "active: accepted" in capsys.readouterr().out
    assert cli.run(["tell", "rearm", "--control", control, "--json"]) == 0
    assert listening.commands() == (Command(CommandKind.MODE, Mode.ACTIVE), Command(CommandKind.REARM))


def test_orders_over_tcp_take_the_token_from_a_file(
    listening: Surface, url: str, token: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["tell", "shadow", "--url", url]) == 2
    assert "Authorization" in capsys.readouterr().err
    assert listening.commands() == ()
    path = tmp_path / "token"
    path.write_text(token, encoding="utf-8")
    path.chmod(0o600)
    assert cli.run(["tell", "shadow", "--url", url, "--token-file", str(path)]) == 0
    assert listening.commands() == (Command(CommandKind.MODE, Mode.SHADOW),)


def test_nonsense_is_no_order(control: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tell", "turbo", "--control", control]) == 2
    assert "turbo" in capsys.readouterr().err


def test_watching_goes_on_until_interrupted(listening: Surface, control: str, make_tick: MakeTick) -> None:
    listening.publish(make_tick())
    words = [sys.executable, "-m", "rlgov", "status", "--control", control, "--watch", "--every-s", "0.05"]
    for more in ([], ["--json"]):
        with subprocess.Popen([*words, *more], stdout=subprocess.PIPE, text=True) as process:
            kill = threading.Timer(PATIENCE_S, process.kill)  # instead of waiting forever
            kill.start()
            assert process.stdout is not None
            seen = 0
            for line in process.stdout:
                seen += "POLICY" in line
                if seen == ENOUGH:
                    break
            process.send_signal(signal.SIGINT)
            process.stdout.read()
            kill.cancel()
        kill.join()
        assert (seen, process.returncode) == (ENOUGH, cli.EXIT_INTERRUPTED)


def test_the_client_imports_nothing_heavy() -> None:
    code = f"""
import sys, rlgov.governor.client, rlgov.governor.terminal, rlgov.commands.status
sys.stdout.write(",".join(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_the_surface_imports_nothing_heavy() -> None:
    code = f"""
import sys, rlgov.governor.surface, rlgov.governor.tensorboard
heavy = set({HEAVY!r}) - {{"aiohttp"}}
sys.stdout.write(",".join(sorted(heavy & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_watching_on_a_terminal_waits_for_a_governor_that_is_gone(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "rlgov", "status", "--control", str(tmp_path / "none"), "--watch"]
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        kill = threading.Timer(PATIENCE_S, process.kill)
        kill.start()
        shown = b""
        with contextlib.suppress(OSError):  # what reading a terminal gives that nobody writes to any more
            while b"rlgov govern" not in shown:  # what to start
                shown += os.read(ours, 4096)
            process.send_signal(signal.SIGINT)
            while os.read(ours, 4096):
                pass
        kill.cancel()
    kill.join()
    os.close(ours)
    assert process.returncode == cli.EXIT_INTERRUPTED
