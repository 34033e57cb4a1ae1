"""What can go wrong with the fake vLLM server: set by flags, a plan file or POST /fake/fault."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

START_FAILURES = {
    "oom": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. 1.10 GiB is free.",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    ),
    "kv": (
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    ),
    "port": ("OSError: [Errno 98] Address already in use",),
    "model": (
        "OSError: fake/model is not a local folder and is not a valid model identifier listed on the hub",
    ),
    "argument": ("vllm: error: unrecognized arguments: --no-such-argument",),
    "heads": (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "  Value error, Total number of attention heads (4) must be divisible by tensor parallel size (3).",
    ),
    "exit": (),
}


@dataclass
class Faults:
    """The present misbehaviour; the defaults are a healthy server."""

    hang: bool = False  # takes requests, answers /health, moves nothing
    health: str = "ok"  # ok, 503
    metrics: str = "ok"  # ok, empty, truncated, html, stale, 500, slow, nan
    plugin: str = "ok"  # ok, missing, refuse-cap, blind (tells no sample), 500, slow, garbage
    requests: str = "ok"  # ok, abort, done-only, empty, 500, 503, drop, silent
    count: int | None = None  # so many requests are affected, then `requests` is ok again; None: all
    drop_after_tokens: int = 1  # with requests=drop: the connection breaks after so many tokens
    slow_s: float = 30.0
    ignore_sigterm: bool = False
    drain: str = "ok"  # ok, stuck (in-flight requests never end), hollow (ends its engine, not itself)

    def update(self, changes: dict[str, Any]) -> None:
        """Change some. Raises ValueError for an unknown name."""
        known = {field.name for field in fields(self)}
        if unknown := set(changes) - known:
            raise ValueError(f"unknown fault {sorted(unknown)}; there are {sorted(known)}")
        for name, value in changes.items():
            setattr(self, name, value)

    def take_request_fault(self) -> str:
        """What becomes of the next request."""
        fault = self.requests
        if fault != "ok" and self.count is not None:
            self.count -= 1
            if self.count <= 0:
                self.requests, self.count = "ok", None
        return fault


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The arguments of ``vllm serve`` that matter, and the knobs of the fake; others are ignored."""
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("subcommand", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--shutdown-timeout", type=int, default=0)
    parser.add_argument("--scheduler-cls")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--api-key", nargs="+")
    parser.add_argument("--enable-sleep-mode", action="store_true")
    parser.add_argument("--fake-start-s", type=float, default=0.05)
    parser.add_argument("--fake-token-ms", type=float, default=5.0)
    parser.add_argument("--fake-prefill-us", type=float, default=1.0, help="time for one prompt token")
    parser.add_argument("--fake-kv-tokens", type=int, default=65536)
    parser.add_argument("--fake-wake-s", type=float, default=0.02)
    parser.add_argument("--fake-eos-after", type=int, help="without ignore_eos an answer stops here")
    parser.add_argument("--fake-children", type=int, default=1, help="processes like EngineCore and workers")
    parser.add_argument("--fake-detached-child", action="store_true", help="one child in its own session")
    parser.add_argument("--fake-no-plugin", action="store_true")
    parser.add_argument("--fake-runtime-config", action="store_true", help="offer PATCH /v1/runtime_config")
    parser.add_argument("--fake-fail", choices=sorted(START_FAILURES), help="do not start")
    parser.add_argument("--fake-exit-after-s", type=float, help="serve for a while, then exit with 1")
    parser.add_argument("--fake-fault", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument(
        "--fake-plan",
        type=Path,
        help='JSON file read at start that changes arguments by TP degree: {"2": {"fake_fail": "oom"}}',
    )
    known, _ignored = parser.parse_known_args(arguments)
    if known.fake_plan is not None and known.fake_plan.exists():
        plan = json.loads(known.fake_plan.read_text(encoding="utf-8"))
        for key in ("*", str(known.tensor_parallel_size)):
            for name, value in plan.get(key, {}).items():
                if not hasattr(known, name):
                    parser.error(f"unknown argument {name} in {known.fake_plan}")
                setattr(known, name, value)
    return known


def faults_from(known: argparse.Namespace) -> Faults:
    """The faults asked for at start."""
    faults = Faults()
    for setting in known.fake_fault:
        name, _, value = setting.partition("=")
        faults.update({name: json.loads(value)})
    return faults


def fail_at_start(kind: str) -> None:
    """Write a log as vLLM would, and exit with 1."""
    for line in (
        "INFO 09:00:00 [api_server.py:1] vLLM API server version 0.32.0",
        "(EngineCore pid=1) Traceback (most recent call last):",
        '(EngineCore pid=1)   File "vllm/v1/engine/core.py", line 1, in run_engine_core',
        *(f"(EngineCore pid=1) ERROR 09:00:01 [core.py:1] {line}" for line in START_FAILURES[kind][:1]),
        *START_FAILURES[kind][1:],
    ):
        print(line, file=sys.stderr, flush=True)  # noqa: T201  # the log is what this is about
    sys.exit(1)
