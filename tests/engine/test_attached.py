"""Attached to a fake vLLM that runs as a process of its own."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from rlgov.clock import SystemClock
from rlgov.deployments.attached import attach_live
from rlgov.deployments.live import LiveDeployment
from rlgov.deployments.live_parts import LiveSettings
from rlgov.errors import DeploymentError, EngineError
from rlgov.records import Configuration, Window
from rlgov.simulation.profile import load_profile

LIMITS = replace(load_profile("h100-qwen3-32b").limits(), interval_s=0.3)
FAST = replace(LIMITS.fastest, tp_degree=2)
SLOW = Configuration(1080, 16, 2)
START_S = 60.0
MANY = 100  # intervals that something may take on a loaded machine


class Gpus:
    """GPUs of the fake world, whose time stands still: no energy, but clocks that can be set."""

    def __init__(self, fake: ModuleType) -> None:
        self.world = fake.World()
        self.meter = fake.FakeMeter(self.world, present=False)
        self.clocks = fake.FakeClocks(self.world)
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def attached(url: str, gpus: Gpus, **more: Any) -> LiveDeployment:
    patient = LiveSettings(ready_timeout_s=START_S, poll_s=0.05)
    arguments: dict[str, Any] = {"tp_degree": 2, "settings": patient} | more
    return attach_live(url, LIMITS, SystemClock(), gpus=gpus, **arguments)


def complete(url: str, tokens: int) -> int:
    body = {"model": "fake/model", "prompt": [1, 2, 3], "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(  # noqa: S310  # loopback
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=START_S) as answer:  # noqa: S310  # as above
        count: int = json.loads(answer.read())["usage"]["completion_tokens"]
        return count


def plugin_cap(server: Any) -> int:
    request = urllib.request.Request(  # noqa: S310  # loopback
        f"{server.url}/rlgov/v1/state", headers={"Authorization": f"Bearer {server.token}"}
    )
    with urllib.request.urlopen(request, timeout=START_S) as answer:  # noqa: S310  # as above
        cap: int = json.loads(answer.read())["sample"]["batch_cap"]
        return cap


def test_traffic_clock_and_cap_of_a_foreign_engine(
    start_fake: Callable[..., Any], fake_stack: ModuleType
) -> None:
    server, gpus = start_fake("--fake-token-ms", "2", "--max-num-seqs", "256"), Gpus(fake_stack)
    with attached(server.url, gpus, token=server.token) as live, ThreadPoolExecutor(6) as clients:
        windows: list[Window] = [live.start(0)]
        assert (windows[0].configuration, windows[0].tp_refused) == (FAST, 0b101)
        windows.append(live.advance(SLOW))
        assert (windows[-1].batch_cap, windows[-1].sm_clock_mhz) == (16.0, 1080.0)
        assert plugin_cap(server) == 16
        answers = [clients.submit(complete, server.url, 20) for _ in range(6)]
        while sum(w.served for w in windows) < 6 and len(windows) < MANY:
            windows.append(live.advance(SLOW))
        assert [answer.result() for answer in answers] == [20] * 6
        seen = [w for w in windows if not w.blind]
        assert sum(w.served for w in seen) == 6
        assert sum(w.arrivals for w in seen) == 6
        assert sum(w.output_tokens for w in seen) == pytest.approx(120)
        assert {w.energy_j for w in windows} == {None}
        live.advance(replace(SLOW, tp_degree=4))  # refused: nothing to switch
    assert plugin_cap(server) == 256
    assert (gpus.world.lock_mhz, gpus.closed) == (None, 1)


def test_without_the_plugin_only_the_clock_moves(
    start_fake: Callable[..., Any], fake_stack: ModuleType
) -> None:
    server, gpus = start_fake(plugin=False), Gpus(fake_stack)
    with attached(server.url, gpus) as live:
        live.start(0)
        window = live.advance(SLOW)
    assert window.configuration == Configuration(1080, 256, 2)


def test_a_page_that_cannot_be_read_blinds_until_it_can(
    start_fake: Callable[..., Any], fake_stack: ModuleType
) -> None:
    server = start_fake()
    with attached(server.url, Gpus(fake_stack)) as live:
        live.start(0)

        def until(*, blind: bool) -> None:
            for _ in range(MANY):
                if bool(live.advance(FAST).blind) is blind:
                    return
            pytest.fail(f"the windows did not become {'blind' if blind else 'seen'}")

        until(blind=False)
        server.fault(metrics="500")
        until(blind=True)
        assert live.status.last_problem
        server.fault(reset=True)
        until(blind=False)


def test_what_cannot_be_attached_to_is_refused_with_the_remedy(
    start_fake: Callable[..., Any], free_port: Callable[[], int], fake_stack: ModuleType
) -> None:
    server, gpus = start_fake(), Gpus(fake_stack)
    with pytest.raises(EngineError, match=r"status 401.*RLGOV_PLUGIN_TOKEN"):
        attached(server.url, gpus, token="wrong")  # noqa: S106  # wrong on purpose
    server.fault(plugin="missing")
    with pytest.raises(EngineError, match="RLGOV_PLUGIN=1"):
        attached(server.url, gpus, token=server.token)
    with pytest.raises(DeploymentError, match="not 8; choose the profile"):
        attached(server.url, gpus, tp_degree=8)
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineError, match="cannot be reached"):
        attached(nobody, gpus, token="any")  # noqa: S106  # of nobody
    assert gpus.closed == 4
    impatient = LiveSettings(ready_timeout_s=0.5, poll_s=0.05)
    with (
        attached(nobody, gpus, settings=impatient) as live,
        pytest.raises(DeploymentError, match=r"did not get ready.*EngineUnread"),
    ):
        live.start(0)
