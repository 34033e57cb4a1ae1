"""Real processes that are killed, over the real NVML binding and a stand-in for the driver."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlgov.errors import HardwareError
from rlgov.hardware.keeper.errors import ForeignWriter, KeeperGone, KeeperRefused, LeaseLost
from rlgov.hardware.keeper.options import LONGEST_PROMISED_S
from tests.fakes.nvml import NvmlStub
from tests.hardware.keeper.site import Site, kill

ENDS = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP]


@pytest.fixture
def site(nvml_stub: NvmlStub, socket_dir: Path) -> Iterator[Site]:
    with Site(nvml_stub, socket_dir / "run") as made:
        yield made


@pytest.mark.parametrize("number", ENDS, ids=[number.name for number in ENDS])
def test_the_clocks_are_restored_whatever_ends_the_client(site: Site, number: signal.Signals) -> None:
    site.keeper()
    client = site.client(*site.stub.uuids[:2])
    assert None not in site.stub.locks_mhz()[:2]
    kill(client, number)
    assert site.wait_until(site.restored, LONGEST_PROMISED_S)


def test_the_clocks_are_restored_when_the_keeper_is_killed_and_starts_again(site: Site) -> None:
    keeper = site.keeper()
    client = site.client(*site.stub.uuids)
    kill(keeper, signal.SIGKILL)
    assert client.wait(60) != 0  # told that the keeper is gone
    assert None not in site.stub.locks_mhz()
    site.keeper()
    assert site.restored()  # before it serves anybody


def test_the_clocks_are_restored_when_both_are_killed_at_once(site: Site) -> None:
    keeper, client = site.keeper(), site.client(*site.stub.uuids)
    keeper.send_signal(signal.SIGKILL)
    client.send_signal(signal.SIGKILL)
    keeper.wait()
    assert None not in site.stub.locks_mhz()
    site.keeper()
    assert site.restored()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_keeper_that_is_asked_to_end_restores_first(site: Site, number: signal.Signals) -> None:
    keeper = site.keeper()
    site.client(*site.stub.uuids)
    kill(keeper, number)
    assert keeper.returncode == 0
    assert site.restored()
    assert not site.socket.exists()
    assert list(site.folder.glob("gpu-*.json")) == []


def test_what_a_killed_keeper_left_can_be_restored_without_a_keeper(site: Site) -> None:
    """What systemd's ExecStopPost does."""
    keeper = site.keeper("--restore-clock-mhz", "1605")
    client = site.client(site.stub.uuids[1])
    for process in (keeper, client):
        kill(process, signal.SIGKILL)
    done = site.run("--restore-all")
    assert done.returncode == 0, done.stderr
    assert site.stub.locks_mhz() == (None, 1605, None, None)
    writes = len(site.stub.writes)
    assert site.run("--restore-all").returncode == 0
    assert len(site.stub.writes) == writes


def test_what_a_dead_keeper_left_is_no_business_of_one_that_runs(site: Site) -> None:
    """What the unit at boot does, which may come late."""
    keeper, client = site.keeper(), site.client(site.stub.uuids[1])
    assert site.run("--restore-left").returncode == 0
    assert site.stub.locks_mhz()[1] is not None
    for process in (keeper, client):
        kill(process, signal.SIGKILL)
    assert site.run("--restore-left").returncode == 0
    assert site.restored()


def test_restore_all_says_what_it_could_not_restore(site: Site) -> None:
    keeper, client = site.keeper(), site.client(site.stub.uuids[1])
    for process in (keeper, client):
        kill(process, signal.SIGKILL)
    site.stub.fail("NO_PERMISSION", "nvmlDeviceResetGpuLockedClocks")
    done = site.run("--restore-all")
    assert done.returncode == 1
    assert site.stub.uuids[1] in done.stderr
    assert len(list(site.folder.glob("gpu-*.json"))) == 1
    site.stub.heal()
    assert site.run("--restore-all").returncode == 0
    assert site.restored()


def test_restore_all_and_rearm_reach_the_keeper_that_runs(site: Site) -> None:
    site.keeper()
    client = site.client(*site.stub.uuids[:2])
    assert site.run("--restore-all").returncode == 0
    assert site.restored()
    client.wait(60)
    clocks = site.clocks(*site.stub.uuids)
    with pytest.raises(ForeignWriter, match="administrator"):
        clocks.lock(1200)
    status = json.loads(site.run("--status").stdout)
    assert {gpu["phase"] for gpu in status["gpus"]} == {"yielded"}
    done = site.run("--rearm", *site.stub.uuids)
    assert site.stub.uuids[3] in done.stdout
    clocks.lock(1200)
    assert site.stub.locks_mhz() == (1200,) * 4
    clocks.close()


def test_without_a_keeper_the_program_says_so(site: Site) -> None:
    done = site.run("--status")
    assert done.returncode == 2
    assert "start rlgov-keeper" in done.stderr
    assert site.run("--rearm").returncode == 0  # nothing to re-arm


def test_two_keepers_do_not_run_together(site: Site, socket_dir: Path) -> None:
    site.keeper()
    done = site.run()
    assert done.returncode == 2
    assert "another keeper runs here" in done.stderr
    other = Site(site.stub, socket_dir / "other")
    with other:
        other.keeper()
        first, second = site.clocks(site.stub.uuids[0]), other.clocks(*site.stub.uuids[:2])
        first.lock(1200)
        with pytest.raises(KeeperRefused, match="rlgov-keeper, process"):
            second.lock(1500)
        assert site.stub.locks_mhz() == (1200, None, None, None)
        first.restore()
        second.lock(1500)
        assert site.stub.locks_mhz() == (1500, 1500, None, None)
        first.close()
        second.close()


DIRECT = """
import sys
from rlgov.clock import SystemClock
from rlgov.errors import HardwareError
from rlgov.hardware.hardware import open_hardware
with open_hardware(None, SystemClock()) as hardware:
    try:
        hardware.clocks.lock(1500)
    except HardwareError as error:
        print("refused:", error, flush=True)
    else:
        print("locked", flush=True)
    sys.stdin.readline()
"""


def _direct(site: Site) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", DIRECT],
        env=site.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    site.processes.append(process)
    return process


def _finish(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)


def test_a_keeper_and_a_direct_run_keep_off_each_others_gpus(site: Site) -> None:
    site.keeper()
    clocks = site.clocks(site.stub.uuids[1])
    clocks.lock(1200)
    direct = _direct(site)
    assert direct.stdout is not None
    assert "rlgov-keeper, process" in direct.stdout.readline()
    _finish(direct)
    assert site.stub.locks_mhz() == (None, 1200, None, None)
    clocks.restore()
    direct = _direct(site)
    assert direct.stdout is not None
    assert direct.stdout.readline() == "locked\n"
    with pytest.raises(KeeperRefused, match=r"set by another: rlgov, process \d+"):
        clocks.lock(1200)
    assert site.stub.locks_mhz() == (1500,) * 4
    _finish(direct)
    assert site.restored()
    clocks.lock(1200)
    clocks.close()


def test_a_client_lives_through_a_restart_of_its_keeper(site: Site) -> None:
    keeper = site.keeper()
    clocks = site.clocks(*site.stub.uuids)
    clocks.lock(1200)
    kill(keeper, signal.SIGKILL)
    assert not clocks.check().verified  # and does not raise
    with pytest.raises(KeeperGone, match="rlgov-keeper"):
        clocks.renew()
    assert clocks.lease_left_s is None
    assert clocks.check().asked_mhz is None
    clocks.renew()  # nothing is held, so there is nothing to say
    with pytest.raises(KeeperGone):
        clocks.lock(1200)
    site.keeper()
    assert site.restored()
    clocks.lock(1200)
    assert site.stub.locks_mhz() == (1200,) * 4
    clocks.restore()
    clocks.restore()
    assert site.restored()
    clocks.close()


def test_a_client_learns_that_its_lease_was_lost(site: Site) -> None:
    site.keeper("--longest-lease-s", "1")
    clocks = site.clocks(*site.stub.uuids)
    clocks.lock(1200)
    left_s = clocks.lease_left_s
    assert left_s is not None
    assert left_s <= 1.0
    assert site.wait_until(site.restored, LONGEST_PROMISED_S)
    with pytest.raises(LeaseLost, match="not renewed"):
        clocks.renew()
    clocks.lock(1395)
    assert site.stub.locks_mhz() == (1395,) * 4
    clocks.close()
    assert site.wait_until(site.restored, LONGEST_PROMISED_S)


def test_a_keeper_that_hangs_costs_a_client_one_wait(site: Site) -> None:
    keeper = site.keeper()
    clocks = site.clocks(*site.stub.uuids)
    clocks._link._timeout_s = 0.2
    clocks.lock(1200)
    clocks.close()
    clocks.lock(1200)  # on a new connection, which has the short limit
    kill(keeper, signal.SIGSTOP)
    with pytest.raises(KeeperGone, match="did not answer in time"):
        clocks.renew()
    with pytest.raises(KeeperGone, match="asked again in"):
        clocks.lock(1200)
    keeper.send_signal(signal.SIGCONT)
    assert site.wait_until(site.restored, LONGEST_PROMISED_S)
    clocks.close()


def test_clients_see_and_get_the_administrators_bounds(site: Site) -> None:
    settings = site.folder.parent / "keeper.toml"
    settings.write_text(
        f'gpu = ["{site.stub.uuids[0]}", "{site.stub.uuids[1]}"]\nfloor_mhz = 1300\nceiling_mhz = 1800\n'
    )
    settings.chmod(0o600)
    site.keeper("--config", str(settings), "--floor-mhz", "1400")
    clocks = site.clocks(*site.stub.uuids[:2])
    assert (clocks.supported_mhz[0], clocks.supported_mhz[-1]) == (1800, 1410)
    clocks.lock(1200)
    assert clocks.applied_mhz == clocks.check().asked_mhz == 1410
    assert site.stub.locks_mhz() == (1410, 1410, None, None)
    with pytest.raises(KeeperRefused, match="administrator"):
        site.clocks(site.stub.uuids[2])
    clocks.close()


def test_a_keeper_without_rights_does_not_start(site: Site) -> None:
    site.stub.state.unprivileged = 1
    done = site.run()
    assert done.returncode == 2
    assert "CAP_SYS_ADMIN" in done.stderr


def test_partitioned_and_shared_gpus_are_not_leased(site: Site) -> None:
    site.stub.gpu(1).mig = 1
    site.stub.gpu(2).virtualization = 3
    site.keeper()
    for uuid, why in ((site.stub.uuids[1], "MIG"), (site.stub.uuids[2], "shared")):
        with pytest.raises(KeeperRefused, match=why):
            site.clocks(uuid)
    site.clocks(site.stub.uuids[0]).close()
    assert site.stub.writes == ()


def test_gpus_are_leased_by_uuid_whatever_their_order(site: Site) -> None:
    site.keeper()
    clocks = site.clocks(site.stub.uuids[1])
    clocks.lock(1200)
    site.stub.shuffle([3, 2, 1, 0])
    site.wait_until(lambda: False, 0.3)
    clocks.lock(1500)
    assert site.stub.locks_mhz() == (None, 1500, None, None)
    clocks.close()


def test_a_gpu_that_is_lost_at_the_start_is_left_out(site: Site) -> None:
    site.stub.gpu(2).lost = 1
    site.keeper()
    clocks = site.clocks(site.stub.uuids[3])
    clocks.lock(1200)
    with pytest.raises(HardwareError, match="no GPU has the UUID"):
        site.clocks(site.stub.uuids[2])
    clocks.close()


def test_the_keeper_is_small_and_imports_the_binding_alone(site: Site) -> None:
    keeper = site.keeper()
    clocks = site.clocks(*site.stub.uuids)
    clocks.lock(1200)
    clocks.check()
    status = Path(f"/proc/{keeper.pid}/status").read_text(encoding="ascii")
    (resident_kb,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    assert resident_kb < 28_000  # about 19 MB on a quiet day; Python itself takes 11
    clocks.close()
    listing = (
        "import sys; before = set(sys.modules); import rlgov.hardware.keeper.main, pynvml; "
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(names - set(sys.stdlib_module_names) - {'rlgov'}))"
    )
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['pynvml']"


def test_rlgov_keeper_and_rlgov_hand_over_to_one_program() -> None:
    for command in (["-m", "rlgov", "keeper"], ["-m", "rlgov.hardware.keeper"]):
        done = subprocess.run(
            [sys.executable, *command, "--help"], capture_output=True, text=True, check=True, env=os.environ
        )
        assert "--restore-all" in done.stdout
    assert (
        "keeper"
        in subprocess.run(
            [sys.executable, "-m", "rlgov", "--help"], capture_output=True, text=True, check=True
        ).stdout
    )


def test_clocks_that_change_in_haste_are_set_all_the_same(site: Site) -> None:
    site.keeper()
    clocks = site.clocks(*site.stub.uuids)
    for mhz in (1200, 1500, 1200, 1980):
        clocks.lock(mhz)
        assert site.stub.locks_mhz() == (mhz,) * 4
    clocks.restore()
    clocks.lock(1200)
    clocks.close()


def test_somebody_elses_lock_is_left_and_told(site: Site) -> None:
    site.keeper()
    clocks = site.clocks(*site.stub.uuids[:2])
    clocks.lock(1200)

    def told() -> bool:
        try:
            clocks.renew()
        except ForeignWriter as error:
            assert error.gpus == (site.stub.uuids[0],)  # noqa: PT017  # it comes when it comes
            return True
        return False

    assert site.wait_until(lambda: clocks.check().verified and told() is False, 60)
    site.wait_until(lambda: "held" in str(clocks.state().gpus[0].verdict), 60)
    gpu = site.stub.gpu(0)
    gpu.locked_low_mhz = gpu.locked_high_mhz = 1605
    assert site.wait_until(told, 60)
    assert site.wait_until(lambda: site.stub.locks_mhz() == (1605, None, None, None), 60)
    with pytest.raises(ForeignWriter, match="--rearm"):
        clocks.lock(1200)
    assert clocks.check().asked_mhz is None
    clocks.rearm()
    clocks.lock(1200)
    assert site.stub.locks_mhz() == (1200, 1200, None, None)
    clocks.close()


def test_systemd_hears_that_it_is_ready_and_alive(site: Site, socket_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(socket_dir / "notify"))
        listener.settimeout(60)
        site.environment |= {"NOTIFY_SOCKET": str(socket_dir / "notify"), "WATCHDOG_USEC": "300000"}
        keeper = site.spawn("-m", "rlgov.hardware.keeper", "--state-dir", str(site.folder))
        assert listener.recv(1000).startswith(b"READY=1\nSTATUS=listening on")
        for _ in range(3):
            assert listener.recv(1000) == b"WATCHDOG=1"
        kill(keeper, signal.SIGTERM)
        last = b""
        while last != b"STOPPING=1":
            last = listener.recv(1000)


def test_the_socket_is_where_systemd_says(site: Site) -> None:
    site.environment["RUNTIME_DIRECTORY"] = str(site.folder)
    process = site.spawn("-m", "rlgov.hardware.keeper")
    assert site.wait_until(site.socket.exists, 60)
    kill(process, signal.SIGTERM)
    assert process.returncode == 0
