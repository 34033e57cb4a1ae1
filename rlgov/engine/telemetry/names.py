"""What vLLM calls the metrics that are read here, over its versions.

The V0 engine (0.6 to 0.9) and the V1 engine before 0.11 used older spellings of some; exporters that turn
``vllm:`` into ``vllm_``, and counters with or without ``_total``, are understood too.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

PREFIXES: Final = ("vllm:", "vllm_")
PROCESS_START: Final = "process_start_time_seconds"
PROCESS_CPU: Final = "process_cpu_seconds_total"
"""Wall time at which the exporting process began; tells a restart from a counter that went on."""


class Kind(Enum):
    """How the samples of a family are named and put together."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric.

    ``spellings`` are without prefix, newest first; the first that a page has is taken. ``sentinel``: without
    it the page is not vLLM's. ``required``: every known version has it, so a page without it was cut.
    """

    name: str
    kind: Kind
    spellings: tuple[str, ...]
    sentinel: bool = False
    required: bool = True


FAMILIES: Final[tuple[Family, ...]] = (
    Family("running", Kind.GAUGE, ("num_requests_running",), sentinel=True),
    Family("waiting", Kind.GAUGE, ("num_requests_waiting",), sentinel=True),
    Family("generated_tokens", Kind.COUNTER, ("generation_tokens",), sentinel=True),
    Family("kv_usage", Kind.GAUGE, ("kv_cache_usage_perc", "gpu_cache_usage_perc")),
    Family("prompt_tokens", Kind.COUNTER, ("prompt_tokens",)),
    Family("prompt_tokens_by_source", Kind.COUNTER, ("prompt_tokens_by_source",), required=False),
    Family("preemptions", Kind.COUNTER, ("num_preemptions",)),
    # One series a reason; V0 makes each when it is first needed, so it may be absent until a request ends.
    Family("ended", Kind.COUNTER, ("request_success",), required=False),
    Family("rejections", Kind.COUNTER, ("admission_rejections",), required=False),
    Family("iteration_tokens", Kind.HISTOGRAM, ("iteration_tokens_total",), required=False),
    Family("ttft_s", Kind.HISTOGRAM, ("time_to_first_token_seconds",)),
    # 0.10 to 0.12 have both and mean the same with them.
    Family("token_gap_s", Kind.HISTOGRAM, ("inter_token_latency_seconds", "time_per_output_token_seconds")),
    Family("tpot_s", Kind.HISTOGRAM, ("request_time_per_output_token_seconds",), required=False),
    Family("e2e_s", Kind.HISTOGRAM, ("e2e_request_latency_seconds",)),
    Family("queue_s", Kind.HISTOGRAM, ("request_queue_time_seconds",)),
    Family("cache_config", Kind.INFO, ("cache_config_info",), required=False),
)
"""In the order in which vLLM 0.32 prints them."""

HISTOGRAMS: Final = ("ttft_s", "tpot_s", "e2e_s", "queue_s", "token_gap_s")
"""Histograms that a sample carries, if the page has them."""

CREATED: Final = tuple(f"{prefix}generation_tokens_created" for prefix in PREFIXES)
"""When the counters began: what is left to tell a restart by in prometheus_client's multiprocess mode."""


def sample_names(family: Family, spelling: str) -> dict[str, str]:
    """Full name of a sample on a page -> its part: ``""``, ``bucket``, ``count`` or ``sum``."""
    parts: dict[str, str] = {}
    for prefix in PREFIXES:
        name = prefix + spelling
        if family.kind is Kind.HISTOGRAM:
            parts |= {f"{name}_{part}": part for part in ("bucket", "count", "sum")}
        elif family.kind is Kind.COUNTER:
            parts |= {name: "", f"{name}_total": ""}
        else:
            parts[name] = ""
    return parts
