"""A study gives what single replays give, learns nothing from test spans, and states its bars honestly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.agents.baselines import FAMILIES, PolicyContext
from rlgov.agents.bundle import (
    SCHEMA_VERSION,
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
from rlgov.agents.playback import Figures, cut, figures, play
from rlgov.agents.policy import Policy
from rlgov.agents.replay import StaticPoint
from rlgov.agents.side_by_side import Entry, Episode, play_side_by_side
from rlgov.agents.study import run_study
from rlgov.agents.study_grid import CHUNK_LEAD_S, Cell, NotHoldable, Scenario, day_cell, trace_cell
from rlgov.agents.study_report import claim_figure, markdown, write_study
from rlgov.agents.study_result import LearnedSummary, StudyResult, estimate, scenario_result
from rlgov.config import StudySettings
from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.envs.observation import FEATURES, HIGH, LOW, OBSERVATION_SCHEMA
from rlgov.errors import BundleError, ConfigError
from rlgov.records import Configuration, Limits
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import Profile, load_profile
from rlgov.simulation.tables import PhysicsTables
from rlgov.workload.trace import Trace

SMALL = "h100-qwen3-8b"  # one GPU, so the fewest static settings
LARGE = "h100-qwen3-32b"


def make_trace(rate_per_s: float = 4.0, duration_s: float = 120.0, seed: int = 3) -> Trace:
    rng = np.random.default_rng(seed)
    count = int(rate_per_s * duration_s)
    arrival_s = np.sort(rng.uniform(0.0, duration_s, count))
    prompt, output = rng.integers(20, 1500, count), rng.integers(1, 120, count)
    return Trace("made", arrival_s, prompt, output, np.zeros(count, dtype=np.int64), duration_s)


def random_bundle(path: Path, limits: Limits, seed: int) -> Path:
    """A bundle that nobody trained; its actions vary."""
    rng = np.random.default_rng(seed)
    offer = Offer.of(limits)
    widths = (len(FEATURES), 32, sum(offer.sizes))
    layers = tuple(
        Layer(
            rng.normal(0.0, 0.7, (widths[i + 1], widths[i])).astype(np.float32),
            rng.normal(0.0, 0.5, widths[i + 1]).astype(np.float32),
        )
        for i in range(2)
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name="untrained",
        observation_schema=OBSERVATION_SCHEMA,
        features=tuple(FeatureRange(name=f.name, low=f.low, high=f.high) for f in FEATURES),
        offer=offer,
        network=NetworkLayout(widths=widths, activation="tanh", masked=True),
        profile_name="any",
        profile_digest="0" * 64,
        training_digest="1" * 64,
        samples=100,
        versions={},
    )
    seen = np.clip(LOW + rng.random((100, LOW.size)) * (HIGH - LOW), LOW, HIGH).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bundle(path, manifest, layers, ObservationStatistics.of(seen))
    return path


@pytest.fixture(scope="module")
def large() -> tuple[Profile, Limits, PhysicsTables]:
    profile = load_profile(LARGE)
    return profile, profile.limits(), build_tables(profile)


# Side by side ----------------------------------------------------------------------------------------


def test_side_by_side_gives_the_figures_of_single_replays_to_the_last_bit(
    large: tuple[Profile, Limits, PhysicsTables], tmp_path: Path
) -> None:
    profile, limits, tables = large
    context = PolicyContext(limits, tables)
    # every load is a low one, so it leaves for one GPU after a minute, within the counted span
    falling = {f"edge_{i}_tokens_per_s": 9e4 for i in (1, 2, 3)} | {"tp_degree_low": 1, "hold_s": 60.0}
    bundles = [random_bundle(tmp_path / f"{seed}.safetensors", limits, seed) for seed in (1, 2)]
    makers: list[Callable[[], Policy]] = [
        lambda: FAMILIES["two-level"].build({"guarded": True, "tp_degree": 2, "batch_cap": 64}, context),
        lambda: FAMILIES["ecofreq"].build({}, context),
        lambda: FAMILIES["load-lookup"].build(falling, context),
        lambda: BundlePolicy(load_bundle(bundles[0]), "a"),
        lambda: BundlePolicy(load_bundle(bundles[1]), "b"),
    ]
    trace = make_trace()
    episodes = (
        Episode(*cut(trace, interval_s=1.0, from_s=30.0, to_s=71.5, rate_scale=0.6)),
        Episode(*cut(trace, interval_s=1.0, from_s=60.0, rate_scale=2.5)),  # more than TP 1 can carry
    )
    together = play_side_by_side([Entry(make(), episodes) for make in makers], limits, tables)
    for make, played in zip(makers, together, strict=True):
        for episode, found in zip(episodes, played, strict=True):
            policy = make()
            deployment = SimulatedDeployment(
                profile, episode.trace, start=policy.start_configuration(limits), tables=tables
            )
            assert found == figures(play(deployment, policy, episode.schedule)), policy.name
    assert any(found.slo_attainment < 1.0 for played in together for found in played)
    assert any(found.switches > 0 for played in together for found in played)


def test_observations_are_for_learned_policies_only(large: tuple[Profile, Limits, PhysicsTables]) -> None:
    _, limits, tables = large
    context = PolicyContext(limits, tables)
    episodes = (Episode(*cut(make_trace(), interval_s=1.0, to_s=40.0)),)

    def run(*, observe: bool) -> list[tuple[Figures, ...]]:
        rules = ("kv-threshold", "ecofreq", "two-level", "load-lookup")
        entries = [Entry(FAMILIES[rule].build({}, context), episodes) for rule in rules]
        return play_side_by_side(entries, limits, tables, observe=observe)

    assert run(observe=True) == run(observe=False)


# The grid --------------------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(fraction=st.floats(0.3, 0.9), load=st.sampled_from([0.2, 0.5]))
def test_training_never_sees_a_request_of_the_test_span(
    large: tuple[Profile, Limits, PhysicsTables], fraction: float, load: float
) -> None:
    _, limits, tables = large
    base = make_trace()
    # every request can be told by its number of output tokens
    trace = replace(base, output_tokens=np.arange(1, len(base) + 1))
    cell = trace_cell(trace, 2.0, limits, tables, loads=(load,), train_fraction=fraction)
    assert isinstance(cell, Cell)
    (scenario,) = cell.scenarios
    in_training = {int(k) for episode in scenario.training for k in episode.trace.output_tokens}
    tested = scenario.test.trace.arrival_s >= scenario.test.schedule.lead_s
    in_test = set(scenario.test.trace.output_tokens[tested].tolist())
    assert in_training.isdisjoint(in_test)
    assert in_training | in_test == set(range(1, len(base) + 1))
    assert all(episode.schedule.lead_s <= CHUNK_LEAD_S for episode in scenario.training)


def test_the_days_of_training_are_not_the_day_of_the_test(
    large: tuple[Profile, Limits, PhysicsTables],
) -> None:
    _, limits, tables = large
    cell = day_cell(1.0, limits, tables)
    assert isinstance(cell, Cell)
    (scenario,) = cell.scenarios
    span_s = scenario.test.schedule.span_s
    assert span_s == 3600.0
    assert scenario.test.schedule.lead_s == 300.0
    arrival_s = scenario.test.trace.arrival_s - scenario.test.schedule.lead_s
    counts, _ = np.histogram(arrival_s, bins=12, range=(0.0, span_s))
    rates = counts / (span_s / 12) / cell.capacity
    assert rates[0] < 0.25  # night
    assert rates[-1] < 0.25
    assert 0.6 < rates.max() < 1.0  # day
    gaps = {tuple(np.diff(e.trace.arrival_s[:20])) for e in (scenario.test, *scenario.training)}
    assert len(gaps) == 1 + len(scenario.training)


def test_an_slo_that_cannot_be_held_is_told_with_its_reason(
    large: tuple[Profile, Limits, PhysicsTables],
) -> None:
    _, limits, tables = large
    cell = trace_cell(make_trace(), 0.01, limits, tables, loads=(0.2,), train_fraction=0.7)
    assert isinstance(cell, NotHoldable)
    assert "even at a 256th of the rate" in cell.why


# Figures against each other --------------------------------------------------------------------------


def figures_of(energy_j: float, slo_attainment: float) -> Figures:
    return Figures(energy_j, 1.0, slo_attainment, 100, 100, 0, 0.1, 0.2, 0.01, 0.02, 0)


@pytest.fixture(scope="module")
def cell() -> Cell:
    profile = load_profile(SMALL)
    made = trace_cell(
        make_trace(), 1.0, profile.limits(), build_tables(profile), loads=(0.2,), train_fraction=0.7
    )
    assert isinstance(made, Cell)
    return made


def statics_of(cell: Cell) -> list[StaticPoint]:
    slower = cell.limits.sm_clocks_mhz[3]
    return [
        StaticPoint(cell.limits.fastest, figures_of(1000.0, 1.0)),
        StaticPoint(replace(cell.limits.fastest, sm_clock_mhz=slower), figures_of(700.0, 0.992)),
        StaticPoint(Configuration(cell.limits.sm_clocks_mhz[-1], 8, 1), figures_of(300.0, 0.5)),
    ]


def compare(
    cell: Cell, scenario: Scenario, learned: dict[str, Figures], rules: dict[str, Figures]
) -> tuple[str | None, LearnedSummary]:
    """The best rule, and how the learned policies fare."""
    found = scenario_result(
        cell, scenario, statics_of(cell), {**rules, **learned}, tuple(learned), target_attainment=0.99
    )
    assert found.learned is not None
    return found.best_rule, found.learned


def test_only_a_rule_that_holds_the_target_can_be_the_best(cell: Cell) -> None:
    cheap, sound = {"cheap": figures_of(400.0, 0.98)}, {"sound": figures_of(690.0, 0.995)}
    learned = {f"seed{k}": figures_of(600.0 + k, 0.995) for k in range(5)}
    best_rule, summary = compare(cell, cell.scenarios[0], learned, cheap | sound)
    assert best_rule == "sound"
    assert summary.saving_vs_best_rule == estimate([1.0 - (600.0 + k) / 690.0 for k in range(5)])
    assert summary.saving_vs_rules["cheap"].mean == pytest.approx(1.0 - 602.0 / 400.0)
    assert summary.bars_missed == ()
    best_rule, summary = compare(cell, cell.scenarios[0], learned, cheap)
    assert (best_rule, summary.saving_vs_best_rule, summary.bars_missed) == (None, None, ())


def test_every_bar_that_is_missed_is_named(cell: Cell) -> None:
    learned = {"a": figures_of(750.0, 0.98996), "b": figures_of(760.0, 1.0)}
    _, summary = compare(cell, cell.scenarios[0], learned, {"sound": figures_of(700.0, 0.995)})
    assert [text.split()[:2] for text in summary.bars_missed] == [
        ["attainment", "98.99"],  # not 99.00
        ["vs", "fastest"],
        ["vs", "best"],
        ["vs", "sound"],
    ]


@pytest.mark.parametrize(
    ("load", "energy_j", "missed"),
    [
        (0.2, 650.0, ()),
        (0.2, 705.0, ("vs fastest 29.50 % < 30 %", "vs best static -0.71 % < 5 %")),
        (0.7, 705.0, ("vs best static -0.71 % < 5 %",)),  # 20 % is enough at the highest load
        (None, 650.0, ("vs best static 7.14 % < 15 %",)),  # a day that swings leaves more to gain
        (None, 590.0, ()),
    ],
)
def test_bars_follow_the_load(
    cell: Cell, load: float | None, energy_j: float, missed: tuple[str, ...]
) -> None:
    scenario = replace(cell.scenarios[0], load=load)
    _, summary = compare(cell, scenario, {"a": figures_of(energy_j, 1.0)}, {})
    assert summary.bars_missed == missed


def test_an_interval_needs_four_seeds_that_differ() -> None:
    assert estimate([0.1, 0.2, 0.3]).ci is None
    assert estimate([0.2] * 5).ci is None
    found = estimate([0.10, 0.12, 0.11, 0.13, 0.09])
    assert found.ci is not None
    assert found.ci[0] < found.mean < found.ci[1]
    assert found.mean == pytest.approx(0.11)


# The whole -------------------------------------------------------------------------------------------


def study_settings(folder: Path, **changes: object) -> StudySettings:
    return StudySettings.model_validate(
        {
            "trace": ["made.csv"],
            "bundle": [folder / f"seed{k}" / "policy.safetensors" for k in range(4)],
            "loads": [0.3, 0.7],
            "slo_scales": [1.0, 0.01],
            "budget": 3,
            "profile": SMALL,
            "day": False,
            "out": folder / "study",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult, list[str]]:
    folder = tmp_path_factory.mktemp("study")
    limits = load_profile(SMALL).limits()
    for k in range(4):
        random_bundle(folder / f"seed{k}" / "policy.safetensors", limits, k)
    told: list[str] = []
    result = run_study(study_settings(folder), [make_trace(duration_s=400.0)], told.append)
    return folder, result, told


def test_a_study_reports_every_scenario_and_what_cannot_be_held(
    studied: tuple[Path, StudyResult, list[str]],
) -> None:
    _, result, told = studied
    assert [(s.workload, s.slo_scale, s.load) for s in result.scenarios] == [
        ("made", 1.0, 0.3),
        ("made", 1.0, 0.7),
    ]
    assert [(cell.workload, cell.slo_scale) for cell in result.not_holdable] == [("made", 0.01)]
    assert any("cannot be held" in line for line in told)
    for scenario in result.scenarios:
        assert len(scenario.statics) == int(np.prod(load_profile(SMALL).limits().axis_sizes))
        names = [policy.name for policy in scenario.policies]
        assert names[:2] == ["fastest", "best-static"]
        assert {"random", "static-trained", "kv-threshold", "ecofreq", "two-level", "load-lookup"} < set(
            names
        )
        assert names[-4:] == ["seed0", "seed1", "seed2", "seed3"]
        assert scenario.learned is not None
        assert len(scenario.learned.saving_vs_fastest.values) == 4
    assert all(record.evaluations == 3 for record in result.tuned.values())


def test_a_rerun_tunes_nothing_and_gives_the_same_digest(
    studied: tuple[Path, StudyResult, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result, _ = studied

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    for name in ("tune_rule", "training_statics", "hold"):
        monkeypatch.setattr(f"rlgov.agents.study.{name}", never)
    again = run_study(study_settings(folder), [make_trace(duration_s=400.0)])
    assert again.digest == result.digest
    with pytest.raises(AssertionError):  # another budget is another search
        run_study(study_settings(folder, budget=4), [make_trace(duration_s=400.0)])


@pytest.mark.slow
def test_workers_do_not_change_the_digest(
    studied: tuple[Path, StudyResult, list[str]], tmp_path: Path
) -> None:
    folder, result, _ = studied
    spread = run_study(study_settings(folder, workers=2, out=tmp_path), [make_trace(duration_s=400.0)])
    assert spread.digest == result.digest


def test_the_files_of_a_study_hold_what_it_found(studied: tuple[Path, StudyResult, list[str]]) -> None:
    _, result, _ = studied
    paths = write_study(result)
    document = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert document["digest"] == result.digest
    assert len(document["scenarios"]) == 2
    rows = paths["policies"].read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + sum(len(scenario.policies) for scenario in result.scenarios)
    statics = paths["statics"].read_text(encoding="utf-8").splitlines()
    assert len(statics) == 1 + sum(len(scenario.statics) for scenario in result.scenarios)
    tables = markdown(result)
    assert paths["tables"].read_text(encoding="utf-8") == tables
    assert "| made | 30 % |" in tables
    assert "made: not holdable even at a 256th of its rate" in tables
    widths = {line.count("|") for line in tables.splitlines() if line.startswith("|")}
    assert widths == {11}
    assert paths["claim"].stat().st_size > 10_000


@pytest.mark.parametrize(("attainment", "hatched"), [(0.995, 0), (0.98, 1)])
def test_the_picture_marks_what_misses_the_target(
    studied: tuple[Path, StudyResult, list[str]], attainment: float, hatched: int
) -> None:
    scenario = studied[1].scenarios[0]
    assert scenario.learned is not None
    learned = replace(scenario.learned, attainment_min=attainment)
    axes = claim_figure([replace(scenario, learned=learned, best_static_holds=True)]).axes[0]
    assert sum(1 for bar in axes.patches if bar.get_hatch()) == hatched


def test_a_bundle_of_other_limits_is_refused_before_any_work(tmp_path: Path) -> None:
    for k in range(4):
        random_bundle(tmp_path / f"seed{k}" / "policy.safetensors", load_profile(LARGE).limits(), k)
    told: list[str] = []
    with pytest.raises(BundleError, match="trained"):
        run_study(study_settings(tmp_path), [make_trace()], told.append)
    assert told == []


def test_traces_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="equal name"):
        run_study(study_settings(tmp_path, bundle=[]), [make_trace(), make_trace()])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trace": []}, "nothing to study"),
        ({"loads": []}, "loads must be one or more"),
        ({"slo_scales": [1.0, 1.0]}, "slo_scales must be one or more different"),
    ],
)
def test_settings_that_make_no_study_are_refused(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        study_settings(tmp_path, **changes)
