"""Failures that need more than a unit to show: every code of the driver, unknown territory, harmful policies,
disks that fail or hang, policies for something else, and what deciding costs. The list is tests/FAILURES.md.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rlgov.agents.baselines.ecofreq import EcoFreqPolicy, EcoFreqSettings
from rlgov.agents.bundle import (
    Bundle,
    BundlePolicy,
    FeatureRange,
    Layer,
    Manifest,
    NetworkLayout,
    ObservationStatistics,
    Offer,
    load_bundle,
    write_bundle,
)
from rlgov.agents.fallback import with_fallback
from rlgov.clock import VirtualClock
from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.envs.observation import FEATURES, OBSERVATION_SCHEMA
from rlgov.errors import BundleError
from rlgov.governor.adaptation import Adaptation, AdaptationSettings
from rlgov.governor.core import Core
from rlgov.governor.facts import Facts
from rlgov.governor.fitting import mismatches
from rlgov.governor.journal import RotationSettings, ThreadedJournal
from rlgov.governor.records import Command, CommandKind, Mode, Tick
from rlgov.governor.rivals import FileClaim
from rlgov.hardware.gpus import Gpu
from rlgov.hardware.nvml import NvmlError
from rlgov.simulation.forecast import Forecast
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.simulation.tables import PhysicsTables
from rlgov.workload.synthesis import SPECS, synthesize
from tests.fakes.nvml import NvmlStub

PROFILE = load_profile("h100-qwen3-32b")
LIMITS = PROFILE.limits()
TABLES = build_tables(PROFILE)
SLOWEST = (11, 0, 0)
T_S = 15.0
TRAINED_PER_S = (1.0, 2.0, 3.0)
DECISION_CEILING_S = 0.010
STUB_CLOCKS_MHZ = tuple(sorted({*LIMITS.sm_clocks_mhz, *range(1980, 180, -30)}, reverse=True))

# Every answer of NVML but success, by name; a test holds the list to the binding.
CODES = (
    "ALREADY_INITIALIZED", "ARGUMENT_VERSION_MISMATCH", "CORRUPTED_INFOROM", "DEPRECATED",
    "DRIVER_NOT_LOADED", "FREQ_NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "GPU_IS_LOST", "GPU_NOT_FOUND",
    "INSUFFICIENT_POWER", "INSUFFICIENT_RESOURCES", "INSUFFICIENT_SIZE", "INVALID_ARGUMENT", "INVALID_STATE",
    "IN_USE", "IRQ_ISSUE", "LIBRARY_NOT_FOUND", "LIB_RM_VERSION_MISMATCH", "MEMORY", "NOT_FOUND", "NOT_READY",
    "NOT_SUPPORTED", "NO_DATA", "NO_PERMISSION", "OPERATING_SYSTEM", "RESET_REQUIRED",
    "RESET_TYPE_NOT_SUPPORTED", "TIMEOUT", "UNINITIALIZED", "UNKNOWN", "VGPU_ECC_NOT_SUPPORTED",
)  # fmt: skip


class Always:
    """A rule that asks for one index for ever."""

    name = "always"
    guarded = True
    digest = ""

    def __init__(self, wish: tuple[int, int, int]) -> None:
        self.wish = wish

    def start_configuration(self, limits: Any) -> Any:
        return limits.fastest

    def start(self, limits: Any, n: int) -> None:
        """It keeps no state."""

    def decide(self, observation: Any, rows: Any, mask: Any) -> NDArray[np.int64]:  # noqa: ARG002  # the seam's
        return np.array([self.wish])


@dataclass
class Run:
    """What became of one simulated run."""

    ticks: list[Tick]
    observations: NDArray[np.float32]
    arrivals: float
    misses: float
    ttft_p99_s: float

    @property
    def missed(self) -> float:
        return self.misses / self.arrivals

    def share(self, what: Callable[[Tick], bool]) -> float:
        return sum(map(what, self.ticks)) / len(self.ticks)


def run(policy: Any, rate_per_s: float, *, tables: PhysicsTables | None = None, windows: int = 400) -> Run:
    """A governor on a simulated deployment, with nothing between them."""
    spec = replace(SPECS["conversation"], rate_per_s=rate_per_s, duration_s=float(windows))
    trace = synthesize(spec, np.random.default_rng(int(10 * rate_per_s)))
    deployment = SimulatedDeployment(PROFILE, trace, tables=tables)
    core = Core(LIMITS, policy, mode=Mode.ACTIVE)
    window, acting = deployment.start(0), True
    ticks: list[Tick] = []
    seen: list[NDArray[np.float32]] = []
    for _ in range(windows):
        tick = core.tick(window, Facts(now_s=window.start_s + 1.0, wall_s=0.0, acting=acting))
        ticks.append(tick)
        seen.append(core.observation[0].copy())
        acting = tick.acting
        assert tick.decision is not None
        window = deployment.advance(tick.decision.applied if acting else LIMITS.fastest)
    tails = [tick.window.ttft_p99_s for tick in ticks if tick.window.ttft_p99_s is not None]
    return Run(
        ticks,
        np.array(seen),
        sum(tick.window.arrivals for tick in ticks),
        sum(tick.window.misses for tick in ticks),
        float(np.quantile(tails, 0.99)),
    )


# --------------------------------------------------------------------------- 3: whatever the driver answers


def test_the_list_of_codes_is_the_bindings_own() -> None:
    pynvml = pytest.importorskip("pynvml")
    names = {name.removeprefix("NVML_ERROR_") for name in dir(pynvml) if name.startswith("NVML_ERROR_")}
    assert names - {"SUCCESS"} == set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_whatever_the_driver_answers_the_loop_goes_on_and_gives_back(
    govern: Callable[..., Any], code: str
) -> None:
    governed = govern((5, 0, 0))
    governed.tick(8)
    assert governed.world.lock_mhz is not None
    assert governed.world.lock_mhz < 1980

    def before(name: str) -> None:
        if name in {"lock", "renew", "check"}:
            raise NvmlError("nvmlDeviceSetGpuLockedClocks", code, "GPU-a")

    governed.world.before_call = before
    began_s = governed.world.clock.monotonic_s()
    governed.until(lambda _: governed.world.lock_mhz in {None, 1980}, 20)
    assert governed.world.clock.monotonic_s() - began_s <= T_S
    told = governed.tick(5)
    assert any(name.endswith(code) and count > 0 for name, count in told.actuation.failures.items())
    assert told.conditions
    assert all(condition.remedy for condition in told.conditions)


# --------------------------------------------------------------------------- 15: where it has never been


@cache
def bundle() -> Bundle:
    """A policy that wants a low clock always, trained on light load: right at home, and not elsewhere."""
    eco = EcoFreqPolicy(EcoFreqSettings(guarded=True), TABLES)
    seen = np.concatenate([run(eco, rate, windows=600).observations for rate in TRAINED_PER_S])
    choices = sum(LIMITS.axis_sizes)
    bias = np.zeros(choices, dtype=np.float32)
    bias[[6, LIMITS.axis_sizes[0], LIMITS.axis_sizes[0] + LIMITS.axis_sizes[1]]] = 5.0
    manifest = Manifest(
        schema_version=1,
        name="slow",
        observation_schema=OBSERVATION_SCHEMA,
        features=tuple(FeatureRange(name=f.name, low=f.low, high=f.high) for f in FEATURES),
        offer=Offer.of(LIMITS),
        network=NetworkLayout(widths=(len(FEATURES), choices), activation="tanh", masked=True),
        profile_name=PROFILE.name,
        profile_digest="0" * 64,
        training_digest="1" * 64,
        samples=len(seen),
        versions={},
    )
    layer = Layer(np.zeros((choices, len(FEATURES)), dtype=np.float32), bias)
    return Bundle(manifest, (layer,), ObservationStatistics.of(seen))


def guarded_policy() -> Any:
    return with_fallback(BundlePolicy(bundle()), TABLES, LIMITS)


def slower_tables() -> PhysicsTables:
    """Of a model that takes three times as long to do anything."""
    names = [name for name in PhysicsTables.__dataclass_fields__ if name.endswith(("memory_s", "compute_s"))]
    return replace(TABLES, **{name: 3.0 * getattr(TABLES, name) for name in names})


def test_on_a_deployment_three_times_as_slow_the_baseline_decides_and_serves_no_worse_than_alone() -> None:
    """Twice the trained load is in tests/agents/test_fallback.py."""
    tables = slower_tables()
    mixed = run(guarded_policy(), 3.0, tables=tables)
    alone = run(guarded_policy().baseline, 3.0, tables=tables)
    assert mixed.share(lambda tick: tick.baseline) > 0.5
    told = [{condition.name for condition in tick.conditions} for tick in mixed.ticks if tick.baseline]
    assert all("OutOfDistribution" in names for names in told)
    assert mixed.missed <= alone.missed + 0.02
    assert mixed.ttft_p99_s <= 1.2 * alone.ttft_p99_s


# --------------------------------------------------------------------------- 17: harmful where it is at home


def test_a_policy_that_always_takes_the_lowest_clock_does_bounded_harm() -> None:
    """Left alone it misses nearly every request; the guard lets it have a few, and then keeps it out."""
    spec = replace(SPECS["conversation"], rate_per_s=4.0, duration_s=600.0)
    alone = SimulatedDeployment(PROFILE, synthesize(spec, np.random.default_rng(40)))
    alone.start(0)
    windows = [alone.advance(LIMITS.configuration(SLOWEST)) for _ in range(600)]
    assert sum(w.misses for w in windows) > 0.9 * sum(w.arrivals for w in windows)
    held = run(Always(SLOWEST), 4.0, windows=600)
    assert held.missed < 0.1
    assert held.share(lambda tick: tick.reason == "TRIPPED") > 0.3
    # Every time serving burns, it is back within its limits soon.
    since = longest = 0
    for tick in held.ticks:
        since = since + 1 if tick.window.misses > 0.1 * max(tick.window.arrivals, 1.0) else 0
        longest = max(longest, since)
    assert longest <= T_S


# --------------------------------------------------------------------------- 21: disks


class FullDisk:
    """No room for anything."""

    def begin(self, header: str) -> None:  # noqa: ARG002  # the seam's
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "journal")

    write_line = begin

    def close(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "journal")


class ReadOnlyDisk(FullDisk):
    def begin(self, header: str) -> None:  # noqa: ARG002  # the seam's
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "journal")

    write_line = begin


class HangingDisk:
    """Writes do not come back until the test lets them."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def begin(self, header: str) -> None:  # noqa: ARG002  # the seam's
        self.released.wait()

    write_line = begin

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("kind", [FullDisk, ReadOnlyDisk, HangingDisk])
def test_a_disk_that_fails_or_hangs_changes_no_decision_and_is_told(
    govern: Callable[..., Any], kind: Callable[[], Any]
) -> None:
    disk = kind()
    journal = ThreadedJournal(disk, VirtualClock(), RotationSettings(queued=16))
    governed, other = govern((5, 0, 0), journal=journal), govern((5, 0, 0))
    try:
        governed.until(lambda tick: "JournalDropping" in {c.name for c in tick.conditions}, 20_000)
        other.tick(len(governed.ticks))
        assert [tick.decision for tick in governed.ticks] == [tick.decision for tick in other.ticks]
        assert journal.dropped > 0
        assert "free space" in next(
            c.remedy for c in governed.ticks[-1].conditions if c.name == "JournalDropping"
        )
    finally:
        if isinstance(disk, HangingDisk):
            disk.released.set()
        journal.close()


# --------------------------------------------------------------------------- 24, 26: something else


def gpu(name: str = "NVIDIA H100 80GB HBM3", tdp_w: float = 700.0) -> Gpu:
    return Gpu(
        uuid="GPU-a",
        name=name,
        architecture="hopper",
        driver_version="1",
        memory_bytes=80 << 30,
        power_limit_w=tdp_w,
        tdp_w=tdp_w,
        memory_clock_mhz=2619,
        sm_clocks_mhz=LIMITS.sm_clocks_mhz,
        mig=False,
        virtualization="none",
        persistence=True,
        compute_mode="default",
        energy_counter=True,
    )


def found(**changed: Any) -> tuple[str, ...]:
    known: dict[str, Any] = {"bundle": bundle(), "gpus": (gpu(),), "model": "Qwen/Qwen3-32B"}
    limits = changed.pop("limits", LIMITS)
    return mismatches(changed.pop("profile", PROFILE), limits, **(known | changed))


def test_what_belongs_together_is_let_through() -> None:
    assert found() == ()
    assert found(bundle=None, model="") == ()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"gpus": (gpu("NVIDIA A100-SXM4-80GB", 400.0),)}, "A100"),
        ({"gpus": (gpu("NVIDIA H200"),)}, "H200"),
        ({"gpus": (gpu(), gpu("NVIDIA H100 PCIe", 350.0))}, "350 W"),
        ({"model": "meta-llama/Llama-3.3-70B-Instruct"}, "Llama-3.3-70B"),
        ({"profile": load_profile("h100-qwen3-8b")}, "trained on profile"),
        ({"limits": replace(LIMITS, sm_clocks_mhz=LIMITS.sm_clocks_mhz[1:])}, "clock"),
        ({"limits": replace(LIMITS, interval_s=2.0)}, "interval"),
    ],
)
def test_a_policy_of_something_else_is_named_and_never_acts(
    govern: Callable[..., Any], changed: dict[str, Any], said: str
) -> None:
    reasons = found(**changed)
    assert any(said in reason for reason in reasons), reasons
    governed = govern((5, 0, 0), mismatches=reasons)
    governed.tick(10)
    assert governed.given_back
    assert "lock" not in governed.world.calls
    assert "BundleMismatch" in governed.names()


def test_a_flipped_byte_keeps_a_governor_from_starting(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    parts = bundle()
    write_bundle(path, parts.manifest, parts.layers, parts.statistics)
    load_bundle(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="sha256"):
        load_bundle(path)
    done = _govern(tmp_path, str(path), "--attach", "http://127.0.0.1:9", "--gpus", "none", environment={})
    assert done.returncode == 2
    assert "does not match its sha256" in done.stderr


def _govern(folder: Path, *words: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    places = ("--journal", str(folder / "journal"), "--listen", str(folder / "s"))
    return subprocess.run(
        [sys.executable, "-m", "rlgov", "govern", *words, *places],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("mig", 1, "MIG"), ("virtualization", 2, "vGPU"), ("name_bytes", b"NVIDIA A100-SXM4-80GB", "A100")],
)
def test_active_is_refused_on_shared_or_other_gpus(
    make_nvml_stub: Callable[..., NvmlStub], tmp_path: Path, field: str, value: Any, said: str
) -> None:
    stub = make_nvml_stub(4, clocks_mhz=STUB_CLOCKS_MHZ)
    for number in range(4):
        stub.gpu(number).name_bytes = b"NVIDIA H100 80GB HBM3"
        setattr(stub.gpu(number), field, value)
    done = _govern(
        tmp_path, "fastest", "--attach", "http://127.0.0.1:9", "--mode", "active", "--clocks", "direct",
        "--profile", PROFILE.name, environment=stub.environment,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert "--mode active is refused" in done.stderr
    assert said in done.stderr
    assert stub.writes == ()


class _OtherModel(BaseHTTPRequestHandler):
    """A server of another model, under a name that says nothing."""

    def do_GET(self) -> None:
        body = b'{"data": [{"id": "mine", "root": "meta-llama/Llama-3.3-70B-Instruct"}]}'
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_active_is_refused_where_an_attached_server_has_another_model(
    make_nvml_stub: Callable[..., NvmlStub], tmp_path: Path
) -> None:
    stub = make_nvml_stub(4, clocks_mhz=STUB_CLOCKS_MHZ)
    for number in range(4):
        stub.gpu(number).name_bytes = b"NVIDIA H100 80GB HBM3"
    with HTTPServer(("127.0.0.1", 0), _OtherModel) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        done = _govern(
            tmp_path, "fastest", "--attach", f"http://127.0.0.1:{server.server_port}", "--mode", "active",
            "--clocks", "direct", "--profile", PROFILE.name, environment=stub.environment,
        )  # fmt: skip
        server.shutdown()
    assert done.returncode == 2, done.stdout
    assert "the deployment serves meta-llama/Llama-3.3-70B-Instruct" in done.stderr
    assert stub.writes == ()


# --------------------------------------------------------------------------- 28: what deciding costs


def test_a_decision_costs_far_less_than_its_ceiling() -> None:
    """CPU time, not wall time: how busy the machine is does not count. Measured is about a tenth of it."""
    policy = guarded_policy()
    forecast = Forecast(TABLES, LIMITS)
    core = Core(
        LIMITS,
        policy,
        mode=Mode.ACTIVE,
        forecast=forecast,
        adaptation=Adaptation(AdaptationSettings(), LIMITS, forecast),
    )
    windows = [tick.window for tick in run(policy, 3.0, windows=150).ticks]
    before = resource.getrusage(resource.RUSAGE_THREAD)
    for window in windows:
        core.tick(window, Facts(now_s=window.start_s + 1.0, wall_s=0.0, acting=True))
    after = resource.getrusage(resource.RUSAGE_THREAD)
    spent_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent_s / len(windows) < DECISION_CEILING_S


def test_what_a_decision_took_is_in_its_tick(govern: Callable[..., Any]) -> None:
    governed = govern((5, 0, 0))
    governed.tick(3)
    assert all(tick.decision_duration_s >= 0.0 for tick in governed.ticks)
    assert json.dumps(governed.ticks[-1].overruns) == "0"


# --------------------------------------------------------------------------- 8: two governors


def test_a_second_governor_of_a_stack_does_not_act_until_the_first_is_gone(
    govern: Callable[..., Any], tmp_path: Path
) -> None:
    """On one world, so that whatever the second one did would show."""
    first_claim, second_claim = FileClaim(tmp_path / "c.governor"), FileClaim(tmp_path / "c.governor")
    first = govern((5, 1, 0), claim=first_claim)
    first.tick(10)
    assert first.ticks[-1].acting
    calls = len(first.world.calls)
    second = govern((9, 3, 0), world=first.world, claim=second_claim)
    for _ in range(10):
        second.tick()
        assert not second.ticks[-1].acting
        assert {"AnotherGovernor"} <= second.names()
    assert not {"lock", "configure", "restore"} & set(first.world.calls[calls:])
    assert f"process {os.getpid()}" in second.condition("AnotherGovernor")
    first.orders.append(Command(CommandKind.MODE, Mode.SHADOW))
    first.tick(2)
    assert first.given_back
    second.until(lambda tick: tick.acting, 3)
    assert "AnotherGovernor" not in second.names()
    first.orders.append(Command(CommandKind.MODE, Mode.ACTIVE))
    first.tick(3)
    assert "AnotherGovernor" in first.names()
    second_claim.give_up()
    first_claim.give_up()


CLAIMING = """
import pathlib, sys
from rlgov.governor.rivals import FileClaim
claim = FileClaim(pathlib.Path(sys.argv[1]))
print(repr(claim.take()), flush=True)
sys.stdin.read()
"""


def test_a_claim_ends_with_its_process_and_is_not_needed_where_it_cannot_be_made(tmp_path: Path) -> None:
    path = tmp_path / "c.governor"
    with subprocess.Popen(
        [sys.executable, "-c", CLAIMING, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "''"
        mine = FileClaim(path)
        assert mine.take() == f"process {other.pid}"
        other.kill()
        other.wait()
        assert mine.take() == ""
        assert mine.take() == ""
        mine.give_up()
        mine.give_up()
    assert FileClaim(tmp_path / "nowhere" / "c.governor").take() == ""
