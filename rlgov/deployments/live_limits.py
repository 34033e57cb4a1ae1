"""What a live deployment offers: the profile's axes, held against the serving stack and the GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlgov.errors import DeploymentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rlgov.engine.samples import StackLimits
    from rlgov.records import Limits

_SHOWN = 3  # clocks named around one that is not supported


@dataclass(frozen=True, slots=True)
class LiveLimits:
    """The limits of a live deployment, and where it falls short of them."""

    limits: Limits
    never: Mapping[int, str]
    """TP degrees that the limits name and this stack cannot give, with the reason."""
    notes: tuple[str, ...] = ()
    """What a person should know."""


def live_limits(profile: Limits, stack: StackLimits, supported_mhz: tuple[int, ...]) -> LiveLimits:
    """Limits of a live deployment: what the profile names, as far as stack and GPUs allow it.

    The axes stay exactly the profile's, because a policy is made for its axes. A TP degree that the stack
    does not offer stays on its axis and is refused at run time; a clock or a cap that cannot be had is an
    error, since nothing would tell the policy. KV capacities and switch times are the stack's own where it
    knows them.

    Args:
        profile: The limits the policy was made for, with the SLO and the interval that shall hold.
        stack: What the serving stack offers.
        supported_mhz: SM clocks of the GPUs; empty where clocks cannot be set.

    Raises:
        DeploymentError: What cannot be had, and how to start the stack instead.
    """
    _check_clocks(profile, supported_mhz)
    if profile.batch_caps[0] > stack.batch_caps[0]:
        msg = (
            f"the profile's batch caps go up to {profile.batch_caps[0]}, the stack serves at most "
            f"{stack.batch_caps[0]}; start it with --max-num-seqs {profile.batch_caps[0]}"
        )
        raise DeploymentError(msg)
    if stack.gpu_uuids and len(stack.gpu_uuids) != profile.allotted_gpus:
        msg = (
            f"the profile is of {profile.allotted_gpus} GPUs, the stack was given {len(stack.gpu_uuids)}; "
            "give it as many, or choose the profile of that many"
        )
        raise DeploymentError(msg)
    index_of = {tp: i for i, tp in enumerate(stack.tp_degrees)}
    never = {
        tp: f"the stack offers TP degrees {', '.join(map(str, stack.tp_degrees))} only"
        for tp in profile.tp_degrees
        if tp not in index_of
    }
    if len(never) == len(profile.tp_degrees):
        msg = (
            f"the stack offers TP degrees {stack.tp_degrees}, the profile {profile.tp_degrees}: none in "
            "common; start the stack with one of the profile's"
        )
        raise DeploymentError(msg)

    def known(tp: int, prior: float, measured: tuple[float, ...]) -> float:
        value = measured[index_of[tp]] if tp in index_of else 0.0
        return value if value > 0 else prior

    limits = replace(
        profile,
        kv_capacity_tokens=tuple(
            int(known(tp, prior, stack.kv_capacity_tokens))
            for tp, prior in zip(profile.tp_degrees, profile.kv_capacity_tokens, strict=True)
        ),
        switch_s=tuple(
            known(tp, prior, stack.switch_s)
            for tp, prior in zip(profile.tp_degrees, profile.switch_s, strict=True)
        ),
        max_num_batched_tokens=stack.max_num_batched_tokens or profile.max_num_batched_tokens,
    )
    return LiveLimits(limits, never, tuple(_notes(profile, stack, supported_mhz, never)))


def refused_bits(limits: Limits, refused: Iterable[int]) -> float:
    """``Window.tp_refused``: bit i is set when the TP degree at index i of the limits cannot be had now."""
    degrees = set(refused)
    return float(sum(1 << i for i, tp in enumerate(limits.tp_degrees) if tp in degrees))


def _check_clocks(profile: Limits, supported_mhz: tuple[int, ...]) -> None:
    if not supported_mhz:
        return
    missing = [clock for clock in profile.sm_clocks_mhz if clock not in supported_mhz]
    if missing:
        listed = "; ".join(f"{clock}: nearest {_nearest(clock, supported_mhz)}" for clock in missing)
        msg = (
            f"the profile names SM clocks (MHz) that these GPUs do not have ({listed}); correct "
            "deployment.sm_clocks_mhz of the profile, and train for it"
        )
        raise DeploymentError(msg)


def _nearest(clock_mhz: int, supported_mhz: tuple[int, ...]) -> str:
    by_distance = sorted(supported_mhz, key=lambda other_mhz: abs(other_mhz - clock_mhz))
    return ", ".join(map(str, by_distance[:_SHOWN]))


def _notes(
    profile: Limits, stack: StackLimits, supported_mhz: tuple[int, ...], never: Mapping[int, str]
) -> Iterable[str]:
    if not supported_mhz:
        yield "clocks cannot be set here: every window runs at the driver's own clock"
    for tp, reason in never.items():
        yield f"TP degree {tp} is refused: {reason}"
    budget = stack.max_num_batched_tokens
    if budget and budget != profile.max_num_batched_tokens:
        yield (
            f"the stack batches {budget} tokens an iteration, the profile {profile.max_num_batched_tokens}: "
            "latencies will differ from training"
        )
