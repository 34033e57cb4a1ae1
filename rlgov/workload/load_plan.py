"""Which requests to send, and when: a trace and the settings of a load run, turned into a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlgov.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from rlgov.config import LoadSettings
    from rlgov.workload.trace import Trace


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to send. ``prefix_tokens`` of its prompt are common with other requests."""

    index: int
    at_s: float  # after the start of the run
    prompt_tokens: int
    output_tokens: int
    prefix_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class LoadPlan:
    """Requests sorted by time, each array of shape (n,). ``trimmed`` were shortened to the model's length."""

    trace: str
    at_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prefix_tokens: NDArray[np.int64]
    duration_s: float
    trimmed: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.at_s.shape[0])

    def __getitem__(self, index: int) -> PlannedRequest:
        return PlannedRequest(
            index,
            float(self.at_s[index]),
            int(self.prompt_tokens[index]),
            int(self.output_tokens[index]),
            int(self.prefix_tokens[index]),
        )

    def __iter__(self) -> Iterator[PlannedRequest]:
        return (self[index] for index in range(len(self)))


def build_plan(trace: Trace, settings: LoadSettings) -> LoadPlan:
    """Cut, speed up, trim.

    In an open loop ``duration_s`` leaves out what would be sent later; in a closed loop it only ends the run,
    and the requests go round.

    Raises:
        TraceError: Nothing is left to send.
    """
    if settings.from_s > 0 or settings.to_s is not None:
        trace = trace.slice(settings.from_s, trace.duration_s if settings.to_s is None else settings.to_s)
    if settings.rate_scale != 1:
        trace = trace.scaled(settings.rate_scale)
    keep = len(trace)
    duration_s = trace.duration_s
    if settings.duration_s is not None and settings.concurrency is None and settings.duration_s < duration_s:
        duration_s = settings.duration_s
        keep = int(np.searchsorted(trace.arrival_s, duration_s, side="left"))
    if keep == 0:
        raise TraceError(f"trace {trace.name}: no request in what is to be sent; choose a longer slice")
    prompt, output, prefix = (
        np.array(column[:keep])
        for column in (trace.prompt_tokens, trace.output_tokens, trace.prefix_hit_tokens)
    )
    trimmed = 0
    notes = trace.notes
    if settings.max_model_len is not None:
        prompt, output, trimmed = trim(prompt, output, settings.max_model_len)
        prefix = np.minimum(prefix, prompt - 1)
        if trimmed:
            notes = (*notes, f"{trimmed} of {keep} requests trimmed to {settings.max_model_len} tokens")
    if settings.api == "chat":
        notes = (*notes, "chat prompts are words, so their token counts are approximate")
        if prefix.any():
            notes = (*notes, "shared prefixes are words too, so prefix cache hits are approximate")
    return LoadPlan(
        trace.name, np.array(trace.arrival_s[:keep]), prompt, output, prefix, duration_s, trimmed, notes
    )


def trim(
    prompt: NDArray[np.int64], output: NDArray[np.int64], max_model_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Shorten what is longer than ``max_model_len`` together; short requests stay as they are.

    The output keeps up to half of the room, and more where the prompt leaves more; the prompt gets the rest.

    Returns:
        Prompt tokens, output tokens, and how many requests were changed.
    """
    room = np.maximum(max_model_len // 2, max_model_len - prompt)
    kept_output = np.minimum(output, room)
    kept_prompt = np.minimum(prompt, max_model_len - kept_output)
    changed = int(np.count_nonzero((kept_output != output) | (kept_prompt != prompt)))
    return kept_prompt, kept_output, changed
