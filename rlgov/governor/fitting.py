"""Whether a policy, a profile and a deployment belong together: every reason why not, in words. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from rlgov.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rlgov.agents.bundle import Bundle
    from rlgov.hardware.gpus import Gpu
    from rlgov.records import Limits
    from rlgov.simulation.profile import Profile

_TDP_SLACK: Final = 0.1
_NOISE: Final = re.compile(
    r"(sxm|hbm|pcie|gen|nvl)\d*[a-z]?|\d+gb|nvidia|tesla|geforce|quadro|tensor|core|gpu"
)
_DIGITS: Final = 3  # of a bare number that names a card, such as 4090


def mismatches(
    profile: Profile,
    limits: Limits,
    *,
    bundle: Bundle | None,
    gpus: Sequence[Gpu],
    model: str,
) -> tuple[str, ...]:
    """Why a policy must not act on a deployment; empty when it may.

    Args:
        profile: What the deployment is taken for.
        limits: What the deployment offers.
        bundle: The policy; None for a rule.
        gpus: The deployment's.
        model: It serves; empty where nobody knows.
    """
    return tuple(_reasons(profile, limits, bundle, gpus, model))


def _reasons(
    profile: Profile, limits: Limits, bundle: Bundle | None, gpus: Sequence[Gpu], model: str
) -> Iterable[str]:
    if bundle is not None:
        trained = bundle.manifest
        if trained.profile_name != profile.name:
            yield f"the policy was trained on profile {trained.profile_name}, not on {profile.name}"
        try:
            bundle.check_limits(limits)
        except BundleError as error:
            yield str(error)
    for name in dict.fromkeys(gpu.name for gpu in gpus):
        if not same_card(profile.gpu.name, name):
            yield f"profile {profile.name} is of {profile.gpu.name}, the GPUs are {name}"
    for tdp_w in dict.fromkeys(gpu.tdp_w for gpu in gpus if gpu.tdp_w is not None):
        if abs(tdp_w - profile.gpu.tdp_w) > _TDP_SLACK * profile.gpu.tdp_w:
            yield f"profile {profile.name} is of cards of {profile.gpu.tdp_w:g} W, the GPUs have {tdp_w:g} W"
    if model and not same_model(profile.model.name, model):
        yield f"profile {profile.name} is of model {profile.model.name}, the deployment serves {model}"


def same_card(profile: str, driver: str) -> bool:
    """Whether a profile's name of a card and the driver's can mean one: as H100 SXM and NVIDIA H100 do."""
    wanted, found = _marks(profile), _marks(driver)
    if not wanted:
        return profile.casefold() in driver.casefold()
    return wanted <= found


def _marks(name: str) -> set[str]:
    """What tells one card from another: h100, l40s, 4090."""
    words = re.split(r"[^a-z0-9]+", name.casefold())
    return {
        word
        for word in words
        if not _NOISE.fullmatch(word)
        and any(c.isdigit() for c in word)
        and (any(c.isalpha() for c in word) or len(word) >= _DIGITS)
    }


def same_model(profile: str, served: str) -> bool:
    """Whether both name one model: by the last part, so that a folder of its files counts."""
    return _last(profile) == _last(served)


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].casefold()
