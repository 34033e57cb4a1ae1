"""Drive vLLM's own schedulers, governed, without a model; run by .venv-vllm's Python.

``python drive_scheduler.py MODEL SEED`` makes the scheduler for overlapping iterations, which a CPU engine
never uses, and the plain one; feeds each random requests, aborts and caps with a KV cache so small that
requests are preempted; and prints what the plugin counted beside an account kept request by request.
"""

from __future__ import annotations

import json
import os
import random  # noqa: TID251  # its own seeded generator: numpy's would do, but nothing else here needs numpy
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "RLGOV_PLUGIN": "1"}

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from rlgov.engine.plugin import scheduler as plugin
from rlgov.engine.plugin.scheduler import RlgovScheduler

BLOCK, BLOCKS, MAX_SEQS = 16, 48, 12
TURNS = 3000


class Drive:
    """One scheduler, an engine loop around it, and the slow account."""

    def __init__(self, model: str, seed: int, *, overlap: bool) -> None:
        self.now_s = 1000.0
        plugin.now_s = lambda: self.now_s
        self.random = random.Random(seed)  # noqa: S311  # no secret
        config = EngineArgs(
            model=model,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=512,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=512,
            enforce_eager=True,
            scheduler_cls="rlgov.engine.plugin.scheduler.RlgovScheduler",
        ).create_engine_config()
        config.scheduler_config.async_scheduling = overlap
        config.cache_config.num_gpu_blocks = BLOCKS
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=4, head_size=32, dtype=torch.float32)
        self.scheduler: Any = RlgovScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=True,
        )
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self.hasher = get_request_block_hasher(BLOCK, hash_function)
        self.depth = 2 if overlap else 1
        self.queue: deque[tuple[Any, list[str], float]] = deque()
        self.all: dict[str, Any] = {}
        self.known: dict[str, int] = {}
        self.times_s: dict[str, list[float]] = {}
        self.aborted: set[str] = set()
        self.prefill = self.iterations = self.most_running = 0
        self.busy_s, self.reached_s = 0.0, 0.0

    def add(self) -> None:
        name = f"r{len(self.all)}"
        length, output = self.random.randint(1, 120), self.random.randint(1, 80)
        # Now and then a prompt that begins as others do, so that the prefix cache has its part.
        first = 5 if self.random.random() < 0.3 else self.random.randint(6, 250)
        parameters = SamplingParams(max_tokens=output, ignore_eos=True)
        parameters.update_from_generation_config({}, None)
        request = Request(
            request_id=name,
            prompt_token_ids=[first] * length,
            sampling_params=parameters,
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.all[name] = request
        self.times_s[name] = []
        self.scheduler.add_request(request)

    def abort(self) -> None:
        if self.scheduler.requests:
            name = self.random.choice(sorted(self.scheduler.requests))
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            self.aborted.add(name)

    def turn(self) -> None:
        """One turn of vLLM's loop."""
        scheduler = self.scheduler
        if scheduler.has_requests():
            before = {name: request.num_computed_tokens for name, request in scheduler.requests.items()}
            tokens = {name: request.num_tokens for name, request in scheduler.requests.items()}
            begin_s = self.now_s
            output = scheduler.schedule(False)  # noqa: FBT003  # as vLLM calls it
            self.most_running = max(self.most_running, len(scheduler.running))
            for each in output.scheduled_new_reqs:
                self.known[each.req_id] = tokens[each.req_id]
                before[each.req_id] = each.num_computed_tokens
            cached = output.scheduled_cached_reqs
            for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
                before[name] = computed
                if name in cached.resumed_req_ids:
                    self.known[name] = tokens[name]
            sampled = []
            for name, count in output.num_scheduled_tokens.items():
                if before[name] < self.known[name]:
                    self.prefill += count
                if not scheduler.requests[name].is_prefill_chunk:
                    sampled.append(name)
            self.queue.append((output, sampled, begin_s))
            if output.total_num_scheduled_tokens and len(self.queue) < self.depth:
                self.now_s += 0.001
                return
        self.now_s += self.random.choice([0.01, 0.02, 0.05])
        if self.queue:
            self.take()

    def take(self) -> None:
        output, sampled, begin_s = self.queue.popleft()
        names = list(output.num_scheduled_tokens)
        result = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[[7] if name in sampled else [] for name in names],
            ),
        )
        for outputs in result.values():
            for each in outputs.outputs:
                self.times_s[each.request_id] += [self.now_s] * len(each.new_token_ids)
        if output.total_num_scheduled_tokens:
            self.iterations += 1
            self.busy_s += self.now_s - max(begin_s, self.reached_s)
            self.reached_s = self.now_s

    def run(self, *, aborts: bool) -> dict[str, Any]:
        for _ in range(TURNS):
            dice = self.random.random()
            if dice < 0.1 and len(self.scheduler.requests) < 40:
                self.add()
            elif dice < 0.11 and aborts:
                self.abort()
            elif dice < 0.12:
                self.scheduler.rlgov_ask(self.random.choice([1, 2, 4, 8, None]), None)
            self.turn()
        self.scheduler.rlgov_ask(None, None)
        while self.scheduler.has_requests() or self.queue:
            self.turn()
        lengths = [len(times_s) for times_s in self.times_s.values()]
        done = [name for name in self.all if name not in self.aborted]
        return {
            "class": type(self.scheduler).__name__,
            "note": self.scheduler.rlgov_report.note,
            "most_running": self.most_running,
            "cached": sum(request.num_prompt_tokens for request in self.all.values()) - self.prefill,
            "counted": self.scheduler.rlgov_sample(),
            "account": {
                "arrived": len(self.all),
                "finished": len(done),
                "failed": len(self.aborted),
                "prompt_tokens": sum(request.num_prompt_tokens for request in self.all.values()),
                "generated_tokens": sum(lengths),
                "token_gaps": sum(max(0, length - 1) for length in lengths),
                "token_gap_s": sum(times_s[-1] - times_s[0] for times_s in self.times_s.values() if times_s),
                "prefill_tokens": self.prefill,
                "preemptions": sum(request.num_preemptions for request in self.all.values()),
                "iterations": self.iterations,
                "busy_s": self.busy_s,
                "running": 0,
                "waiting": 0,
                "waiting_tokens": 0,
            },
        }


def runs(model: str, seed: int) -> Iterator[dict[str, Any]]:
    for overlap in (True, False):
        for aborts in (True, False):
            drive = Drive(model, seed, overlap=overlap)
            yield {"overlap": overlap, "aborts": aborts} | drive.run(aborts=aborts)


if __name__ == "__main__":
    found = list(runs(sys.argv[1], int(sys.argv[2])))
    sys.stdout.write("\n" + json.dumps(found) + "\n")
