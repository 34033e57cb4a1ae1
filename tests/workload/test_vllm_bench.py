from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.config import LoadSettings
from rlgov.errors import DeploymentError
from rlgov.workload.load_plan import LoadPlan, build_plan
from rlgov.workload.load_result import LoadResult, RequestResult, Verdict, summarize_load
from rlgov.workload.readers import read_trace
from rlgov.workload.trace import Trace
from rlgov.workload.vllm_bench import BLOCK_TOKENS, cross_check, read_bench, run_bench, write_mooncake

# Stands for the vllm program: checks its arguments and answers each row of the trace.
PROGRAM = """
import json, os, sys
words = sys.argv[1:]
said = dict(zip(words[2::1], words[3::1]))
assert words[:2] == ["bench", "serve"], words
if os.environ.get("FAKE_FAILS"):
    print("ValueError: no such model")
    sys.exit(3)
assert said["--dataset-name"] == "timed_trace" and said["--timed-trace-sec-multiplier"] == "0.001"
rows = [json.loads(line) for line in open(said["--dataset-path"])]
assert int(said["--num-prompts"]) == len(rows)
record = {
    "input_lens": [row["input_length"] for row in rows],
    "output_lens": [row["output_length"] for row in rows],
    "ttfts": [0.1] * len(rows),
    "latencies": [0.1 + 0.01 * (row["output_length"] - 1) for row in rows],
    "start_times": [5.0 + row["timestamp"] / 1000 for row in rows],
    "errors": [""] * len(rows),
    "environment": {k: os.environ.get(k) for k in ("OPENAI_API_KEY", "PYTHONHASHSEED")},
    "said": said,
}
with open(os.path.join(said["--result-dir"], said["--result-filename"]), "w") as file:
    json.dump(record, file)
"""


def _plan(prompt: list[int], prefix: list[int] | None = None) -> LoadPlan:
    count = len(prompt)
    trace = Trace(
        "t",
        np.arange(count, dtype=np.float64) * 0.5,
        np.array(prompt),
        np.arange(count) + 2,
        np.zeros(count, int) if prefix is None else np.array(prefix),
        count * 0.5,
    )
    return build_plan(trace, LoadSettings(url="http://server"))


def _settings(folder: Path, **changes: Any) -> LoadSettings:
    program = folder / "vllm"
    program.write_text(f"#!{sys.executable}\n{PROGRAM}", encoding="utf-8")
    program.chmod(0o755)
    usual: dict[str, Any] = {
        "url": "http://server/v1/",
        "vllm_program": str(program),
        "out": folder / "out",
        "seed": 7,
    }
    return LoadSettings(**(usual | changes))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=12))
def test_the_trace_file_holds_lengths_times_and_common_blocks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, float]]
) -> None:
    prompt = [tokens for tokens, _ in rows]
    prefix = [int(tokens * share) for tokens, share in rows]
    plan = _plan(prompt, prefix)
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    write_mooncake(plan, path)
    written = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert [row["timestamp"] for row in written] == [500.0 * index for index in range(len(rows))]
    assert [row["input_length"] for row in written] == prompt
    assert [row["output_length"] for row in written] == plan.output_tokens.tolist()
    own: set[int] = set()
    for row, hit in zip(written, prefix, strict=True):
        common = hit // BLOCK_TOKENS
        blocks = row["hash_ids"]
        assert len(blocks) == -(-row["input_length"] // BLOCK_TOKENS)
        assert blocks[:common] == list(range(common))
        assert own.isdisjoint(blocks[common:])
        own |= set(blocks[common:])
        assert min(own, default=10**9) >= max(hit // BLOCK_TOKENS for hit in prefix)


def test_the_trace_file_can_be_read_back_by_our_own_reader(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    # Mooncake's blocks have 512 tokens, ours 16, so only single-block prompts agree in both.
    write_mooncake(_plan([3, 9, 16]), path)
    again = read_trace(path)
    assert again.prompt_tokens.tolist() == [3, 9, 16]
    assert again.arrival_s.tolist() == [0.0, 0.5, 1.0]


def test_the_program_is_run_and_its_result_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not for this server")
    plan = _plan([5, 20, 33])
    settings = _settings(tmp_path, tokenizer="some/tokenizer")
    bench = run_bench(plan, settings, "the-model")
    assert (bench.requests, bench.complete, bench.exact) == (3, 3, 3)
    assert bench.ttft_s.p50 == pytest.approx(0.1)
    assert bench.tpot_s.p99 == pytest.approx(0.01)
    assert bench.lateness_s.max == pytest.approx(0.0)
    record = json.loads((settings.out / "vllm_bench.json").read_text(encoding="utf-8"))
    assert record["environment"] == {"OPENAI_API_KEY": None, "PYTHONHASHSEED": "7"}
    assert record["said"]["--base-url"] == "http://server"
    assert record["said"]["--tokenizer"] == "some/tokenizer"
    assert record["said"]["--model"] == "the-model"


def test_a_failing_program_is_told_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="no such model"):
        run_bench(_plan([5]), _settings(tmp_path), "m", {"FAKE_FAILS": "1"})


def test_a_missing_program_is_told_with_a_remedy(tmp_path: Path) -> None:
    settings = _settings(tmp_path, vllm_program=str(tmp_path / "none"))
    with pytest.raises(DeploymentError, match="--vllm-program"):
        run_bench(_plan([5]), settings, "m")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"input_lens": [1]}', "null"])
def test_a_strange_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DeploymentError, match="no detailed result"):
        read_bench(path, _plan([5]))


def _record(**changes: Any) -> dict[str, list[Any]]:
    usual: dict[str, list[Any]] = {
        "input_lens": [5, 6], "output_lens": [2, 3], "ttfts": [0.1, 0.3], "latencies": [0.2, 0.5],
        "start_times": [10.0, 10.6], "errors": ["", ""],
    }  # fmt: skip
    return usual | changes


def _read(folder: Path, record: dict[str, list[Any]]) -> Any:
    path = folder / "result.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    return read_bench(path, _plan([5, 6]))


def test_requests_of_another_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="holds 1 requests, not the 2"):
        _read(tmp_path, {name: column[:1] for name, column in _record().items()})


def test_failures_and_other_lengths_do_not_count_as_exact(tmp_path: Path) -> None:
    failed = _read(tmp_path, _record(errors=["", "boom"], output_lens=[2, 0]))
    assert (failed.complete, failed.exact, failed.ttft_s.count) == (1, 1, 1)
    other = _read(tmp_path, _record(input_lens=[5, 7]))
    assert (other.complete, other.exact) == (2, 1)
    assert other.lateness_s.max == pytest.approx(0.1)


def test_both_sides_count_from_the_real_send(tmp_path: Path) -> None:
    rows = tuple(
        RequestResult(
            index=index, intended_s=0.5 * index, verdict=Verdict.COMPLETE, prompt_tokens_asked=5 + index,
            output_tokens_asked=2 + index, prompt_tokens=5 + index, output_tokens=2 + index,
            dispatched_s=0.5 * index + 1.0, sent_s=0.5 * index + 1.0, first_token_s=0.5 * index + 1.2,
            finished_s=0.5 * index + 1.4,
        )
        for index in range(2)
    )  # fmt: skip
    result = LoadResult(
        trace="t", url="http://server", model="m", api="completions", seed=0, concurrency=None, started_s=0,
        started_wall_s=0, planned=2, trimmed=0, interrupted=False, notes=(), requests=rows,
        summary=summarize_load(rows, slo_ttft_s=1, slo_tpot_s=1),
    )  # fmt: skip
    assert result.summary.ttft_s.p50 == pytest.approx(1.2)
    checked = cross_check(result, _read(tmp_path, _record(ttfts=[0.1, 0.1])))
    assert checked.load.ttft_s.p50 == pytest.approx(0.2)
    assert checked.load.e2e_s.p50 == pytest.approx(0.4)
    assert checked.load.lateness_s.max == pytest.approx(0.0)
    assert checked.difference["ttft_s_p50"] == pytest.approx(1.0)
    assert json.loads(json.dumps(checked.to_json()))["bench"]["exact"] == 2
