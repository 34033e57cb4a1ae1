"""Tables built from profiles: measured rows reproduced, physics that holds at every clock and draw."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.errors import ProfileError
from rlgov.simulation.physics import (
    ParameterDraw,
    build_tables,
    draw_parameters,
    effective_clock_index,
    iteration_energy_j,
    iteration_time_s,
)
from rlgov.simulation.profile import DecodeRow, Parameter, Profile, load_profile, profile_names
from rlgov.simulation.tables import PhysicsTables

PROFILES = {name: load_profile(name) for name in profile_names()}
TABLES = {name: build_tables(profile) for name, profile in PROFILES.items()}
ROWS = [(name, row) for name, profile in PROFILES.items() for row in profile.decode_rows]

work = st.tuples(
    st.integers(0, 256),  # decodes
    st.integers(0, 400_000),  # context tokens
    st.integers(0, 8192),  # prefill tokens
    st.integers(0, 30_000_000),  # pairs
)


def _drawn(profile: Profile, seed: int) -> PhysicsTables:
    return build_tables(profile, draw=draw_parameters(profile, np.random.default_rng(seed)))


def _reproduces(tables: PhysicsTables, row: DecodeRow) -> None:
    """Iteration time and power of a measured row, between the two whole batch sizes next to it."""
    j = tables.tp_degrees.tolist().index(row.tp_degree)
    k = len(tables.grid_clocks_mhz) - 1
    low, high = int(np.floor(row.batch)), int(np.ceil(row.batch))
    share = row.batch - low
    time_s = energy_j = 0.0
    for decodes, weight in ((low, 1.0 - share), (high, share)):
        context_tokens = row.context_tokens * row.batch
        time_s += weight * iteration_time_s(tables, j, k, decodes, context_tokens, 0, 0)
        energy_j += weight * iteration_energy_j(tables, j, k, decodes, context_tokens, 0, 0)
    assert time_s == pytest.approx(row.iteration_s, rel=0.005)
    assert energy_j / time_s / row.tp_degree == pytest.approx(row.power_w, rel=0.005)


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_measured_rows_are_reproduced_at_the_default_clock(name: str, row: DecodeRow) -> None:
    _reproduces(build_tables(PROFILES[name], max_batch=400), row)


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_changes_only_what_was_not_measured(seed: int) -> None:
    profile = PROFILES["h100-qwen3-32b"]
    drawn = build_tables(profile, max_batch=400, draw=draw_parameters(profile, np.random.default_rng(seed)))
    for row in profile.decode_rows:
        _reproduces(drawn, row)
    assert not np.array_equal(drawn.compute_energy_scale, TABLES[profile.name].compute_energy_scale)


def test_draws_stay_in_their_ranges_and_repeat_from_a_seed() -> None:
    profile = PROFILES["h100-qwen3-32b"]
    first = draw_parameters(profile, np.random.default_rng(7))
    assert first == draw_parameters(profile, np.random.default_rng(7))
    assert first != draw_parameters(profile, np.random.default_rng(8))
    ranges = dict(profile.parameters.items())
    assert all(ranges[name].low <= value <= ranges[name].high for name, value in first.values.items())
    assert {"voltage_at_max", "voltage_knee", "memory_clocked_share", "clock_delay_s", "wake_s"} <= set(
        first.values
    )


def test_a_draw_of_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ProfileError, match="magic"):
        build_tables(PROFILES["h100-qwen3-8b"], draw=ParameterDraw({"magic": 1.0}))


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("seed", range(6))
def test_tables_are_finite_and_non_negative(name: str, seed: int) -> None:
    tables = _drawn(PROFILES[name], seed)
    for field in dataclasses.fields(tables):
        values = np.asarray(getattr(tables, field.name), dtype=np.float64)
        assert np.isfinite(values).all(), field.name
        assert (values >= 0).all(), field.name
    assert (np.diff(tables.busy_w, axis=1) >= 0).all()
    assert (np.diff(tables.idle_w) >= 0).all()
    assert (np.diff(tables.memory_energy_scale) >= -1e-12).all()


@pytest.mark.parametrize("name", PROFILES)
def test_an_iterating_gpu_draws_more_than_an_idle_one(name: str) -> None:
    tables = TABLES[name]
    per_gpu_w = tables.busy_w / tables.tp_degrees[:, None]
    assert (per_gpu_w > tables.idle_w[None, :]).all()


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(PROFILES)), seed=st.integers(0, 10), load=work, data=st.data())
def test_a_higher_clock_is_never_slower_and_always_draws_more(
    name: str, seed: int, load: tuple[int, int, int, int], data: st.DataObject
) -> None:
    tables = _drawn(PROFILES[name], seed)
    j = data.draw(st.integers(0, len(tables.tp_degrees) - 1))
    clocks = range(0, len(tables.grid_clocks_mhz), 9)
    times = np.array([iteration_time_s(tables, j, k, *load) for k in clocks])
    powers = np.array([iteration_energy_j(tables, j, k, *load) for k in clocks]) / times
    assert (np.diff(times) <= 1e-15).all()
    assert (np.diff(powers) > 0).all()


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(PROFILES)), load=work, data=st.data())
def test_the_effective_clock_is_the_highest_within_tdp(
    name: str, load: tuple[int, int, int, int], data: st.DataObject
) -> None:
    tables = TABLES[name]
    j = data.draw(st.integers(0, len(tables.tp_degrees) - 1))
    k = data.draw(st.integers(0, len(tables.grid_clocks_mhz) - 1))
    effective = effective_clock_index(tables, j, k, *load)

    def power_w(index: int) -> float:
        return iteration_energy_j(tables, j, index, *load) / iteration_time_s(tables, j, index, *load)

    limit_w = tables.tdp_w * float(tables.tp_degrees[j])
    assert effective <= k
    assert power_w(effective) <= limit_w * (1 + 1e-12)
    if effective < k:
        assert power_w(effective + 1) > limit_w


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(PROFILES)), load=work, extra=st.integers(1, 1000))
def test_more_work_takes_longer_and_costs_more(
    name: str, load: tuple[int, int, int, int], extra: int
) -> None:
    tables = TABLES[name]
    k = len(tables.grid_clocks_mhz) - 1
    for place in (1, 2, 3):
        more = list(load)
        more[place] += extra
        now, then = load, (more[0], more[1], more[2], more[3])
        assert iteration_time_s(tables, 0, k, *then) >= iteration_time_s(tables, 0, k, *now)
        assert iteration_energy_j(tables, 0, k, *then) > iteration_energy_j(tables, 0, k, *now)


@pytest.mark.parametrize("name", PROFILES)
def test_decode_grows_with_the_batch(name: str) -> None:
    tables = TABLES[name]
    total_s = tables.decode_memory_s + tables.decode_compute_s + tables.decode_comm_s
    # Neighbouring rows of small batches are measured as equal, to about this.
    assert (np.diff(total_s[:, 1:], axis=1) > -0.01 * total_s[:, 1:-1]).all()
    for batch in (2, 8, 32, 128):
        assert (total_s[:, 2 * batch] > total_s[:, batch]).all()


def test_tables_keep_no_last_bits() -> None:
    values = TABLES["h100-qwen3-32b"].decode_memory_s
    assert not (np.ascontiguousarray(values).view(np.int64) & 0xFF).any()


def test_a_larger_batch_extends_the_tables_without_changing_them() -> None:
    profile = PROFILES["h100-qwen3-8b"]
    small, large = TABLES[profile.name], build_tables(profile, max_batch=512)
    assert large.decode_memory_s.shape[1] == 513
    np.testing.assert_array_equal(small.decode_memory_s, large.decode_memory_s[:, :257])


def test_low_clocks_slow_memory_too() -> None:
    tables = TABLES["h100-qwen3-32b"]
    clocks = tables.grid_clocks_mhz.tolist()
    assert tables.memory_scale[clocks.index(900)] == 1.0
    assert tables.memory_scale[clocks.index(420)] == pytest.approx(0.43 * 1980 / 420)


def test_prompts_cost_an_iteration_more_where_that_was_measured() -> None:
    plain = load_profile("h100-qwen3-8b")
    overhead = Parameter(value=2e-3, low=1e-3, high=3e-3, kind="measured", source="a test")
    parameters = plain.parameters.model_copy(update={"prompt_overhead_s": overhead})
    costly = build_tables(plain.model_copy(update={"parameters": parameters}))
    tables = build_tables(plain)
    top = len(tables.grid_clocks_mhz) - 1

    for decodes, prefill, more_s in ((4, 0, 0.0), (4, 1, 2e-3), (0, 500, 2e-3)):
        work = (0, top, decodes, 900.0, float(prefill), 10.0)
        assert iteration_time_s(costly, *work) == pytest.approx(iteration_time_s(tables, *work) + more_s)
    assert "prompt_overhead_s" not in plain.to_yaml()
