from __future__ import annotations

from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.characterize.plan import Axes, Point, build_points, choose, order_tasks
from rlgov.characterize.workloads import (
    CLASSES,
    TraceLengths,
    closed_requests,
    length_class,
    open_requests,
)
from rlgov.errors import ConfigError
from rlgov.workload.trace import Trace

ALL = [length_class(name) for name in CLASSES]


def a_trace(n: int) -> Trace:
    tokens = np.arange(1, n + 1)
    return Trace("t", np.arange(n) / 2, tokens, tokens + 1, np.zeros(n, dtype=np.int64), float(n))


def some(values: st.SearchStrategy[int], most: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(values, min_size=1, max_size=most, unique=True).map(
        lambda chosen: tuple(sorted(chosen, reverse=True))
    )


AXES = st.builds(
    Axes,
    some(st.integers(200, 2000)),
    some(st.integers(1, 256)),
    some(st.sampled_from([1, 2, 4, 8])),
    st.booleans(),
    st.just(()) | some(st.integers(1, 64)),
    some(st.integers(1, 20)).map(lambda rates: tuple(rate / 4 for rate in rates)),
)


@settings(deadline=None, max_examples=60)
@given(AXES, st.lists(st.sampled_from(CLASSES), min_size=1, max_size=3, unique=True))
def test_the_grid_is_every_combination_once(axes: Axes, names: list[str]) -> None:
    points = build_points(axes, [length_class(name) for name in names])
    loads = len(axes.rates_per_s) + (axes.closed * max(len(axes.concurrencies), 1))
    grid = len(axes.sm_clocks_mhz) * len(axes.batch_caps) * len(axes.tp_degrees) * len(names)
    assert len(points) == grid * loads
    assert len({point.point_id for point in points}) == len(points)
    for point in points:
        assert (point.concurrency is None) != (point.rate_per_s is None)
        if point.mode == "closed" and not axes.concurrencies:
            assert point.concurrency == point.batch_cap


@settings(deadline=None, max_examples=60)
@given(AXES, st.integers(1, 3), st.integers(0, 2**32))
def test_the_order_has_every_task_once_and_each_tp_degree_in_one_piece(
    axes: Axes, repeats: int, seed: int
) -> None:
    points = build_points(axes, ALL[:2])
    tasks = order_tasks(points, repeats, seed)
    assert Counter(task.key for task in tasks) == Counter(
        (point.point_id, repeat) for point in points for repeat in range(repeats)
    )
    assert tasks == order_tasks(points, repeats, seed)
    runs = [tp for tp, _ in groupby(task.point.tp_degree for task in tasks)]
    assert len(runs) == len(set(runs))
    for _, group in groupby(tasks, lambda task: task.point.tp_degree):
        passes = [repeat for repeat, _ in groupby(task.repeat for task in group)]
        assert passes == sorted(set(passes))  # one repetition of every point before the next begins


def test_another_seed_gives_another_order() -> None:
    points = build_points(Axes((2, 1), (4, 2), (2, 1)), ALL)
    assert order_tasks(points, 1, 0) != order_tasks(points, 1, 1)


def test_an_id_is_of_what_the_point_is() -> None:
    point = Point("w", "l", "closed", 8, None, 1980, 8, 1)
    assert point.point_id == "26e6e3554770"  # written down: ids of old runs must not change
    assert Point("w", "l", "closed", 8, None, 1965, 8, 1).point_id != point.point_id


def test_what_is_not_offered_is_refused_with_what_is() -> None:
    assert choose((), (8, 32, 16), "batch caps") == (32, 16, 8)
    assert choose((8, 8, 16), (8, 32, 16), "batch caps") == (16, 8)
    with pytest.raises(ConfigError, match="batch caps 7 not offered here; choose among 32, 16, 8"):
        choose((8, 7), (8, 32, 16), "batch caps")
    with pytest.raises(ConfigError, match="offers no SM clocks"):
        choose((), (), "SM clocks")
    with pytest.raises(ConfigError, match="no class of lengths 'short-in/lng-out'"):
        length_class("short-in/lng-out")
    with pytest.raises(ConfigError, match="no load to measure under"):
        build_points(Axes((None,), (8,), (1,), closed=False), ALL)
    with pytest.raises(ConfigError, match="nothing to send"):
        build_points(Axes((None,), (8,), (1,)), [])
    with pytest.raises(ConfigError, match="no request in it"):
        TraceLengths(a_trace(0))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(CLASSES), st.floats(0.01, 2.0), st.integers(0, 99))
def test_lengths_lie_in_their_class_and_more_begin_with_the_same(name: str, scale: float, seed: int) -> None:
    lengths = length_class(name, scale)
    few, many = (lengths.draw(n, np.random.default_rng(seed)) for n in (50, 400))
    for less, more, middle in zip(few, many, (lengths.prompt_tokens, lengths.output_tokens), strict=True):
        assert np.array_equal(less, more[:50])
        assert less.min() >= 1
        assert np.abs(more - middle).max() <= max(0.5 * middle + 0.5, 1)
    assert (many[0] + many[1]).max() <= lengths.longest_tokens
    assert (lengths.name == name) == (scale == 1)


def test_requests_of_a_longer_load_begin_with_the_same() -> None:
    lengths = ALL[0]
    short, long = (closed_requests(lengths, 8, n, [1, 2]) for n in (20, 100))
    assert np.array_equal(short.output_tokens, long.output_tokens[:20])
    brief, lasting = (open_requests(lengths, 4.0, span_s, [1, 2]) for span_s in (10.0, 50.0))
    assert 15 <= len(brief) <= 70
    # What is drawn depends on the number of requests alone.
    assert np.array_equal(brief.arrival_s, lasting.arrival_s[: len(brief)])
    assert np.array_equal(brief.prompt_tokens, lasting.prompt_tokens[: len(brief)])


def test_the_first_users_of_a_closed_loop_are_out_of_step() -> None:
    trace = closed_requests(length_class("short-in/long-out"), 64, 256, [0])
    assert trace.output_tokens[:64].mean() < 0.65 * trace.output_tokens[64:].mean()
    assert trace.output_tokens.min() >= 1


def test_a_trace_goes_round_in_its_order() -> None:
    lengths = TraceLengths(a_trace(5))
    prompt, output = lengths.draw(12, np.random.default_rng(3))
    assert np.array_equal(output, prompt + 1)
    assert np.array_equal(np.diff(prompt) % 5, np.ones(11))
    assert (lengths.name, lengths.longest_tokens) == ("trace:t", 11)
