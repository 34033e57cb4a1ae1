"""The same requests sent by ``vllm bench serve``: an independent witness for the load generator's figures.

The vllm program runs as a process of its own and is never imported. It counts latencies from when it
really sent a request, so that is what both sides are compared in.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlgov.errors import DeploymentError
from rlgov.workload.load_result import Quantiles, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rlgov.config import LoadSettings
    from rlgov.workload.load_plan import LoadPlan
    from rlgov.workload.load_result import LoadResult

BLOCK_TOKENS = 16
START_ALLOWANCE_S = 600.0  # importing vLLM alone takes up to a minute on two cores
LOG_TAIL_LINES = 15
PER_REQUEST = ("input_lens", "output_lens", "ttfts", "latencies", "start_times", "errors")


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What ``vllm bench serve`` measured. Latencies count from the real send."""

    requests: int
    complete: int  # answered without an error
    exact: int  # with the prompt and output tokens of the plan
    ttft_s: Quantiles
    tpot_s: Quantiles
    e2e_s: Quantiles
    lateness_s: Quantiles  # of sends, against the plan, counted from its first send


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """Both results in the same terms; ``difference`` is load generator over vllm bench, minus one."""

    load: BenchResult
    bench: BenchResult
    difference: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """For cross_check.json and ``--json``."""
        return asdict(self)


def write_mooncake(plan: LoadPlan, path: Path) -> None:
    """Write a plan as JSONL in Mooncake's form: milliseconds, lengths and a hash for 16 prompt tokens each.

    Whole blocks of a common prefix have the hashes that other requests have there, too.
    """
    shared_blocks = -(-int(plan.prompt_tokens.max()) // BLOCK_TOKENS)
    following = shared_blocks
    with path.open("w", encoding="ascii") as file:
        for request in plan:
            blocks = -(-request.prompt_tokens // BLOCK_TOKENS)
            common = request.prefix_tokens // BLOCK_TOKENS
            own = range(following, following + blocks - common)
            following = own.stop
            row = {
                "timestamp": round(1000 * request.at_s, 3),
                "input_length": request.prompt_tokens,
                "output_length": request.output_tokens,
                "hash_ids": [*range(common), *own],
            }
            file.write(json.dumps(row) + "\n")


def bench_command(settings: LoadSettings, model: str, requests: int, trace: Path, result: Path) -> list[str]:
    """The command line that replays ``trace`` and writes ``result``."""
    command = [settings.vllm_program, "bench", "serve", "--backend", "openai"]
    command += ["--base-url", settings.url.rstrip("/").removesuffix("/v1"), "--model", model]
    command += [] if settings.tokenizer is None else ["--tokenizer", settings.tokenizer]
    command += ["--dataset-name", "timed_trace", "--dataset-path", str(trace)]
    command += ["--timed-trace-sec-multiplier", "0.001", "--timed-trace-chunk-hash-size", str(BLOCK_TOKENS)]
    command += ["--num-prompts", str(requests), "--temperature", "0", "--seed", str(settings.seed)]
    command += ["--save-result", "--save-detailed", "--disable-tqdm"]
    return [*command, "--result-dir", str(result.parent), "--result-filename", result.name]


def run_bench(
    plan: LoadPlan, settings: LoadSettings, model: str, environment: Mapping[str, str] | None = None
) -> BenchResult:
    """Replay a plan with ``vllm bench serve``. Its files and its log go to ``settings.out``.

    Args:
        plan: The requests.
        settings: The server, the vllm program and the tokenizer.
        model: The model's name at the server.
        environment: Of the process; this process's own if not given.

    Raises:
        DeploymentError: The program is missing, fails, takes too long or writes something unknown.
    """
    out = settings.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    trace, result, log = (
        out / name for name in ("vllm_bench_trace.jsonl", "vllm_bench.json", "vllm_bench.log")
    )
    write_mooncake(plan, trace)
    result.unlink(missing_ok=True)
    own = dict(os.environ if environment is None else environment)
    # A key in the environment would be sent to whatever server this is.
    key = own.get(settings.api_key_env) if settings.api_key_env else None
    own.pop("OPENAI_API_KEY", None)
    own |= {"PYTHONHASHSEED": str(settings.seed % 2**32)} | ({"OPENAI_API_KEY": key} if key else {})
    limit_s = plan.duration_s + settings.timeout_s + START_ALLOWANCE_S
    command = bench_command(settings, model, len(plan), trace, result)
    try:
        with log.open("wb") as file:
            done = subprocess.run(  # noqa: S603  # the operator names the program
                command, stdout=file, stderr=subprocess.STDOUT, env=own, check=False, timeout=limit_s
            )
    except subprocess.TimeoutExpired as error:
        raise DeploymentError(
            f"{settings.vllm_program} bench serve did not end within {limit_s:g} s; see {log}"
        ) from error
    except OSError as error:
        raise DeploymentError(
            f"{settings.vllm_program} cannot be run ({error.strerror}); name vLLM's program with "
            "--vllm-program"
        ) from error
    if done.returncode != 0 or not result.is_file():
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])
        raise DeploymentError(
            f"{settings.vllm_program} bench serve ended with {done.returncode}; correct what its log says "
            f"({log}):\n{tail}"
        )
    return read_bench(result, plan)


def read_bench(path: Path, plan: LoadPlan) -> BenchResult:
    """Read the detailed result of a replay of ``plan``. Raises DeploymentError when it is not one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        columns = [record[name] for name in PER_REQUEST]
        rows = list(zip(*columns, strict=True))
        if len(rows) != len(plan):
            raise DeploymentError(
                f"{path} holds {len(rows)} requests, not the {len(plan)} of the plan; run it again"
            )
        return _bench_result(rows, plan)
    except (ValueError, LookupError, TypeError) as error:
        raise DeploymentError(
            f"{path} is no detailed result of vllm bench serve ({error!r}); this reads what version 0.32 "
            "writes"
        ) from error


def _bench_result(rows: list[tuple[Any, ...]], plan: LoadPlan) -> BenchResult:
    ttft_s, tpot_s, e2e_s = [], [], []
    exact = complete = 0
    started = np.array([row[4] for row in rows])
    for request, (prompt, output, ttft, latency, _, error) in zip(plan, rows, strict=True):
        if error or not output:
            continue
        complete += 1
        exact += prompt == request.prompt_tokens and output == request.output_tokens
        ttft_s.append(ttft)
        e2e_s.append(latency)
        if output > 1:
            tpot_s.append((latency - ttft) / (output - 1))
    late_s = started - started[0] - (plan.at_s - plan.at_s[0])
    return BenchResult(
        requests=len(rows),
        complete=complete,
        exact=exact,
        ttft_s=Quantiles.of(ttft_s),
        tpot_s=Quantiles.of(tpot_s),
        e2e_s=Quantiles.of(e2e_s),
        lateness_s=Quantiles.of(late_s.tolist()),
    )


def in_bench_terms(result: LoadResult) -> BenchResult:
    """A load run's figures counted as ``vllm bench serve`` counts them: from the real send."""
    complete = [row for row in result.requests if row.verdict == Verdict.COMPLETE]
    lag_s = [row.dispatched_s - row.intended_s for row in result.requests if row.dispatched_s is not None]
    return BenchResult(
        requests=len(result.requests),
        complete=len(complete),
        exact=len(complete),
        ttft_s=Quantiles.of(_since_dispatch(row.first_token_s, row.dispatched_s) for row in complete),
        tpot_s=Quantiles.of(row.tpot_s for row in complete),
        e2e_s=Quantiles.of(_since_dispatch(row.finished_s, row.dispatched_s) for row in complete),
        lateness_s=Quantiles.of(late_s - lag_s[0] for late_s in lag_s),
    )


def _since_dispatch(at_s: float | None, dispatched_s: float | None) -> float | None:
    return None if at_s is None or dispatched_s is None else at_s - dispatched_s


def cross_check(result: LoadResult, bench: BenchResult) -> CrossCheck:
    """Set a load run and a replay by ``vllm bench serve`` side by side."""
    load = in_bench_terms(result)
    difference: dict[str, float | None] = {}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        mine, other = asdict(getattr(load, name)), asdict(getattr(bench, name))
        for point in ("p50", "p90", "p99"):
            known = mine[point] is not None and other[point]
            difference[f"{name}_{point}"] = mine[point] / other[point] - 1 if known else None
    return CrossCheck(load, bench, difference)
