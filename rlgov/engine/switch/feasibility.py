"""Which TP degrees can be had, on which GPUs, and by which strategy. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from rlgov.engine.switch.machine import Strategy
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

KV_FLOOR_SHARE = 0.05  # of the GPUs' usable memory: below, an engine would hold no useful batch
GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What limits the degrees; None where it is not known."""

    attention_heads: int | None = None
    weight_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class GpuRoom:
    """The allotted GPUs: their memory, and the share of it that an engine takes; None if not known."""

    memory_bytes: float | None = None
    utilization: float = 0.9


def infeasible(
    degrees: Iterable[int], allotted_gpus: int, model: ModelShape, room: GpuRoom
) -> dict[int, str]:
    """The degrees that can never be had here, with the reason."""
    found = {}
    for degree in degrees:
        reason = _obstacle(degree, allotted_gpus, model, room)
        if reason is not None:
            found[degree] = reason
    return found


def _obstacle(degree: int, allotted_gpus: int, model: ModelShape, room: GpuRoom) -> str | None:
    if degree > allotted_gpus:
        return f"TP {degree} needs {degree} GPUs, {allotted_gpus} are allotted"
    heads = model.attention_heads
    if heads is not None and heads % degree:
        return f"TP {degree} does not divide the model's {heads} attention heads"
    if model.weight_bytes is not None and room.memory_bytes is not None:
        usable = degree * room.memory_bytes * room.utilization
        if model.weight_bytes + KV_FLOOR_SHARE * usable > usable:
            return (
                f"the weights ({model.weight_bytes / GIB:.0f} GiB) and some KV cache do not fit the "
                f"{usable / GIB:.0f} GiB that TP {degree} may use"
            )
    return None


def choose_strategy(wanted: Strategy | None, degrees: Sequence[int], gpus: int) -> Strategy:
    """How engines of these degrees share the GPUs.

    Args:
        wanted: What the operator asked for; None chooses.
        degrees: That are offered.
        gpus: Allotted; 0 on a machine without GPUs, where engines share the processor.

    Raises:
        ConfigError: Two engines side by side were asked for, and no two of them fit.
    """
    pairs = [a + b for a, b in combinations(degrees, 2)]
    if wanted is Strategy.SIDE_BY_SIDE and gpus and pairs and min(pairs) > gpus:
        raise ConfigError(
            f"no two engines of TP {', '.join(map(str, degrees))} fit {gpus} GPUs side by side; "
            "allot more GPUs, or use --switch auto"
        )
    if wanted is not None:
        return wanted
    return Strategy.SIDE_BY_SIDE if gpus == 0 or max(pairs, default=0) <= gpus else Strategy.SLEEP


def pool_gpus(degrees: Sequence[int], gpu_uuids: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """A place for every degree's engine, so that as many as possible lie on GPUs of their own."""
    places = {}
    start = 0
    for degree in sorted(degrees, reverse=True):
        if degree > len(gpu_uuids) - start:
            start = 0
        places[degree] = tuple(gpu_uuids[start : start + degree])
        start = (start + degree) % max(1, len(gpu_uuids))
    return places


def free_gpus(degree: int, gpu_uuids: Sequence[str], busy: Iterable[str]) -> tuple[str, ...] | None:
    """GPUs for one more engine; None if too few are free."""
    taken = set(busy)
    free = [uuid for uuid in gpu_uuids if uuid not in taken]
    return tuple(free[:degree]) if len(free) >= degree else None


@dataclass(frozen=True, slots=True)
class _Refusal:
    reason: str
    until_s: float
    back_off_s: float


class Refusals:
    """Degrees that failed: refused for a time that doubles with every further failure.

    Args:
        first_s: After the first failure.
        longest_s: At most.
    """

    def __init__(self, first_s: float = 60.0, longest_s: float = 3600.0) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._known: dict[int, _Refusal] = {}

    def refuse(self, degree: int, reason: str, now_s: float) -> None:
        """Note a failure of a degree."""
        before = self._known.get(degree)
        back_off_s = self._first_s if before is None else min(2 * before.back_off_s, self._longest_s)
        self._known[degree] = _Refusal(reason, now_s + back_off_s, back_off_s)

    def forgive(self, degree: int) -> None:
        """Note that a degree serves: its next failure is a first one."""
        self._known.pop(degree, None)

    def active(self, now_s: float) -> dict[int, str]:
        """The degrees refused now, with the reason and the time left."""
        return {
            degree: f"{refusal.reason} (tried again in {refusal.until_s - now_s:.0f} s at the earliest)"
            for degree, refusal in self._known.items()
            if now_s < refusal.until_s
        }


def aligned(
    degrees: Sequence[int], measured: Mapping[int, float], priors: Sequence[float]
) -> tuple[float, ...]:
    """What was measured for each degree, else what was assumed."""
    return tuple(measured.get(degree, prior) for degree, prior in zip(degrees, priors, strict=True))
