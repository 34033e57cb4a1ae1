"""The governor's metrics page, in Prometheus' text format.

Names begin with ``rlgov_governor_``, units are Prometheus' base units (seconds, joules, watts, hertz,
ratios), and every label takes values from a small fixed set, or from what was configured. What was not
measured has no sample: it is never a zero. GPUs are labelled as DCGM's exporter labels them, so that the
two join on ``UUID``; the ``gpu`` index is left to DCGM, because here a GPU has no index, only a UUID.
"""

from __future__ import annotations

import copy
import math
import socket
import threading
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from rlgov.governor.ledger import BASES, Ledger
from rlgov.governor.records import CONDITIONS, Mode, Severity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.core import Metric

    from rlgov.governor.health import Health
    from rlgov.governor.ledger import Totals
    from rlgov.governor.records import Adapted, Governed, Tick
    from rlgov.records import Configuration, Window

PREFIX: Final = "rlgov_governor_"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OTHER: Final = "OTHER"
MOST_VALUES: Final = 48
"""Values one label may take; any further one is counted as ``OTHER``."""

_DURATION_BOUNDS_S: Final = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
_HERTZ_PER_MHZ: Final = 1e6

# Name, field of the window, help.
_WINDOW_GAUGES: Final = (
    ("requests_running", "running", "Running requests at the end of the last window"),
    ("requests_waiting", "waiting", "Waiting requests at the end of the last window"),
    ("requests_overdue", "overdue", "Requests past their TTFT limit and still without a first token"),
    ("oldest_wait_seconds", "oldest_wait_s", "Age of the oldest request without a first token"),
    ("kv_cache_usage_ratio", "kv_usage", "Share of KV blocks in use"),
    ("throttled_ratio", "throttled_fraction", "Share of the window below the asked clock because of power"),
    ("switching", "switching", "1 while a TP switch is in progress"),
    ("data_age_seconds", "age_s", "Age of the window when it was handed over"),
    ("itl_mean_seconds", "itl_mean_s", "Mean gap between tokens in the last window"),
)
_WINDOW_COUNTERS: Final = (
    ("requests_arrived", "arrivals", "Requests that arrived"),
    ("requests_served", "served", "Requests that finished"),
    ("slo_misses", "misses", "Requests that broke a latency objective"),
    ("preemptions", "preemptions", "Preemptions of running requests"),
    ("prompt_tokens", "prompt_tokens", "Prompt tokens of requests that arrived"),
    ("output_tokens", "output_tokens", "Output tokens"),
    ("prefill_tokens", "prefill_tokens", "Prompt tokens computed, recomputation included"),
    ("energy_joules", "energy_j", "Measured energy of all allotted GPUs"),
    ("metered_seconds", "metered_s", "Time over which that energy was measured"),
)
_PERCENTILES: Final = (("50", "p50"), ("99", "p99"))


class Exposition(Collector):
    """Counts ticks and shows them.

    Args:
        governed: What does not change.
        health: Judges the loop at the moment of asking.
        dropped: TensorBoard points that could not be written so far.
    """

    def __init__(
        self, governed: Governed, health: Callable[[], Health], dropped: Callable[[], int] = lambda: 0
    ) -> None:
        self._governed = governed
        self._health = health
        self._dropped = dropped
        self._lock = threading.Lock()
        self._ledger = Ledger(governed.limits)
        self._tick: Tick | None = None
        self._reasons = _Bounded()
        self._registry = CollectorRegistry(auto_describe=False)
        self._duration = Histogram(
            f"{PREFIX}decision_duration_seconds",
            "Time from a window to the decision on it",
            buckets=_DURATION_BOUNDS_S,
            registry=self._registry,
        )
        self._decisions = Counter(
            f"{PREFIX}decisions",
            "Decisions by what determined them, by who decided, and by whether they were carried out",
            ["reason", "by", "acting"],
            registry=self._registry,
        )
        self._http = Counter(
            f"{PREFIX}http_requests", "Answers by status code", ["code"], registry=self._registry
        )
        self._orders = Counter(
            f"{PREFIX}commands",
            "Orders of operators, by kind and by what became of them",
            ["command", "outcome"],
            registry=self._registry,
        )
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def observe(self, tick: Tick) -> None:
        """Count one tick; waits for nothing but another short count."""
        by = "baseline" if tick.baseline else "policy"
        self._decisions.labels(self._reasons(tick.reason), by, "yes" if tick.acting else "no").inc()
        if math.isfinite(tick.decision_duration_s):
            self._duration.observe(max(tick.decision_duration_s, 0.0))
        with self._lock:
            self._ledger.add(tick)
            self._tick = tick

    def answered(self, code: int) -> None:
        """Count an HTTP answer."""
        self._http.labels(str(code)).inc()

    def ordered(self, kind: str, outcome: str) -> None:
        """Count an order: accepted, refused or dropped."""
        self._orders.labels(kind, outcome).inc()

    def totals(self) -> Totals:
        """Sums so far, as a copy."""
        with self._lock:
            return copy.deepcopy(self._ledger.totals)

    def page(self) -> bytes:
        """The whole page."""
        page: bytes = generate_latest(self._registry)
        return page

    def describe(self) -> Iterator[Metric]:
        """Nothing: the names are known only from :meth:`collect`, and none of them is taken twice."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The families of this moment."""
        with self._lock:  # only to copy: the loop never waits for a page to be written
            tick = self._tick
            families = [*self._constant(), *self._health_now(), *_totals(self._ledger)]
        yield from families
        yield from _of_tick(tick, self._governed)

    def _constant(self) -> Iterator[Metric]:
        governed = self._governed
        yield _one(
            "info",
            "What governs what",
            {
                "version": governed.versions.get("rlgov", ""),
                "policy": governed.policy,
                "policy_digest": governed.policy_digest,
                "profile": governed.profile,
                "model": governed.model,
                "target": governed.target,
            },
            1.0,
        )
        gpus = _gauge("gpu_info", "The GPUs, labelled as DCGM does", ["UUID", "modelName", "Hostname"])
        host = socket.gethostname()
        names = governed.gpu_names or ("",) * len(governed.gpu_uuids)
        for uuid, name in zip(governed.gpu_uuids, names, strict=False):
            gpus.add_metric([uuid, name, host], 1.0)
        yield gpus
        yield _value("start_time_seconds", "When the governor started", governed.started_wall_s)
        yield _value("interval_seconds", "Length of a control interval", governed.limits.interval_s)
        level = governed.limits.service_level
        objectives = _gauge("slo_seconds", "Latency objectives", ["objective"])
        objectives.add_metric(["ttft"], level.ttft_s)
        objectives.add_metric(["tpot"], level.tpot_s)
        yield objectives

    def _health_now(self) -> Iterator[Metric]:
        health = self._health()
        yield _value("alive", "1 while the loop makes progress", float(health.alive))
        yield _value("ready", "1 while it sees the deployment and may govern", float(health.ready))
        dropped = float(self._dropped())
        yield _counter("tensorboard_dropped", "TensorBoard points that could not be written", dropped)


def _of_tick(tick: Tick | None, governed: Governed) -> Iterator[Metric]:
    conditions = _gauge("condition", "1 for what is the matter now; /status says what to do", ["condition"])
    held = {condition.name for condition in tick.conditions} if tick is not None else set()
    for name in sorted({*CONDITIONS, *held}):
        conditions.add_metric([name], float(name in held))
    yield conditions
    if tick is None:
        return
    severities = _gauge("conditions", "Conditions that hold now", ["severity"])
    for severity in Severity:
        severities.add_metric([severity.value], float(sum(c.severity is severity for c in tick.conditions)))
    yield severities
    modes = _gauge("mode", "1 for the mode the operator asked for", ["mode"])
    for mode in Mode:
        modes.add_metric([mode.value], float(mode is tick.mode))
    yield modes
    yield _value("acting", "1 while decisions are carried out", float(tick.acting))
    yield _value("baseline", "1 while the baseline decides in place of the policy", float(tick.baseline))
    yield _value("last_tick_timestamp_seconds", "Wall time of the last tick", tick.wall_s)
    yield _counter("overruns", "Intervals that took longer than they had", float(tick.overruns))
    yield from _configurations(tick)
    yield from _actuation(tick)
    if not tick.window.blind:
        yield from _of_window(tick.window)
    if tick.ood_score is not None:
        yield _value("ood_score", "How far the observation is from training; 1 is the limit", tick.ood_score)
    reward = _gauge("reward", "Terms of the last window's reward", ["term"])
    for term, value in sorted(tick.reward_terms.items())[:MOST_VALUES]:
        reward.add_metric([term], value)
    yield reward
    if tick.prediction is not None:
        predicted = tick.prediction
        interval_s = governed.limits.interval_s
        power = _gauge("predicted_power_watts", "Power by the profile's tables", ["configuration"])
        power.add_metric(["decided"], predicted.power_w)
        power.add_metric(["fastest"], predicted.fastest_energy_j / interval_s)
        yield power
        yield _value("predicted_itl_seconds", "Gap between tokens by the profile's tables", predicted.itl_s)
        yield _value("prediction_error_ratio", "Stated error of the profile's energies", predicted.error)
    if tick.adapted is not None:
        yield from _adapted(tick.adapted)


def _adapted(adapted: Adapted) -> Iterator[Metric]:
    scale = _gauge("profile_scale_ratio", "Factors that predictions are multiplied by", ["quantity"])
    scale.add_metric(["time"], adapted.time_scale)
    scale.add_metric(["power"], adapted.power_scale)
    yield scale
    drift = _gauge(
        "profile_drift_ratio",
        "Measured over what the profile says, of the configuration that is farthest from it",
        ["quantity"],
    )
    for farthest in adapted.configurations[:1]:
        drift.add_metric(["time"], farthest.time)
        drift.add_metric(["power"], farthest.power)
    yield drift
    yield _value("profile_drift_limit_ratio", "Share of the profile that drift begins at", adapted.threshold)
    yield _value("profile_windows", "Windows that measured over predicted is known of", adapted.samples)


def _configurations(tick: Tick) -> Iterator[Metric]:
    clock = _gauge("sm_clock_hertz", "SM clock: asked, after the guard, in force, measured", ["stage"])
    cap = _gauge("batch_cap", "Batch cap: asked, after the guard, in force", ["stage"])
    degree = _gauge("tp_degree", "TP degree: asked, after the guard, in force", ["stage"])
    stages: dict[str, Configuration | None] = {"asked": None, "applied": None}
    if tick.decision is not None:
        stages = {"asked": tick.decision.asked, "applied": tick.decision.applied}
    for stage, configuration in stages.items():
        if configuration is not None:
            clock.add_metric([stage], configuration.sm_clock_mhz * _HERTZ_PER_MHZ)
            cap.add_metric([stage], configuration.batch_cap)
            degree.add_metric([stage], configuration.tp_degree)
    window = tick.window
    if not window.blind:
        clock.add_metric(["in_force"], window.sm_clock_mhz * _HERTZ_PER_MHZ)
        clock.add_metric(["measured"], window.measured_clock_mhz * _HERTZ_PER_MHZ)
        cap.add_metric(["in_force"], window.batch_cap)
        degree.add_metric(["in_force"], window.tp_degree)
    yield from (clock, cap, degree)


def _actuation(tick: Tick) -> Iterator[Metric]:
    done = tick.actuation
    labels = {"clocks": done.clocks, "cap_holder": done.cap_holder, "verdict": done.verdict}
    yield _one("actuator_info", "How clocks and cap are set, and what came of the last clock", labels, 1.0)
    if done.lease_left_s is not None:
        yield _value("lease_seconds", "Until the clocks are given back without a renewal", done.lease_left_s)
    locked = _gauge("locked_clock_hertz", "Locked clock: asked for, confirmed, measured", ["stage"])
    stages = (("asked", done.asked_mhz), ("applied", done.applied_mhz), ("measured", done.measured_mhz))
    for stage, mhz in stages:
        if mhz is not None:
            locked.add_metric([stage], mhz * _HERTZ_PER_MHZ)
    yield locked
    failures = CounterMetricFamily(
        f"{PREFIX}actuation_failures", "Actions that failed, by kind", labels=["kind"]
    )
    for kind, count in sorted(done.failures.items())[:MOST_VALUES]:
        failures.add_metric([kind], count)
    yield failures


def _of_window(window: Window) -> Iterator[Metric]:
    for name, attribute, about in _WINDOW_GAUGES:
        value = getattr(window, attribute)
        if value is not None:
            yield _value(name, about, value)
    if window.energy_j is not None and window.duration_s > 0:
        yield _value("power_watts", "Mean power of all allotted GPUs", window.energy_j / window.duration_s)
    for name, about in (("ttft", "Time to first token"), ("tpot", "Time per further token")):
        family = _gauge(f"{name}_seconds", f"{about} in the last window", ["percentile"])
        for label, suffix in _PERCENTILES:
            value = getattr(window, f"{name}_{suffix}_s")
            if value is not None:
                family.add_metric([label], value)
        yield family


def _totals(ledger: Ledger) -> Iterator[Metric]:
    totals = ledger.totals
    yield _counter("ticks", "Control intervals", float(totals.ticks))
    yield _counter("blind_windows", "Windows that could not be observed", float(totals.blind))
    for name, attribute, about in _WINDOW_COUNTERS:
        yield _counter(name, about, getattr(totals, attribute))
    raised = CounterMetricFamily(f"{PREFIX}conditions_raised", "How often one began", labels=["condition"])
    for name in CONDITIONS:
        raised.add_metric([name], totals.raised[name])
    yield raised
    for attribute, about in (
        ("chosen", "Energy at the decided configurations"),
        ("fastest", "Energy at the fastest configuration"),
    ):
        family = CounterMetricFamily(
            f"{PREFIX}{attribute}_energy_joules",
            f"{about}, of the windows that can be compared; one of the two is measured, the other estimated",
            labels=["basis"],
        )
        for basis in BASES:
            family.add_metric([basis], getattr(totals.compared[basis], f"{attribute}_j"))
        yield family
    residual = _gauge("residual_ratio", "Measured over predicted, of the last window", ["quantity"])
    for quantity, value in (("power", ledger.residual.power), ("itl", ledger.residual.itl)):
        if value is not None:
            residual.add_metric([quantity], value)
    yield residual


def _gauge(name: str, about: str, labels: Iterable[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, about, labels=list(labels))


def _value(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, about, value=float(value))


def _counter(name: str, about: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, about, value=value)


def _one(name: str, about: str, labels: dict[str, str], value: float) -> GaugeMetricFamily:
    family = _gauge(name, about, labels)
    family.add_metric(list(labels.values()), value)
    return family


class _Bounded:
    """Lets a bounded number of different values through, so that no input can grow the page without end."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value not in self._seen:
            if len(self._seen) >= MOST_VALUES:
                return OTHER
            self._seen.add(value)
        return value
