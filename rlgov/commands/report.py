"""``rlgov report``: what a governed run saved, or would have saved."""

from __future__ import annotations

import sys
from pathlib import Path

from rlgov.commands.output import Json, console, put_json
from rlgov.config import DEFAULT_PROFILE
from rlgov.errors import ConfigError


def report(
    journal: Path,
    /,
    *,
    profile: str = DEFAULT_PROFILE,
    policy: str | None = None,
    draws: int = 8,
    adaptation: Path | None = None,
    json: Json = False,
) -> None:
    """What a governed run saved, or would have saved had it acted, with how far that can be trusted.

    Every window's measured energy is scaled by the profile's tables. Where the journal holds the requests,
    they go through the simulator, too: as it was, as decided, and at the fastest configuration.

    Args:
        journal: The journal of `rlgov govern`: a file, or the folder of a rotated one.
        profile: Profile name or path of a profile file, of this deployment.
        policy: A bundle or a baseline that decides anew on the recorded requests, in simulation: what acting
            would have led to.
        draws: How often the simulation is repeated with other values of the profile's uncertain numbers.
        adaptation: State file of `rlgov govern --adapt`, such as runs/govern/adaptation.json: what the tables
            expect then follows it.
        json: Report as JSON.
    """
    from rlgov.agents.baselines import PolicyContext, by_name
    from rlgov.governor.adaptation_file import read_scales
    from rlgov.governor.shadow_report import shadow_report
    from rlgov.journal import read_journal
    from rlgov.simulation.forecast import UNSCALED
    from rlgov.simulation.physics import build_tables
    from rlgov.simulation.profile import load_profile

    if draws < 0:
        raise ConfigError(f"--draws must not be negative, got {draws}")
    recorded, known = read_journal(journal, allow_cut=True), load_profile(profile)
    context = PolicyContext(known.limits(), build_tables(known))
    again = by_name(policy, context) if policy is not None else None
    scales = UNSCALED if adaptation is None else read_scales(adaptation, known)
    found = shadow_report(recorded, known, policy=again, draws=draws, scales=scales)
    if json:
        put_json(found.to_json())
        return
    console().print(found.table())
    if found.no_simulation:
        sys.stdout.write(f"not simulated: {found.no_simulation}\n")
    sys.stdout.write("".join(f"- {assumption}\n" for assumption in found.assumptions))
