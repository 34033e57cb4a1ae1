"""``rlgov govern``: a policy beside a serving stack, within limits, and given back whatever happens."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, NoReturn

from cyclopts import Parameter

from rlgov.commands.output import Json, put_fields, put_json
from rlgov.governor.settings import GovernSettings

if TYPE_CHECKING:
    from types import FrameType

    from rlgov.clock import Clock
    from rlgov.governor.adaptation_file import AdaptationFile
    from rlgov.governor.journal import Journal
    from rlgov.governor.listen import Address
    from rlgov.governor.opening import Opened
    from rlgov.governor.tensorboard import EventSink
    from rlgov.records import Limits

DEFAULTS = GovernSettings()


class _EndedError(BaseException):
    """SIGTERM: give everything back and end well."""


def govern(
    policy: str | None = None,
    /,
    *,
    settings: Annotated[GovernSettings, Parameter(name="*")] = DEFAULTS,
    json: Json = False,
) -> int:
    """Watch a deployment, show what a policy would do, or let it act: clock, batch cap and TP degree.

    Runs until a signal ends it, and then gives everything back: the clocks as they were found, the largest
    batch cap. `rlgov status` shows what it does, `rlgov tell` gives orders, `rlgov report` tells the saving.

    Args:
        policy: Bundle of a learned policy, or a baseline by name; as settings.policy.
        settings: What to govern, and how.
        json: Say what is governed as JSON.
    """
    from rlgov.clock import SystemClock
    from rlgov.governor.listen import parse_addresses, read_token
    from rlgov.governor.loop import Governor
    from rlgov.governor.opening import open_governor
    from rlgov.governor.surface import Surface
    from rlgov.hardware.keeper.notify import Notifier

    if policy is not None:
        settings = settings.model_copy(update={"policy": policy})
    clock = SystemClock()
    token = None if settings.token_file is None else read_token(settings.token_file)
    addresses = parse_addresses(settings.listen, token)
    _make_folders(addresses)
    notifier = Notifier()
    signal.signal(signal.SIGTERM, _end)
    try:
        with ExitStack() as undo:
            undo.callback(notifier.close)
            opened = open_governor(settings, clock)
            undo.callback(opened.claim.give_up)
            undo.callback(opened.deployment.close)
            events = _events(settings, opened.governed.limits)
            surface = Surface(opened.governed, clock, addresses=addresses, token=token, events=events)
            undo.callback(surface.close)
            surface.start()
            journal = _journal(settings, clock)
            undo.callback(journal.close)
            kept = _adaptation(opened, settings, clock)
            if kept is not None:
                undo.callback(kept.close)
            undo.callback(opened.deployment.close)  # before everything else: what was moved goes back first
            undo.callback(notifier.stopping)
            governor = Governor(
                opened.deployment,
                opened.core,
                clock,
                clocks=opened.gpus.clocks,
                events=opened.gpus.events,
                journal=journal,
                versions=opened.governed.versions | {"governor.run": f"{clock.wall_s():.0f}-{os.getpid()}"},
                policy_digest=opened.governed.policy_digest,
                orders=surface.commands,
                alive=notifier.alive,
                claim=opened.claim,
            )
            _say(opened, settings, tuple(map(str, surface.addresses)), json=json)
            notifier.ready(f"{settings.mode}: {opened.governed.policy} on {opened.governed.target}")
            for tick in governor.run():
                surface.publish(tick)
                if kept is not None:
                    kept.save()
    except _EndedError:
        return 0
    return 0


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows must not be interrupted
    raise _EndedError


def _make_folders(addresses: tuple[Address, ...]) -> None:
    from rlgov.governor.listen import UnixAddress

    for address in addresses:
        if isinstance(address, UnixAddress):
            address.path.parent.mkdir(parents=True, exist_ok=True)


def _events(settings: GovernSettings, limits: Limits) -> EventSink:
    from rlgov.governor.tensorboard import EventFiles, NullEvents, TensorBoardEvents

    if settings.tensorboard is None:
        return NullEvents()
    return TensorBoardEvents(EventFiles(settings.tensorboard), limits)


def _journal(settings: GovernSettings, clock: Clock) -> Journal:
    from rlgov.governor.journal import NoJournal, RotatingFiles, ThreadedJournal

    if settings.journal is None:
        return NoJournal()
    files = RotatingFiles(settings.journal, settings.rotation)
    return ThreadedJournal(files, clock, settings.rotation)


def _adaptation(opened: Opened, settings: GovernSettings, clock: Clock) -> AdaptationFile | None:
    from rlgov.governor.adaptation_file import AdaptationFile

    if opened.core.adaptation is None:
        return None
    kept = AdaptationFile(settings.adaptation_file, opened.core.adaptation, opened.adaptation_owner, clock)
    kept.load()
    if kept.problem:
        sys.stderr.write(f"rlgov: {kept.problem}\n")
    return kept


def _say(opened: Opened, settings: GovernSettings, addresses: tuple[str, ...], *, json: bool) -> None:
    """What is governed, and where it tells of itself."""
    governed = opened.governed
    fields: dict[str, object] = {
        "mode": str(opened.core.mode),
        "policy": governed.policy,
        "target": governed.target,
        "profile": governed.profile,
        "model": governed.model,
        "gpus": list(governed.gpu_uuids),
        "clocks": str(opened.gpus.kind) + (f" ({opened.gpus.note})" if opened.gpus.note else ""),
        "listen": list(addresses),
        "journal": None if settings.journal is None else str(settings.journal),
        "mismatches": list(opened.mismatches),
    }
    if json:
        put_json(fields)
    else:
        put_fields("rlgov governs", fields)
    sys.stdout.flush()
