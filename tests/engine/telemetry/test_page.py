"""Metrics pages of several versions are read; damaged ones are errors, never wrong samples."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.engine.samples import EngineSample
from rlgov.engine.telemetry.page import MAX_PAGE_BYTES, is_of_engine, sample_from_page
from rlgov.errors import TelemetryError
from tests.fakes.metrics_page import GENERATIONS, Seen, render

PAGE = render()


def read(text: str) -> EngineSample:
    return sample_from_page(text, at_s=7.0, engine_id="e")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_pages_of_every_generation_say_the_same(generation: str) -> None:
    sample = read(render(generation=generation))
    assert sample.source == "metrics"
    assert (sample.at_s, sample.engine_id) == (7.0, "e@1000.000")
    assert (sample.running, sample.waiting, sample.kv_usage) == (3, 2, 0.25)
    assert (sample.generated_tokens, sample.prompt_tokens, sample.preemptions) == (1000, 500, 1)
    assert sample.finished == 7
    assert sample.token_gaps == 4
    assert sample.token_gap_s == pytest.approx(9.09)
    assert sample.iterations == 4
    assert sample.kv_capacity_tokens == 1024
    assert list(sample.histograms["ttft_s"].counts) == [0, 0, 1, 1, 2, 2, 2, 2, 2, 3]
    assert sample.histograms["e2e_s"].count == 2
    new = generation == "0.32"
    assert sample.prefill_tokens == (400 if new else 500)  # older ones do not tell prefix hits from work
    assert sample.failed == (9 if new else 3)
    assert ("tpot_s" in sample.histograms) == (generation in {"0.32", "0.11"})
    assert (sample.busy_s, sample.running_s, sample.waiting_tokens, sample.arrived) == (None,) * 4


def test_a_page_of_a_real_engine(shared_dir: Path) -> None:
    """vLLM 0.32.0 on the CPU, under load."""
    sample = read((shared_dir / "data" / "vllm_metrics_0.32.txt").read_text(encoding="utf-8"))
    assert (sample.running, sample.waiting) == (32, 28)
    assert (sample.generated_tokens, sample.prompt_tokens, sample.prefill_tokens) == (9083, 6283, 6283)
    assert (sample.finished, sample.failed, sample.preemptions) == (184, 0, 0)
    assert (sample.iterations, sample.token_gaps) == (516, 8867)
    assert sample.kv_capacity_tokens == 32768
    assert sample.engine_id == "e@1795410406.070"
    assert set(sample.histograms) == {"ttft_s", "tpot_s", "e2e_s", "queue_s", "token_gap_s"}
    ttft = sample.histograms["ttft_s"]
    assert ttft.count == 216
    assert ttft.sum == pytest.approx(3267.28, abs=0.01)


@pytest.mark.parametrize("name", ["0.32", "0.6", "real"])
def test_a_page_cut_anywhere_is_an_error_or_says_the_same(name: str, request: pytest.FixtureRequest) -> None:
    if name == "real":
        shared: Path = request.getfixturevalue("shared_dir")
        text = (shared / "data" / "vllm_metrics_0.32.txt").read_text(encoding="utf-8")
    else:
        text = render({"0": Seen(), "1": Seen(kv_usage=0.5)} if name == "0.32" else None, name)
    whole = read(text)
    lines = text.splitlines(keepends=True)
    errors = 0
    for end in range(len(lines)):
        try:
            cut = read("".join(lines[:end]))
        except TelemetryError:
            errors += 1
            continue
        # the size of the cache stands last; where it is gone it is unknown, not another
        assert cut.kv_capacity_tokens in {None, whole.kv_capacity_tokens}
        assert replace(cut, kv_capacity_tokens=whole.kv_capacity_tokens) == whole
    assert errors > len(lines) / 2


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_page_cut_within_a_line_is_an_error(data: st.DataObject) -> None:
    text = PAGE
    end = data.draw(st.integers(0, len(text) - 2))
    if text[end] == "\n":
        return
    with pytest.raises(TelemetryError, match=r"cut|empty"):
        read(text[: end + 1])


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_page_without_some_lines_is_an_error_or_keeps_its_counters(data: st.DataObject) -> None:
    """Lines lost in the middle, as by a proxy: what is told is as it was or less, never invented."""
    lines = PAGE.splitlines(keepends=True)
    gone = data.draw(st.sets(st.integers(0, len(lines) - 1), min_size=1, max_size=5))
    whole = read("".join(lines))
    try:
        sample = read("".join(line for i, line in enumerate(lines) if i not in gone))
    except TelemetryError:
        return
    assert (sample.running, sample.waiting, sample.generated_tokens) == (3, 2, 1000)
    assert sample.finished <= whole.finished
    for name, histogram in sample.histograms.items():
        assert histogram.count == whole.histograms[name].count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        (" \n\n", "empty"),
        ("<html><body>502 Bad Gateway</body></html>\n", "HTML"),
        ('{"error": "not found"}\n', "JSON"),
        ("OK\n", "not vLLM's"),
        ("# HELP up x\n# TYPE up gauge\nup 1\n", "num_requests_running"),
        (render() + "# EOF\nvllm:num_requests_running 1\n", "after its end mark"),
        (render() + render(), "twice"),
        ("a" * (MAX_PAGE_BYTES + 1), "characters"),
        ("a 1\n" * 60_000, "lines"),
    ],
)
def test_what_is_no_page_is_named(text: str, said: str) -> None:
    with pytest.raises(TelemetryError, match=re.escape(said)):
        read(text)


def test_an_end_mark_is_fine() -> None:
    assert read(render() + "# EOF\n") == read(PAGE)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("vllm:num_requests_running", "num_requests_running"),
        ("vllm:num_requests_waiting", "num_requests_waiting"),
        ("vllm:generation_tokens", "generation_tokens"),
        ("vllm:kv_cache_usage_perc", "kv_cache_usage_perc|gpu_cache_usage_perc"),
        ("vllm:time_to_first_token_seconds", "time_to_first_token_seconds"),
        ("vllm:request_success", "although requests have ended"),
    ],
)
def test_a_missing_family_is_named(family: str, said: str) -> None:
    lines = [line for line in render().splitlines(keepends=True) if family not in line]
    with pytest.raises(TelemetryError, match=re.escape(said)):
        read("".join(lines))


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "-1.0", "not-a-number", "1_000", ""])
def test_a_value_that_is_no_count_is_an_error(value: str) -> None:
    text, changed = re.subn(r"(generation_tokens_total\{[^}]*\}) .*", rf"\1 {value}", render())
    assert changed == 1
    with pytest.raises(TelemetryError):
        read(text)


@pytest.mark.parametrize(
    ("pattern", "line", "said"),
    [
        (r"\n(vllm:time_to_first_token_seconds_bucket\{[^}]*\+Inf[^\n]*)", "", "no bucket +Inf"),
        (r"\n(vllm:time_to_first_token_seconds_sum[^\n]*)", "", "no sum"),
        (r"(vllm:time_to_first_token_seconds_count\{[^}]*\}) 3.0", r"\1 4.0", "counts 4"),
        (r"(vllm:time_to_first_token_seconds_bucket\{[^}]*le=\"0.001\"[^}]*\}) 0.0", r"\1 3.0", "shrink"),
        (r'(vllm:time_to_first_token_seconds_bucket\{[^}]*le=)"0.001"', r'\1"few"', "le='few'"),
        (r"(vllm:kv_cache_usage_perc\{[^}]*\}) 0.25", r"\1 25.0", "another unit"),
        (r"(vllm:num_requests_waiting\{[^}]*)\}", r"\1", "Prometheus text"),
    ],
)
def test_a_page_that_contradicts_itself_is_an_error(pattern: str, line: str, said: str) -> None:
    text, changed = re.subn(pattern, line, render())
    assert changed == 1
    with pytest.raises(TelemetryError, match=re.escape(said)):
        read(text)


def test_labels_without_end_are_refused() -> None:
    flood = "".join(f'vllm:num_requests_running{{pod="{i}"}} 1\n' for i in range(30_000))
    with pytest.raises(TelemetryError, match="series"):
        read(render() + flood)


def test_data_parallel_engines_are_added_up_and_the_fullest_cache_counts() -> None:
    one = Seen()
    two = replace(one, running=5, kv_usage=0.75, generated_tokens=11, ttft_s=(0.2,), rejections=0)
    sample = read(render({"0": one, "1": two}))
    assert (sample.running, sample.waiting, sample.generated_tokens) == (8, 4, 1011)
    assert sample.kv_usage == 0.75
    assert (sample.finished, sample.failed) == (14, 12)
    assert sample.kv_capacity_tokens == 2048
    assert list(sample.histograms["ttft_s"].counts) == [0, 0, 1, 2, 3, 3, 3, 3, 3, 4]


def test_an_engine_that_lacks_a_family_is_an_error() -> None:
    lines = render({"0": Seen(), "1": Seen()}).splitlines(keepends=True)
    text = "".join(
        line for line in lines if not (line.startswith("vllm:request_queue") and 'engine="1"' in line)
    )
    with pytest.raises(TelemetryError, match="request_queue_time_seconds"):
        read(text)


def test_the_sample_of_a_new_process_has_another_name() -> None:
    assert read(render(started_s=1.5)).engine_id != read(render(started_s=1.75)).engine_id
    assert is_of_engine(read(PAGE).engine_id, "e")
    assert is_of_engine("e", "e")
    assert not is_of_engine("e2@1000.000", "e")
    without = read(render(started_s=None))  # told by when the counters were made
    assert is_of_engine(without.engine_id, "e")
    assert without.engine_id != "e"
    bare = "".join(
        line for line in render(started_s=None).splitlines(keepends=True) if "_created" not in line
    )
    assert read(bare).engine_id == "e"


def test_underscores_for_the_colon_and_counters_without_total_are_understood() -> None:
    text = render().replace("vllm:", "vllm_")
    assert read(text) == read(PAGE)
    text = "".join(
        re.sub(r"^(vllm:(?!iteration)\w+)_total\{", r"\1{", line)
        for line in render().splitlines(keepends=True)
    )
    assert read(text) == read(PAGE)


def test_before_the_first_request_of_the_old_engine() -> None:
    blank = Seen(ended={}, request_s=(), ttft_s=(), gap_s=(), tpot_s=())
    assert read(render({"0": blank}, "0.6")).finished == 0
