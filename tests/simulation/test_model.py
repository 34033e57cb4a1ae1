"""Shapes of models: what they store, what an iteration reads of it, and what a token computes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlgov.simulation.model import Experts, LatentAttention, Model, WeightGroup, Window
from rlgov.simulation.physics import NOMINAL, Physics, build_tables, profile_physics
from rlgov.simulation.profile import Profile, load_profile

BATCHES = np.arange(513, dtype=np.float64)


def _model(**changes: object) -> Model:
    plain: dict[str, object] = {
        "name": "test",
        "layers": 48,
        "hidden": 2048,
        "heads": 32,
        "kv_heads": 4,
        "head_dim": 128,
        "parameters": 30.5e9,
        "lookup_parameters": 0.3e9,
        "bytes_per_weight": 2.0,
        "bytes_per_kv_value": 2.0,
        "source": "test",
    }
    return Model.model_validate(plain | changes)


MOE = _model(experts=Experts(count=128, per_token=8, parameters=29e9, bytes_per_weight=2.0))
LATENT = LatentAttention(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)


def _with(model: Model) -> Profile:
    base = load_profile("h100-qwen3-32b")
    return base.model_copy(update={"model": model, "decode_rows": ()})


def _physics(model: Model) -> Physics:
    return profile_physics(_with(model), NOMINAL)


def test_a_dense_model_reads_all_its_matrices_in_every_iteration() -> None:
    read = _model().weights_read_bytes(BATCHES)
    assert (read == 30.2e9 * 2).all()


def test_one_sequence_reads_the_experts_chosen_for_it_and_many_read_all() -> None:
    read = MOE.weights_read_bytes(BATCHES)
    dense = (30.5e9 - 0.3e9 - 29e9) * 2
    assert read[1] == pytest.approx(dense + 58e9 * 8 / 128)
    assert (np.diff(read[1:]) > 0).all()
    assert read[512] == pytest.approx(dense + 58e9, rel=1e-6)
    assert read[0] == pytest.approx(dense + 58e9)  # only prefills, which touch every expert


def test_a_token_computes_only_the_experts_chosen_for_it() -> None:
    assert MOE.active_parameters == pytest.approx(30.2e9 - 29e9 * 120 / 128)
    assert _physics(MOE).prefill_s(1) < 0.15 * _physics(_model()).prefill_s(1)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(2, 512), data=st.data())
def test_coverage_is_a_share_that_grows_with_the_tokens(count: int, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(1, count))
    share = Experts(count=count, per_token=chosen, parameters=1e9, bytes_per_weight=2).coverage(BATCHES)
    assert share[0] == 0
    assert share[1] == pytest.approx(chosen / count)
    assert (np.diff(share) >= 0).all()
    assert share[-1] <= 1


def test_a_latent_cache_is_small_and_held_by_every_gpu() -> None:
    model = _model(latent_attention=LATENT)
    assert model.kv_bytes_per_token == 48 * 576 * 2
    assert model.kv_copies(4) == 4
    assert _physics(model).kv_s(4) == pytest.approx(_physics(model).kv_s(1))
    assert _physics(model).kv_j(4) == pytest.approx(4 * _physics(model).kv_j(1))
    assert model.attention_flop_per_pair == 2 * 48 * 32 * (128 + 64 + 128)


def test_heads_are_copied_where_a_group_has_more_gpus_than_the_cache_has_heads() -> None:
    model = _model(kv_heads=2)
    assert [model.kv_copies(tp) for tp in (1, 2, 4)] == [1, 1, 2]
    assert _with(model).kv_capacity_blocks(4) < _with(_model(kv_heads=4)).kv_capacity_blocks(4) * 2


def test_layers_of_a_short_window_neither_grow_nor_read_more_with_the_context() -> None:
    model = _model(window=Window(tokens=128, layers=24))
    assert model.kv_bytes_per_token == _model().kv_bytes_per_token / 2
    assert model.window_kv_bytes == 24 * 128 * 2 * 4 * 128 * 2
    plain, windowed = (_physics(m).decode(1, np.array([16.0])) for m in (_model(), model))
    assert windowed.total_s[0] > plain.total_s[0]  # it reads the window whatever the context
    long_window = _model(window=Window(tokens=4096, layers=24))
    assert long_window.kv_bytes_per_token == _model().kv_bytes_per_token


def test_groups_of_weights_have_their_own_width() -> None:
    kept = (
        WeightGroup(name="lm_head", parameters=0.3e9, bytes_per_weight=2.0),
        WeightGroup(name="embedding", parameters=0.3e9, bytes_per_weight=2.0, lookup=True),
    )
    model = _model(bytes_per_weight=1.0, other_weights=kept)
    assert model.weight_bytes == pytest.approx(29.9e9 + 0.6e9 * 2)
    assert model.weights_read_bytes(BATCHES)[1] == pytest.approx(29.9e9 + 0.3e9 * 2)
    mixed = _model(
        experts=Experts(count=128, per_token=8, parameters=29e9, bytes_per_weight=0.53125),
    )
    assert mixed.weight_bytes == pytest.approx(1.5e9 * 2 + 29e9 * 0.53125)


def test_narrow_arithmetic_is_faster_where_the_card_has_units_for_it() -> None:
    narrow = _model(arithmetic="fp8")
    assert _physics(narrow).prefill_s(1) == _physics(_model()).prefill_s(1)  # the sheet names no fp8 peak
    profile = _with(narrow)
    gpu = profile.gpu.model_copy(update={"peak_fp8_flop_per_s": 2 * profile.gpu.peak_bf16_flop_per_s})
    physics = profile_physics(profile.model_copy(update={"gpu": gpu}))
    assert physics.prefill_s(1) == pytest.approx(_physics(_model()).prefill_s(1) / 2)
    assert physics.flop_j() == pytest.approx(_physics(_model()).flop_j() / 2)


def test_a_prefill_beside_decodes_reads_the_experts_they_left_untouched() -> None:
    tables = build_tables(_with(MOE))
    assert (tables.prefill_memory_s > 0).all()
    assert (build_tables(_with(_model())).prefill_memory_s == 0).all()
    chunk = _with(MOE).deployment.max_num_batched_tokens
    most_s = 58e9 / (3.35e12 * 0.93)
    assert 0 < tables.prefill_memory_s[-1] * chunk < most_s


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"experts": {"count": 4, "per_token": 8, "parameters": 1e9, "bytes_per_weight": 2}}, "per_token 8"),
        ({"experts": {"count": 8, "per_token": 2, "parameters": 31e9, "bytes_per_weight": 2}}, "whole"),
        ({"window": {"tokens": 128, "layers": 49}}, "window.layers"),
        ({"other_weights": [{"name": "e", "parameters": 1e9, "bytes_per_weight": 2, "lookup": True}]}, "e"),
    ],
)
def test_a_shape_that_contradicts_itself_is_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        _model(**changes)


def test_fields_of_later_are_written_only_where_they_say_something() -> None:
    plain = load_profile("h100-qwen3-8b").to_yaml()
    for name in ("experts", "window", "other_weights", "arithmetic", "peak_fp8_flop_per_s"):
        assert f"{name}:" not in plain
    written = MOE.model_dump(mode="json")
    assert Model.model_validate(written) == MOE
    assert set(written) - set(_model().model_dump()) == {"experts"}
