"""Policies by name, as the command line and replay name them."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rlgov.agents.baselines import ecofreq, kv_threshold, load_lookup, static, two_level
from rlgov.agents.baselines.random_policy import RandomPolicy
from rlgov.agents.baselines.tuned import read_tuned
from rlgov.agents.bundle import BundlePolicy, load_bundle
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rlgov.agents.baselines.space import Family, PolicyContext
    from rlgov.agents.policy import Policy

_FALLBACK: Final = "fallback:"

FAMILIES: Final[Mapping[str, Family]] = {
    module.FAMILY.name: module.FAMILY for module in (static, kv_threshold, ecofreq, two_level, load_lookup)
}
"""Every family of rules that can be tuned."""

TUNED_RULES: Final = ("kv-threshold", "ecofreq", "two-level", "load-lookup")
"""The baseline rules a learned policy is compared with; static settings are all run instead."""

NAMES: Final = ("fastest", "best-static", "random", *TUNED_RULES)
"""What :func:`by_name` knows besides static settings and files."""


def by_name(name: str, context: PolicyContext) -> Policy:
    """The policy called ``name``.

    Args:
        name: one of :data:`NAMES`, ``static:CLOCK_MHZ/BATCH_CAP/TP``, the path of a tuned baseline
            (``.json``) or the path of a bundle, with ``@TP`` behind it to start at that TP degree and
            ``fallback:`` before it to let EcoFreq decide where the bundle has never been, as a governor does.
        context: what building it may need.

    Raises:
        ConfigError: no such policy, or the context lacks what it needs.
        BundleError: the bundle cannot be used.
    """
    if name.startswith("static:"):
        configuration = static.parse_static(name)
        context.limits.index(configuration)  # refuses what is not offered, with the choices
        return static.StaticPolicy(configuration)
    if name in NAMES:
        return _named(name, context)
    if name.startswith(_FALLBACK):
        return _with_fallback(name.removeprefix(_FALLBACK), context)
    path = Path(name)
    if path.is_file():
        return _from_file(path, context)
    file, _, degree = name.rpartition("@")
    if degree.isdecimal() and Path(file).is_file():
        policy = BundlePolicy(load_bundle(Path(file)), start_tp=int(degree))
        policy.start_configuration(context.limits)  # refuses a degree that is not offered, with the choices
        return policy
    nearest = difflib.get_close_matches(name, [*NAMES, "static:"], n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    msg = (
        f"no policy {name!r}: {hint}known are {', '.join(NAMES)}, static:CLOCK_MHZ/BATCH_CAP/TP, "
        "and paths of a tuned baseline (.json) or a bundle (with @TP behind it to start at that TP degree)"
    )
    raise ConfigError(msg)


def _with_fallback(name: str, context: PolicyContext) -> Policy:
    from rlgov.agents.fallback import with_fallback  # noqa: PLC0415  # it needs a baseline of this package

    learned = by_name(name, context)
    if not isinstance(learned, BundlePolicy) or context.tables is None:
        msg = f"{_FALLBACK}{name}: only a bundle can fall back, on a profile's physics tables"
        raise ConfigError(msg)
    return with_fallback(learned, context.tables, context.limits)


def _named(name: str, context: PolicyContext) -> Policy:
    if name == "fastest":
        return static.fastest()
    if name == "random":
        return RandomPolicy(context.seed)
    if name == "best-static":
        if context.best_static is None:
            msg = "best-static is known only after every static setting has been run; replay does so"
            raise ConfigError(msg)
        return static.StaticPolicy(context.best_static, "best-static")
    return FAMILIES[name].build({}, context)


def _from_file(path: Path, context: PolicyContext) -> Policy:
    if path.suffix == ".json":
        record = read_tuned(path)
        if record.family not in FAMILIES:
            msg = f"{path}: unknown family {record.family!r}; known: {', '.join(FAMILIES)}"
            raise ConfigError(msg)
        return FAMILIES[record.family].build(record.parameters, context)
    return BundlePolicy(load_bundle(path))
