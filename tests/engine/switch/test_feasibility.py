"""Which degrees can be had, on which GPUs, by which strategy, and for how long a failed one is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.engine.switch.feasibility import (
    GpuRoom,
    ModelShape,
    Refusals,
    aligned,
    choose_strategy,
    free_gpus,
    infeasible,
    pool_gpus,
)
from rlgov.engine.switch.machine import Strategy
from rlgov.errors import ConfigError

GPUS = tuple(f"GPU-{i}" for i in range(8))
degrees = st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True)


def test_reasons_name_what_is_in_the_way() -> None:
    shape = ModelShape(attention_heads=40, weight_bytes=140e9)
    found = infeasible((16, 8, 4, 3, 2, 1), 8, shape, GpuRoom(80e9, 0.9))
    assert found[16] == "TP 16 needs 16 GPUs, 8 are allotted"
    assert "does not divide the model's 40 attention heads" in found[3]
    assert "130 GiB" in found[1]
    assert set(found) == {16, 3, 2, 1}  # two GPUs hold the weights, but no KV cache beside them


def test_what_is_not_known_refuses_nothing() -> None:
    assert infeasible((4, 3), 4, ModelShape(), GpuRoom()) == {}


@pytest.mark.parametrize(
    ("wanted", "offered", "gpus", "chosen"),
    [
        (None, (2, 1), 0, Strategy.SIDE_BY_SIDE),
        (None, (2, 1), 4, Strategy.SIDE_BY_SIDE),
        (None, (4, 2), 4, Strategy.SLEEP),
        (None, (4,), 4, Strategy.SIDE_BY_SIDE),
        (Strategy.RESTART, (2, 1), 4, Strategy.RESTART),
        (Strategy.SIDE_BY_SIDE, (4, 2, 1), 4, Strategy.SIDE_BY_SIDE),  # 2 and 1 fit
    ],
)
def test_the_strategy_follows_from_the_room(
    wanted: Strategy | None, offered: tuple[int, ...], gpus: int, chosen: Strategy
) -> None:
    assert choose_strategy(wanted, offered, gpus) is chosen


def test_side_by_side_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="fit 4 GPUs side by side"):
        choose_strategy(Strategy.SIDE_BY_SIDE, (4, 2), 4)


@given(degrees)
def test_every_degree_has_a_place_of_its_size(offered: list[int]) -> None:
    places = pool_gpus(offered, GPUS)
    assert {degree: len(set(place)) for degree, place in places.items()} == {d: d for d in offered}
    if sum(offered) <= len(GPUS):
        taken = [uuid for place in places.values() for uuid in place]
        assert len(taken) == len(set(taken))


def test_free_gpus_are_those_nobody_uses() -> None:
    assert free_gpus(2, GPUS[:4], GPUS[:2]) == GPUS[2:4]
    assert free_gpus(3, GPUS[:4], GPUS[:2]) is None


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=8).map(sorted))
def test_a_refusal_doubles_up_to_its_longest_and_ends(times: list[float]) -> None:
    refusals = Refusals(60.0, 300.0)
    for at_s in times:
        refusals.refuse(2, "out of memory", at_s)
    length_s = min(60.0 * 2 ** (len(times) - 1), 300.0)
    last_s = times[-1]
    assert "out of memory" in refusals.active(last_s + 0.99 * length_s)[2]
    assert refusals.active(last_s + 1.01 * length_s) == {}
    refusals.forgive(2)
    refusals.refuse(2, "again", last_s)
    assert refusals.active(last_s + 61.0) == {}


def test_measured_figures_come_before_assumed_ones() -> None:
    assert aligned((4, 2), {2: 1.5}, (60.0, 60.0)) == (60.0, 1.5)
