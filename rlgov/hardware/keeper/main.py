"""The ``rlgov-keeper`` program. Imports no more than it must: it stays in memory as root."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, NoReturn

from rlgov.clock import SuspendAwareClock
from rlgov.errors import HardwareError, RlgovError
from rlgov.hardware.claims import GpuClaims
from rlgov.hardware.keeper.client import KeeperLink
from rlgov.hardware.keeper.driver import NvmlKeeperDriver
from rlgov.hardware.keeper.errors import KeeperGone
from rlgov.hardware.keeper.keeper import Keeper
from rlgov.hardware.keeper.notify import Notifier
from rlgov.hardware.keeper.options import read_options
from rlgov.hardware.keeper.protocol import put_state
from rlgov.hardware.keeper.saves import SaveFolder
from rlgov.hardware.keeper.server import Server, Signals, listen
from rlgov.hardware.keeper.values import Note
from rlgov.hardware.nvml import NvmlSession

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlgov.hardware.clocks import ClockPort
    from rlgov.hardware.keeper.options import Options

EXIT_ERROR: Final = 2
EXIT_NOT_RESTORED: Final = 1
_PATIENCE_S: Final = 5.0
_MOST_SAID_BYTES: Final = 1000


def say(note: Note) -> None:
    """A line for the journal. What cannot be written at once is dropped: the loop must not wait for it."""
    level = ("<3>" if note.grave else "<6>") if "JOURNAL_STREAM" in os.environ else ""
    line = f"{level}rlgov-keeper: {note.text}".replace("\n", " ").encode(errors="replace")
    with contextlib.suppress(OSError, ValueError):
        if select.select((), (2,), (), 0)[1]:
            os.write(2, line[:_MOST_SAID_BYTES] + b"\n")


def _complain(text: str) -> None:
    say(Note(text, grave=True))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit code."""
    try:
        options = read_options(arguments, os.environ)
        if options.action == "run":
            return _serve(options)
        if options.action in {"restore_all", "restore_left"}:
            return _restore(options)
        return _ask(options)
    except RlgovError as error:
        _complain(str(error))
        return EXIT_ERROR


def main() -> NoReturn:
    """Entry point of the ``rlgov-keeper`` program."""
    sys.exit(run(sys.argv[1:]))


def _serve(options: Options) -> int:
    clock = SuspendAwareClock()
    with ExitStack() as undo:
        signals = undo.enter_context(Signals())
        notifier = Notifier()
        undo.callback(notifier.close)
        saves = SaveFolder(options.state_dir, _complain)
        saves.own()
        undo.callback(saves.close)
        driver = _driver(options, clock, undo)
        keeper = _keeper(options, driver, saves, clock)
        keeper.recover(_PATIENCE_S)
        driver.probe()  # after recovery: what it cannot set, it must not have left locked either
        listener = undo.enter_context(listen(options.socket, options.group))
        undo.callback(options.socket.unlink, missing_ok=True)
        _give_back_memory()
        settings = options.settings
        status = (
            f"listening on {options.socket} for {len(driver.offers())} GPUs, locks from {settings.floor_mhz} "
            f"to {settings.ceiling_mhz} MHz, leases of at most {settings.longest_lease_s:g} s"
        )
        say(Note(status))
        notifier.ready(status)
        try:
            Server(keeper, listener, signals, clock, notifier).run()
        finally:
            notifier.stopping()
            restored = keeper.stop(_PATIENCE_S)
        if not restored:
            _complain(f"could not restore {', '.join(keeper.restoring)}; the next start tries again")
            return EXIT_NOT_RESTORED
    return 0


def _give_back_memory() -> None:
    """What starting up took and is not needed any more."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # only the GNU library has it
        ctypes.CDLL(None).malloc_trim(0)


def _restore(options: Options) -> int:
    """Through the keeper that runs, else by ourselves."""
    still: tuple[str, ...] = ()
    try:
        with KeeperLink(options.socket, _PATIENCE_S) as link:
            if options.action == "restore_all":
                still = tuple(link.ask("restore_all")["open"])
            else:
                link.state()  # it answers, so it has restored what was left before it
    except KeeperGone:
        still = _restore_saved(options)
    if still:
        _complain(f"could not restore {', '.join(still)}; see dmesg, then try again")
        return EXIT_NOT_RESTORED
    return 0


def _restore_saved(options: Options) -> tuple[str, ...]:
    clock = SuspendAwareClock()
    with ExitStack() as undo:
        saves = SaveFolder(options.state_dir, _complain)
        saves.own()
        undo.callback(saves.close)
        left = [lock for lock in saves.load(options.settings.restore_clock_mhz) if not lock.yielded]
        if not left:
            return ()
        keeper = _keeper(options, _driver(options, clock, undo), saves, clock)
        keeper.recover(_PATIENCE_S)
        return keeper.restoring


def _ask(options: Options) -> int:
    try:
        with KeeperLink(options.socket, _PATIENCE_S) as link:
            if options.action == "status":
                sys.stdout.write(json.dumps(put_state(link.state()), indent=2) + "\n")
            else:
                rearmed = link.ask("rearm", gpus=options.named)["rearmed"]
                sys.stdout.write(f"re-armed: {', '.join(rearmed) or 'none needed it'}\n")
    except KeeperGone:
        if options.action == "status":
            raise
        with contextlib.closing(SaveFolder(options.state_dir, _complain)) as saves:
            saves.own()
            for lock in saves.load(None):
                if lock.yielded and (not options.named or lock.uuid in options.named):
                    saves.forget(lock.uuid)
                    sys.stdout.write(f"re-armed: {lock.uuid}\n")
    return 0


def _keeper(
    options: Options, driver: NvmlKeeperDriver, saves: SaveFolder, clock: SuspendAwareClock
) -> Keeper:
    claims = GpuClaims(options.claims_dir, "rlgov-keeper")
    restore_mhz = options.settings.restore_clock_mhz
    if restore_mhz is not None:
        for offer in driver.offers():
            if not offer.refusal and restore_mhz not in offer.supported_mhz:
                raise HardwareError(
                    f"{offer.uuid} has no SM clock of {restore_mhz} MHz to restore; "
                    "`nvidia-smi -q -d SUPPORTED_CLOCKS` lists them"
                )
    return Keeper(driver, saves, claims, options.settings, clock, say=say)


def _driver(options: Options, clock: SuspendAwareClock, undo: ExitStack) -> NvmlKeeperDriver:
    session = undo.enter_context(NvmlSession(clock))
    port: ClockPort | None = None
    if options.backend == "zeusd":
        # Here, because it needs an HTTP client, which takes more memory than all the rest.
        from rlgov.hardware.zeusd import ZeusdClockPort  # noqa: PLC0415

        port = undo.enter_context(ZeusdClockPort(options.zeusd_socket, session))
    return NvmlKeeperDriver(session, options.gpus, port=port, say=_complain)
