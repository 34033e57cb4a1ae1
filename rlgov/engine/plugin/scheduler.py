"""The scheduler that counts and caps: whichever one vLLM would have taken, with a few lines around it.

vLLM makes it where it is started with ``--scheduler-cls rlgov.engine.plugin.scheduler.RlgovScheduler``. Of
the two limits of its scheduler only the admission limit, ``max_num_active_reqs``, is ever changed. The other
one, ``max_num_running_reqs``, is the size of the model runner's tables: lowered below the running requests it
ends the engine. So the engine starts with the hard maximum, and a lower cap takes effect as requests finish.
"""

from __future__ import annotations

import logging
import os
import uuid
from typing import TYPE_CHECKING, Any

from rlgov.clock import system_monotonic_s
from rlgov.engine.plugin import rpc, selftest
from rlgov.engine.plugin.cap import Cap
from rlgov.engine.plugin.counters import Counters, sample_of

if TYPE_CHECKING:

    class Stock:
        """The part of vLLM's scheduler that is relied on."""

        max_num_active_reqs: int
        num_spec_tokens: int
        requests: dict[str, Any]
        running: list[Any]
        waiting: Any
        kv_holding_waiting: Any
        finished_req_ids: set[str]
        scheduler_config: Any
        cache_config: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def schedule(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102  # vLLM's own
        def update_from_output(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102  # vLLM's own
        def finish_requests(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102  # vLLM's own
        def add_request(self, request: Any) -> None: ...  # noqa: D102  # vLLM's own
        def get_request_counts(self) -> tuple[int, int]: ...  # noqa: D102  # vLLM's own
        def get_kv_cache_usage(self) -> float: ...  # noqa: D102  # vLLM's own
else:
    Stock = object  # the class it is mixed into comes with vLLM, at run time

logger = logging.getLogger("vllm.rlgov")
now_s = system_monotonic_s


class RlgovScheduler:
    """What ``--scheduler-cls`` names. Making one gives vLLM's own scheduler, governed where possible."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Build vLLM's scheduler. Only vLLM's own errors come out of it."""
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        base = stock_scheduler(vllm_config)
        if os.environ.get("RLGOV_PLUGIN") != "1":
            logger.info("rlgov: RLGOV_PLUGIN is not 1, so the scheduler is vLLM's own")
            return base(*args, **kwargs)
        report = _examine(base, vllm_config)
        if not (report.cap or report.counters):
            rpc.step_aside(report)
            logger.warning("rlgov steps aside, vLLM serves on its own: %s", report.note)
            return base(*args, **kwargs)
        return governed(base)(report, *args, **kwargs)


def stock_scheduler(vllm_config: Any) -> Any:
    """The class that vLLM would have taken had nobody named one."""
    settings = vllm_config.scheduler_config
    if getattr(vllm_config, "diffusion_config", None) is not None:
        from vllm.v1.core.sched import diffusion_scheduler

        name = "DiffusionAsyncScheduler" if settings.async_scheduling else "DiffusionScheduler"
        return getattr(diffusion_scheduler, name)
    named = settings.scheduler_cls
    try:
        settings.scheduler_cls = None
        return settings.get_scheduler_cls()
    finally:
        settings.scheduler_cls = named


def governed(base: Any) -> Any:
    """``base`` with counting and capping mixed in."""
    return type(f"Governed{base.__name__}", (Governed, base), {"__module__": __name__})


def _examine(base: Any, vllm_config: Any) -> selftest.Report:
    try:
        from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
        from vllm.v1.request import Request

        interface = selftest.Interface(
            scheduler=base,
            output=SchedulerOutput,
            cached=CachedRequestData,
            request=Request,
            data_parallel_size=vllm_config.parallel_config.data_parallel_size,
        )
        any_version = os.environ.get("RLGOV_PLUGIN_ANY_VERSION") == "1"
        report = selftest.examine(interface, selftest.installed_version(), any_version=any_version)
        rpc.attach()
    except Exception as error:  # noqa: BLE001  # an engine without a governor is better than no engine
        return selftest.Report({}, (f"this vLLM is laid out otherwise: {error!r}",))
    return report


class Governed(Stock):
    """Mixed into vLLM's scheduler: counts what it does, and moves its admission limit.

    Whatever goes wrong in the counting ends the counting, never the engine.
    """

    def __init__(self, report: selftest.Report, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rlgov_report = selftest.examine_scheduler(self, report)
        self.rlgov_cap = Cap(self.max_num_active_reqs if self.rlgov_report.cap else 1)
        self.rlgov_counters = Counters(now_s())
        self.rlgov_counting = self.rlgov_report.counters
        self.rlgov_engine_id = os.environ.get("RLGOV_ENGINE_ID") or uuid.uuid4().hex
        logger.info(
            "rlgov governs this engine: batch cap %s, counters %s%s",
            "yes" if self.rlgov_report.cap else "no",
            "yes" if self.rlgov_counting else "no",
            f" ({self.rlgov_report.note})" if self.rlgov_report.note else "",
        )

    def add_request(self, request: Any) -> None:
        """Accept a request."""
        known = len(self.requests)
        super().add_request(request)
        if self.rlgov_counting and len(self.requests) > known:  # else more input for a request under way
            self.rlgov_counters.arrive(request.num_prompt_tokens)

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """End requests that are not done: aborted by their client, or failed."""
        ended = super().finish_requests(*args, **kwargs)
        if self.rlgov_counting and ended:
            self.rlgov_counters.abort({request.request_id for request in ended})
            self.rlgov_counters.pause(now_s(), len(self.running))
        return ended

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Choose what the next iteration computes."""
        begin_s = now_s()
        if begin_s >= self.rlgov_cap.expires_s:
            self._rlgov_expire(begin_s)
        output = super().schedule(*args, **kwargs)
        if self.rlgov_counting:
            try:
                self._rlgov_scheduled(output, begin_s, now_s())
            except Exception as error:  # noqa: BLE001  # whatever it is, serving goes on
                self._rlgov_stop_counting(error)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take in what an iteration computed."""
        result = super().update_from_output(scheduler_output, *args, **kwargs)
        if self.rlgov_counting and scheduler_output.total_num_scheduled_tokens:
            try:
                self._rlgov_computed(result, now_s())
            except Exception as error:  # noqa: BLE001  # whatever it is, serving goes on
                self._rlgov_stop_counting(error)
        return result

    def rlgov_ask(self, batch_cap: int | None, lease_s: float | None) -> int:
        """Move the cap. Raises ValueError for one that makes no sense."""
        self.max_num_active_reqs = self.rlgov_cap.ask(batch_cap, lease_s, now_s())
        return self.max_num_active_reqs

    def rlgov_sample(self) -> dict[str, Any] | None:
        """An EngineSample as plain types; None where the engine is not counted."""
        at_s = now_s()
        if at_s >= self.rlgov_cap.expires_s:  # while idle nothing else notices
            self._rlgov_expire(at_s)
        if not self.rlgov_counting:
            return None
        running, waiting = self.get_request_counts()
        return sample_of(
            self.rlgov_counters,
            at_s,
            {
                "engine_id": self.rlgov_engine_id,
                "running": running,
                "waiting": waiting,
                "kv_usage": float(self.get_kv_cache_usage()),
                "waiting_tokens": self._rlgov_waiting_tokens(),
                "batch_cap": int(self.max_num_active_reqs) if self.rlgov_report.cap else None,
                "kv_capacity_tokens": self._rlgov_kv_capacity(),
                "max_num_seqs": int(self.scheduler_config.max_num_seqs),
                "ended_now": len(self.finished_req_ids),
            },
        )

    def _rlgov_expire(self, at_s: float) -> None:
        self.max_num_active_reqs = self.rlgov_cap.in_force(at_s)
        logger.warning(
            "rlgov: the lease of the batch cap is over, so it is %d again", self.max_num_active_reqs
        )

    def _rlgov_scheduled(self, output: Any, begin_s: float, own_s: float) -> None:
        """Account for an iteration that begins. Most change no request's state, and take the short way."""
        counters, known = self.rlgov_counters, output.scheduled_cached_reqs
        context, prefill = sum(known.num_computed_tokens), 0
        completing: list[str] = []
        if output.finished_req_ids or output.preempted_req_ids:
            counters.leave(output.finished_req_ids, output.preempted_req_ids)
        if output.scheduled_new_reqs or known.resumed_req_ids:
            counters.enter(request.req_id for request in output.scheduled_new_reqs)
            counters.enter(known.resumed_req_ids)
            context += sum(request.num_computed_tokens for request in output.scheduled_new_reqs)
        running, total = len(self.running), output.total_num_scheduled_tokens
        if not total:  # nothing but the news of requests that ended
            counters.pause(begin_s, running)
            return
        if counters.prefilling:
            for name in counters.prefilling:
                tokens = output.num_scheduled_tokens.get(name)
                if tokens is not None:
                    prefill += tokens
                    if not self.requests[name].is_prefill_chunk:
                        completing.append(name)
        waiting = len(self.waiting) + len(self.kv_holding_waiting)
        counters.begin(
            (begin_s, total, prefill, completing, running, waiting, context + total, now_s() - own_s)
        )

    def _rlgov_computed(self, result: Any, end_s: float) -> None:
        """Account for an iteration that has its result."""
        generated, kv_usage = 0, None
        for outputs in result.values():
            if self.num_spec_tokens:
                generated += sum(len(each.new_token_ids) for each in outputs.outputs)
            else:  # a request has an output where it has a token
                generated += len(outputs.outputs)
            if outputs.scheduler_stats is not None:
                kv_usage = outputs.scheduler_stats.kv_cache_usage
        if kv_usage is None:  # vLLM was told to keep no statistics
            kv_usage = self.get_kv_cache_usage()
        counters = self.rlgov_counters
        own_s = counters.end(end_s, generated, len(self.running), kv_usage)
        counters.cost(own_s + now_s() - end_s)

    def _rlgov_waiting_tokens(self) -> int:
        """Prompt tokens still to be computed. Walks over the queue: for a reading, not for an iteration."""
        tokens = 0
        for queue in (self.waiting, self.kv_holding_waiting):
            for request in queue:
                tokens += request.num_tokens - request.num_computed_tokens
        for name in self.rlgov_counters.prefilling:
            request = self.requests.get(name)
            if request is not None:
                tokens += request.num_tokens - request.num_computed_tokens
        return tokens

    def _rlgov_kv_capacity(self) -> int | None:
        """Tokens that fit into the KV cache, as vLLM reckons: with one kind of layer, blocks times size."""
        config = self.cache_config
        reckoned = getattr(config, "kv_cache_size_tokens", None)
        if reckoned is not None:
            return int(reckoned)
        blocks = getattr(config, "num_gpu_blocks", None)
        return None if blocks is None else int(blocks) * int(config.block_size)

    def _rlgov_stop_counting(self, error: Exception) -> None:
        self.rlgov_counting = False
        report = self.rlgov_report
        self.rlgov_report = selftest.Report(
            {**report.checks, "counters": False},
            (*report.reasons, f"counting stopped at an error: {error!r}"),
        )
        logger.error("rlgov stops counting, serving goes on", exc_info=error)
