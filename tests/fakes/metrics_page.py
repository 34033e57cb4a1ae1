"""Metrics pages as several versions of vLLM print them, from plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TTFT_S: Final = (0.001, 0.01, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
GAP_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
REQUEST_S: Final = (0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


@dataclass(frozen=True)
class Generation:
    """What a version calls its metrics."""

    kv_usage: str = "kv_cache_usage_perc"
    gaps: tuple[str, ...] = ("inter_token_latency_seconds",)
    by_source: bool = True
    tpot: bool = True
    rejections: bool = True
    engine_label: bool = True
    process_start: bool = True
    lazy_ends: bool = False  # a series of request_success is made when the first request ends


GENERATIONS: Final = {
    "0.32": Generation(),
    "0.11": Generation(
        gaps=("time_per_output_token_seconds", "inter_token_latency_seconds"),
        by_source=False,
        rejections=False,
    ),
    "0.8": Generation(
        kv_usage="gpu_cache_usage_perc",
        gaps=("time_per_output_token_seconds",),
        by_source=False,
        tpot=False,
        rejections=False,
        engine_label=False,
    ),
    "0.6": Generation(
        kv_usage="gpu_cache_usage_perc",
        gaps=("time_per_output_token_seconds",),
        by_source=False,
        tpot=False,
        rejections=False,
        engine_label=False,
        lazy_ends=True,
    ),
}


@dataclass(frozen=True)
class Seen:
    """What one engine has counted."""

    running: int = 3
    waiting: int = 2
    kv_usage: float = 0.25
    generated_tokens: int = 1000
    prompt_tokens: int = 500
    cached_tokens: int = 100
    preemptions: int = 1
    ended: dict[str, int] = field(default_factory=lambda: {"stop": 4, "length": 3, "abort": 2, "error": 1})
    rejections: int = 6
    ttft_s: tuple[float, ...] = (0.05, 0.3, 20.0)
    gap_s: tuple[float, ...] = (0.02, 0.03, 0.04, 9.0)
    tpot_s: tuple[float, ...] = (0.03, 0.3)
    request_s: tuple[float, ...] = (0.7, 3.0)
    kv_blocks: int = 64

    def observations(self, name: str) -> tuple[float, ...]:
        """What the histogram of this name has seen."""
        own = {
            "time_to_first_token_seconds": self.ttft_s,
            "request_time_per_output_token_seconds": self.tpot_s,
            "e2e_request_latency_seconds": self.request_s,
            "request_queue_time_seconds": self.request_s,
        }
        return own.get(name, self.gap_s)


def render(
    engines: dict[str, Seen] | None = None, generation: str = "0.32", *, started_s: float | None = 1000.0
) -> str:
    """The page of a server with these data-parallel engines."""
    version = GENERATIONS[generation]
    engines = {"0": Seen()} if engines is None else engines
    registry = CollectorRegistry()
    if started_s is not None:
        Gauge("process_start_time_seconds", "fake", registry=registry).set(started_s)
    own = ("engine", "model_name") if version.engine_label else ("model_name",)

    def labels(engine: str) -> dict[str, str]:
        return {"engine": engine, "model_name": "m"} if version.engine_label else {"model_name": "m"}

    gauges = {
        name: Gauge(f"vllm:{name}", "fake", own, registry=registry)
        for name in ("num_requests_running", "num_requests_waiting", version.kv_usage)
    }
    counters = {
        name: Counter(f"vllm:{name}", "fake", own, registry=registry)
        for name in ("num_preemptions", "prompt_tokens", "generation_tokens")
    }
    by_source = Counter("vllm:prompt_tokens_by_source", "fake", (*own, "source"), registry=None)
    if version.by_source:
        registry.register(by_source)
    ended = Counter("vllm:request_success", "fake", (*own, "finished_reason"), registry=registry)
    rejections = Counter("vllm:admission_rejections", "fake", ("model_name", "reason"), registry=None)
    if version.rejections:
        registry.register(rejections)
    buckets = {
        "iteration_tokens_total": (1.0, 8.0, 64.0),
        "time_to_first_token_seconds": TTFT_S,
        **dict.fromkeys(version.gaps, GAP_S),
        **({"request_time_per_output_token_seconds": GAP_S} if version.tpot else {}),
        "e2e_request_latency_seconds": REQUEST_S,
        "request_queue_time_seconds": REQUEST_S,
    }
    histograms = {
        name: Histogram(f"vllm:{name}", "fake", own, buckets=bounds, registry=registry)
        for name, bounds in buckets.items()
    }
    info = Gauge(
        "vllm:cache_config_info", "fake", ("engine", "block_size", "num_gpu_blocks"), registry=registry
    )
    for engine, seen in engines.items():
        here = labels(engine)
        gauges["num_requests_running"].labels(**here).set(seen.running)
        gauges["num_requests_waiting"].labels(**here).set(seen.waiting)
        gauges[version.kv_usage].labels(**here).set(seen.kv_usage)
        counters["num_preemptions"].labels(**here).inc(seen.preemptions)
        counters["prompt_tokens"].labels(**here).inc(seen.prompt_tokens)
        counters["generation_tokens"].labels(**here).inc(seen.generated_tokens)
        by_source.labels(**here, source="local_compute").inc(seen.prompt_tokens - seen.cached_tokens)
        by_source.labels(**here, source="local_cache_hit").inc(seen.cached_tokens)
        for reason, count in seen.ended.items():
            if count or not version.lazy_ends:
                ended.labels(**here, finished_reason=reason).inc(count)
        rejections.labels(model_name="m", reason="max_num_queued_reqs").inc(seen.rejections)
        for name, family in histograms.items():
            for value in seen.observations(name):
                family.labels(**here).observe(value)
            family.labels(**here)  # with zeros where nothing was observed
        info.labels(
            engine=engine if version.engine_label else "", block_size="16", num_gpu_blocks=str(seen.kv_blocks)
        ).set(1)
    page: bytes = generate_latest(registry)
    return page.decode()
