from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.envs.action import ActionTable
from rlgov.records import Configuration, Limits, Window


@given(st.data())
def test_indices_configurations_and_rows_agree(limits: Limits, calm: Window, data: st.DataObject) -> None:
    table = ActionTable(limits)
    axes = st.tuples(*(st.integers(0, int(k) - 1) for k in table.nvec))
    index = np.array(data.draw(st.lists(axes, min_size=1, max_size=5)), dtype=np.int64)
    configurations = table.configurations(index)
    assert np.array_equal(table.indices(configurations), index)
    rows = np.stack(
        [
            replace(
                calm,
                sm_clock_mhz=float(c.sm_clock_mhz),
                batch_cap=float(c.batch_cap),
                tp_degree=float(c.tp_degree),
            ).to_row()
            for c in configurations
        ]
    )
    assert np.array_equal(table.in_force(rows), index)
    assert table.values(index).tolist() == [
        [c.sm_clock_mhz, c.batch_cap, c.tp_degree] for c in configurations
    ]


def test_index_zero_is_the_fastest(limits: Limits) -> None:
    assert ActionTable(limits).configurations(np.zeros((1, 3), dtype=np.int64)) == [limits.fastest]


@pytest.mark.parametrize(
    ("clock_mhz", "index"), [(3000.0, 0), (1980.0, 0), (1979.0, 1), (1.0, 5), (float("nan"), 0)]
)
def test_a_clock_between_two_settings_counts_as_the_lower(
    limits: Limits, calm: Window, clock_mhz: float, index: int
) -> None:
    row = replace(calm, sm_clock_mhz=clock_mhz).to_row()
    assert ActionTable(limits).in_force(row[None, :])[0, 0] == index


@given(st.lists(st.floats(), min_size=3, max_size=3))
def test_garbage_becomes_the_fastest_and_is_reported(limits: Limits, asked: list[float]) -> None:
    table = ActionTable(limits)
    index, outside = table.sanitised([asked])
    assert ((index >= 0) & (index < table.nvec)).all()
    for value, chosen, bad, size in zip(asked, index[0], outside[0], table.nvec, strict=True):
        valid = np.isfinite(value) and -1 < value < size
        assert bad == (not valid or int(value) != chosen)
        assert chosen == (int(value) if valid else 0)


def test_flat_mask_layout(limits: Limits) -> None:
    table = ActionTable(limits)
    assert table.offsets == (0, 6, 10, 13)
    assert table.size == 13
    assert Configuration(1000, 32, 1) in table.configurations(table.nvec[None, :] - 1)
