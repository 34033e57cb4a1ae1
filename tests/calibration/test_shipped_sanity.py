"""Every shipped profile simulates, and says nothing that a measurement of its card contradicts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.records import Window
from rlgov.simulation.insight import compare_clocks, isolated_latencies
from rlgov.simulation.physics import build_tables, effective_clock_index, iteration_energy_j, iteration_time_s
from rlgov.simulation.profile import Profile, load_profile, profile_names
from rlgov.workload.synthesis import SPECS, synthesize

# Decode of saturated batches, W per GPU: ML.ENERGY (H100 231-689, B200 294-976), Splitwise on A100.
# H200 has no rows: published aggregates speak of 137-300 W, other stacks; the H100's range is allowed.
DECODE_W = {"A100": (150, 400), "H100": (231, 700), "H200": (137, 700), "B200": (294, 1000)}


@pytest.fixture(params=profile_names(), scope="module")
def shipped(request: pytest.FixtureRequest) -> Profile:
    return load_profile(request.param)


def test_a_lone_request_takes_what_such_models_take(shipped: Profile) -> None:
    for alone in isolated_latencies(shipped, 4096):
        assert 0.003 < alone.tpot_s < 0.06
        assert 0.05 < alone.ttft_s < 2.0
    tpots = [alone.tpot_s for alone in isolated_latencies(shipped, 4096)]
    assert all(large < 1.05 * small for large, small in pairwise(tpots))


def test_decode_power_lies_where_the_card_was_measured(shipped: Profile) -> None:
    tables = build_tables(shipped)
    least, most = DECODE_W[shipped.gpu.name.split()[0]]
    for j, tp in enumerate(tables.tp_degrees.tolist()):
        for batch in (8, 64, 256):
            work = (batch, 800.0 * batch, 0.0, 0.0)
            k = effective_clock_index(tables, j, len(tables.grid_clocks_mhz) - 1, *work)
            watts = iteration_energy_j(tables, j, k, *work) / iteration_time_s(tables, j, k, *work) / tp
            assert least <= watts <= most, f"TP {tp}, batch {batch}"


def test_kv_fits_and_lower_clocks_save(shipped: Profile) -> None:
    assert min(shipped.limits().kv_capacity_tokens) > 8192
    for row in compare_clocks(shipped):
        assert 0.85 < row.throughput_ratio <= 1.0
        assert 0.65 < row.energy_ratio < 0.9


def _play(profile: Profile, rate_per_s: float, windows: int) -> list[Window]:
    spec = replace(SPECS["conversation"], rate_per_s=rate_per_s, duration_s=float(windows))
    trace = synthesize(spec, np.random.default_rng(0))
    deployment = SimulatedDeployment(profile, trace)
    first = deployment.start(0)
    return [first, *(deployment.advance(profile.limits().fastest) for _ in range(windows - 1))]


def test_a_minute_of_conversation_is_served_in_time_and_energy_adds_up(shipped: Profile) -> None:
    windows = _play(shipped, 1.0, 60)
    gpus, low, tdp = shipped.deployment.allotted_gpus, shipped.parameters.idle_low_w.value, shipped.gpu.tdp_w
    assert sum(w.served for w in windows) > 0.5 * sum(w.arrivals for w in windows) > 10
    assert sum(w.misses for w in windows) <= 0.05 * sum(w.arrivals for w in windows)
    for window in windows:
        assert window.energy_j is not None
        assert 0.9 * low * gpus <= window.energy_j / window.duration_s <= 1.001 * tdp * gpus


def test_load_costs_energy_and_time(shipped: Profile) -> None:
    calm, busy = _play(shipped, 0.5, 30), _play(shipped, 6.0, 30)

    def mean(windows: list[Window], name: str) -> float:
        return float(np.mean([value for w in windows if (value := getattr(w, name)) is not None]))

    for name in ("energy_j", "itl_mean_s", "running_mean", "output_tokens"):
        assert mean(busy, name) > mean(calm, name), name


def test_parameters_of_published_rows_say_how_well_they_hold(shipped: Profile) -> None:
    fitted = {name: p for name, p in shipped.parameters.items() if p.kind == "fitted"}
    assert bool(fitted) == ("by physics alone" not in shipped.description)
    assert all(
        (p.error is not None and "leave-one" in p.error) or name == "gemm_mfu" for name, p in fitted.items()
    )
