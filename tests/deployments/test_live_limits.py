from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.deployments.live_limits import live_limits, refused_bits
from rlgov.engine.samples import StackLimits
from rlgov.errors import DeploymentError
from rlgov.simulation.profile import load_profile

PROFILE = load_profile("h100-qwen3-32b").limits()
GPUS = ("a", "b", "c", "d")
STACK = StackLimits(
    model="Qwen/Qwen3-32B",
    batch_caps=(256, 128),
    tp_degrees=(4, 2, 1),
    gpu_uuids=GPUS,
    allotted_gpus=4,
    max_num_batched_tokens=PROFILE.max_num_batched_tokens,
    kv_capacity_tokens=(1_000_000, 0, 50_000),
    switch_s=(0.0, 7.5, 0.0),
    strategy="sleep",
)
CLOCKS = tuple(range(1980, 200, -15))


def offered(**changes: Any) -> Any:
    return live_limits(PROFILE, replace(STACK, **changes), CLOCKS)


def test_the_axes_are_the_profiles_and_measured_values_the_stacks() -> None:
    live = offered()
    assert live.limits.axis_sizes == PROFILE.axis_sizes
    assert live.limits.kv_capacity_tokens == (1_000_000, PROFILE.kv_capacity_tokens[1], 50_000)
    assert live.limits.switch_s == (PROFILE.switch_s[0], 7.5, PROFILE.switch_s[2])
    assert (live.limits.service_level, live.limits.interval_s) == (PROFILE.service_level, PROFILE.interval_s)
    assert (dict(live.never), live.notes) == ({}, ())


def test_a_degree_that_the_stack_does_not_offer_stays_on_the_axis_and_is_refused() -> None:
    live = offered(tp_degrees=(2,), kv_capacity_tokens=(5,), switch_s=(3.0,))
    assert live.limits.tp_degrees == (4, 2, 1)
    assert live.limits.kv_capacity_tokens == (PROFILE.kv_capacity_tokens[0], 5, PROFILE.kv_capacity_tokens[2])
    assert set(live.never) == {4, 1}
    assert all("offers TP degrees 2 only" in reason for reason in live.never.values())
    assert any("TP degree 4 is refused" in note for note in live.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_caps": (128, 64)}, "--max-num-seqs 256"),
        ({"gpu_uuids": ("a", "b")}, "4 GPUs, the stack was given 2"),
        ({"tp_degrees": (8,), "kv_capacity_tokens": (1,), "switch_s": (1.0,)}, "none in common"),
    ],
)
def test_what_nothing_could_tell_a_policy_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DeploymentError, match=message):
        offered(**changes)


def test_clocks_that_the_gpus_do_not_have_are_listed_with_the_nearest() -> None:
    others = tuple(clock for clock in CLOCKS if clock not in {1980, 600})
    with pytest.raises(DeploymentError, match=r"1980: nearest 1965, 1950, 1935; 600: nearest 615, 585"):
        live_limits(PROFILE, STACK, others)


def test_a_machine_without_gpus_or_clocks_is_let_through_and_says_so() -> None:
    live = live_limits(PROFILE, replace(STACK, gpu_uuids=(), allotted_gpus=4), ())
    assert live.limits.sm_clocks_mhz == PROFILE.sm_clocks_mhz
    assert "clocks cannot be set" in live.notes[0]


def test_another_token_budget_is_taken_and_noted() -> None:
    live = offered(max_num_batched_tokens=8192)
    assert live.limits.max_num_batched_tokens == 8192
    assert "8192" in live.notes[0]
    assert offered(max_num_batched_tokens=0).limits.max_num_batched_tokens == PROFILE.max_num_batched_tokens


@given(st.sets(st.sampled_from([4, 2, 1, 8])))
def test_every_refused_degree_has_its_bit(refused: set[int]) -> None:
    bits = int(refused_bits(PROFILE, refused))
    assert {tp for i, tp in enumerate(PROFILE.tp_degrees) if bits >> i & 1} == refused - {8}
