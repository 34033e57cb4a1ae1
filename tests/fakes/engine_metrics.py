"""The fake server's metrics page: the families, labels and buckets of vLLM 0.32."""

from __future__ import annotations

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from tests.fakes.engine_model import FakeEngine, Sequence

TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
STEP_TOKENS = tuple(float(2**power) for power in (0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14))
TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0,
    2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
GAP_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip

COUNTERS = {  # name -> values of its own label, if it has one
    "estimated_flops_per_gpu": (),
    "estimated_read_bytes_per_gpu": (),
    "estimated_write_bytes_per_gpu": (),
    "prefix_cache_queries": (),
    "prefix_cache_hits": (),
    "external_prefix_cache_queries": (),
    "external_prefix_cache_hits": (),
    "mm_cache_queries": (),
    "mm_cache_hits": (),
    "num_preemptions": (),
    "prompt_tokens": (),
    "prompt_tokens_by_source": ("source", "local_compute", "local_cache_hit", "external_kv_transfer"),
    "prompt_tokens_cached": (),
    "generation_tokens": (),
    "request_success": ("finished_reason", "stop", "length", "abort", "error", "repetition"),
}
HISTOGRAMS = {
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "iteration_tokens_total": STEP_TOKENS,
    "request_max_num_generation_tokens": TOKENS,
    "request_params_n": (1.0, 2.0, 5.0, 10.0, 20.0),
    "request_params_max_tokens": TOKENS,
    "time_to_first_token_seconds": TTFT_S,
    "inter_token_latency_seconds": GAP_S,
    "request_time_per_output_token_seconds": GAP_S,
    "e2e_request_latency_seconds": REQUEST_S,
    "request_queue_time_seconds": REQUEST_S,
    "request_inference_time_seconds": REQUEST_S,
    "request_prefill_time_seconds": REQUEST_S,
    "request_decode_time_seconds": REQUEST_S,
    "request_num_preemptions": (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0),
    "request_prefill_kv_computed_tokens": TOKENS,
}


class MetricsPage:
    """Follows one engine and renders its page.

    As in vLLM, what a request took is observed when it finishes, gaps between tokens as they come.
    """

    def __init__(self, engine: FakeEngine, model_name: str) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        for collector in (GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR):
            self._registry.register(collector)
        self._labels = {"engine": "0", "model_name": model_name}
        self._counters: dict[tuple[str, str], Counter] = {}
        for name, own in COUNTERS.items():
            self._add_counter(name, own)
        self._gauges = {name: self._gauge(name) for name in ("running", "waiting")}
        self._kv_usage = self._gauge("kv_cache_usage_perc", "")
        self._reasons = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "fake",
            (*self._labels, "reason"),
            registry=self._registry,
        )
        self._sleep = Gauge(
            "vllm:engine_sleep_state", "fake", (*self._labels, "sleep_state"), registry=self._registry
        )
        self._histograms = {
            name: Histogram(
                f"vllm:{name}", "fake", tuple(self._labels), buckets=buckets, registry=self._registry
            ).labels(**self._labels)
            for name, buckets in HISTOGRAMS.items()
        }
        info = {
            "block_size": "16",
            "num_gpu_blocks": str(engine.pace.kv_capacity_tokens // 16),
            "engine": "0",
        }
        Gauge("vllm:cache_config_info", "fake", tuple(info), registry=self._registry).labels(**info).set(1)
        engine.observer.on_token = self._on_token
        engine.observer.on_finish = self._on_finish
        engine.observer.on_iteration = self._histograms["iteration_tokens_total"].observe

    def _add_counter(self, name: str, own: tuple[str, ...]) -> None:
        family = Counter(f"vllm:{name}", "fake", (*self._labels, *own[:1]), registry=self._registry)
        if not own:
            self._counters[name, ""] = family.labels(**self._labels)
        for value in own[1:]:
            self._counters[name, value] = family.labels(**self._labels, **{own[0]: value})

    def _gauge(self, name: str, prefix: str = "num_requests_") -> Gauge:
        family = Gauge(f"vllm:{prefix}{name}", "fake", tuple(self._labels), registry=self._registry)
        return family.labels(**self._labels)

    def _on_token(self, sequence: Sequence, gap_s: float | None) -> None:
        self._counters["generation_tokens", ""].inc()
        if gap_s is None:
            self._counters["prompt_tokens", ""].inc(sequence.prompt_tokens)
            self._counters["prompt_tokens_by_source", "local_compute"].inc(sequence.prompt_tokens)
            self._counters["prefix_cache_queries", ""].inc(sequence.prompt_tokens)
            waited_s = sequence.first_token_s - sequence.arrived_s
            self._histograms["time_to_first_token_seconds"].observe(waited_s)
        else:
            self._histograms["inter_token_latency_seconds"].observe(gap_s)

    def _on_finish(self, sequence: Sequence, reason: str, at_s: float) -> None:
        self._counters["request_success", reason].inc()
        decode_s = at_s - sequence.first_token_s
        seen = {
            "request_prompt_tokens": sequence.prompt_tokens,
            "request_generation_tokens": sequence.generated,
            "request_max_num_generation_tokens": sequence.generated,
            "request_params_n": 1,
            "request_params_max_tokens": sequence.max_tokens,
            "request_time_per_output_token_seconds": decode_s / max(sequence.generated - 1, 1),
            "e2e_request_latency_seconds": at_s - sequence.arrived_s,
            "request_queue_time_seconds": sequence.admitted_s - sequence.arrived_s,
            "request_inference_time_seconds": at_s - sequence.admitted_s,
            "request_prefill_time_seconds": sequence.first_token_s - sequence.admitted_s,
            "request_decode_time_seconds": decode_s,
            "request_num_preemptions": 0,
            "request_prefill_kv_computed_tokens": sequence.prompt_tokens,
        }
        for name, value in seen.items():
            self._histograms[name].observe(value)

    def render(self) -> bytes:
        """The page as of now."""
        engine = self._engine
        self._gauges["running"].set(len(engine.running))
        self._gauges["waiting"].set(len(engine.waiting))
        self._kv_usage.set(engine.kv_usage)
        self._reasons.labels(**self._labels, reason="capacity").set(len(engine.waiting))
        self._reasons.labels(**self._labels, reason="deferred").set(0)
        for state, on in (
            ("awake", not engine.asleep),
            ("weights_offloaded", engine.asleep),
            ("discard_all", False),
        ):
            self._sleep.labels(**self._labels, sleep_state=state).set(float(on))
        return generate_latest(self._registry)
