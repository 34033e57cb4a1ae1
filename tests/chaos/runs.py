"""Random runs: governor and keeper as real processes, a fault at a random moment, and what is left locked.

The promise under test: whatever happens to the governor, the keeper or both, within 15 s every GPU is back at
the clocks that were found, or higher. A keeper that dies is started again, as systemd does it.
"""

from __future__ import annotations

import statistics
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from signal import SIGABRT, SIGCONT, SIGINT, SIGKILL, SIGSEGV, SIGSTOP, SIGTERM, Signals
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rlgov.engine.control.client import StackClient
from rlgov.errors import RlgovError
from rlgov.hardware.keeper.values import Phase
from tests.chaos.scene import GPUS, PATIENCE_S, POLL_S, PROMISED_S, SLOW, Nursery, Scene
from tests.fakes.nvml import build

if TYPE_CHECKING:
    from collections.abc import Callable

    Act = Callable[[], Any]

WATCHDOG_S: Final = 2.0  # after so long systemd kills a keeper that hangs; the unit file says more
LARGEST_CAP: Final = 256
POLICIES: Final = (SLOW, "random")
RESTORED_MHZ: Final = (None, 1620)
FOREIGN_MHZ: Final = 1200
SETTLED: Final = frozenset({Phase.FREE, Phase.YIELDED})


class Fault(ABC):
    """One kind of fault: what is done, and when, in seconds after it begins.

    Args:
        scene: Where.
        rng: Random.
    """

    name = ""
    ends_governor = True

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene = scene
        self.rng = rng
        self.foreign: set[int] = set()  # GPUs that somebody else sets now
        self.yielding = 0  # GPUs that may be left to somebody else
        self.acts: list[tuple[float, Act]] = []
        self.plan()

    @abstractmethod
    def plan(self) -> None:
        """Fill in what is done."""

    def void(self) -> bool:
        """Whether nothing came of it, so that nothing has to be given back."""
        return False

    def after(self, most_s: float) -> float:
        """A random moment."""
        return float(self.rng.uniform(0.0, most_s))

    def kill_governor(self, number: Signals, at_s: float = 0.0) -> None:
        self.acts.append((at_s, lambda: self.scene.signal(self.scene.governor, number)))

    def kill_keeper(self, number: Signals, at_s: float = 0.0) -> None:
        self.acts.append((at_s, lambda: self.scene.signal(self.scene.keeper, number)))

    def start_keeper(self, at_s: float, *, stop_post: bool) -> None:
        def again() -> None:
            assert self.scene.keeper is not None
            self.scene.keeper.wait(PATIENCE_S)
            if stop_post:
                self.scene.stop_post()
            self.scene.start_keeper()

        self.acts.append((at_s, again))


def _governor_gets(number: Signals) -> type[Fault]:
    class Signalled(Fault):
        name = f"governor {number.name}"

        def plan(self) -> None:
            self.kill_governor(number)

    return Signalled


class StoppedForGood(Fault):
    """It hangs, and is killed much later."""

    name = "governor SIGSTOP"

    def plan(self) -> None:
        self.kill_governor(SIGSTOP)


class StoppedForAWhile(Fault):
    """It hangs until its lease is lost, and goes on."""

    name = "governor SIGSTOP, later SIGCONT"
    ends_governor = False

    def plan(self) -> None:
        self.kill_governor(SIGSTOP)
        self.kill_governor(SIGCONT, self.scene.lease_s + 0.5 + self.after(1.0))


class KeeperKilled(Fault):
    """SIGKILL of the keeper, and a restart."""

    name = "keeper SIGKILL, restarted"
    ends_governor = False

    def plan(self) -> None:
        self.kill_keeper(SIGKILL)
        self.start_keeper(self.after(1.0), stop_post=False)


class KeeperKilledStopPost(Fault):
    """As systemd does it: the clocks are restored before the restart."""

    name = "keeper SIGKILL, ExecStopPost, restarted"
    ends_governor = False

    def plan(self) -> None:
        self.kill_keeper(SIGKILL)
        self.start_keeper(self.after(0.5), stop_post=True)


class KeeperEnded(Fault):
    """An upgrade."""

    name = "keeper SIGTERM, restarted"
    ends_governor = False

    def plan(self) -> None:
        self.kill_keeper(SIGTERM)
        self.start_keeper(self.after(0.5), stop_post=False)


class KeeperHangs(Fault):
    """It hangs until systemd's watchdog kills it."""

    name = "keeper SIGSTOP, killed by its watchdog, restarted"
    ends_governor = False

    def plan(self) -> None:
        self.kill_keeper(SIGSTOP)
        self.kill_keeper(SIGABRT, WATCHDOG_S)
        self.kill_keeper(SIGCONT, WATCHDOG_S)  # as systemd does, or a stopped process would not get it
        self.start_keeper(WATCHDOG_S, stop_post=True)


class BothKilled(Fault):
    """Both at once."""

    name = "both SIGKILL, keeper restarted"

    def plan(self) -> None:
        self.kill_governor(SIGKILL)
        self.kill_keeper(SIGKILL, self.after(0.05))
        self.start_keeper(0.1 + self.after(1.0), stop_post=bool(self.rng.integers(2)))


class StoppedAndKilled(Fault):
    """The governor hangs, the keeper dies."""

    name = "governor SIGSTOP and keeper SIGKILL, keeper restarted"

    def plan(self) -> None:
        self.kill_governor(SIGSTOP)
        self.kill_keeper(SIGKILL, self.after(1.0))
        self.start_keeper(1.0 + self.after(1.0), stop_post=False)


class DriverRefuses(Fault):
    """The governor is killed while the driver takes no locks and no resets on one GPU."""

    name = "governor SIGKILL while the driver fails"

    def plan(self) -> None:
        stub = self.scene.stub
        number = int(self.rng.integers(GPUS))
        code = str(self.rng.choice(["TIMEOUT", "UNKNOWN", "IN_USE"]))

        def fail() -> None:
            for function in ("nvmlDeviceResetGpuLockedClocks", "nvmlDeviceSetGpuLockedClocks"):
                stub.fail(code, function, gpu=number)

        self.acts.append((0.0, fail))
        self.kill_governor(SIGKILL, self.after(0.3))
        self.acts.append((0.3 + self.after(2.0), stub.heal))


class ForeignLock(Fault):
    """Somebody else takes one GPU over."""

    name = "foreign lock"
    ends_governor = False

    def plan(self) -> None:
        number = int(self.rng.integers(GPUS))
        self.foreign.add(number)
        self.yielding = 1
        self.acts.append((0.0, lambda: self.scene.foreign_lock(number, FOREIGN_MHZ)))

    def void(self) -> bool:
        """The governor changed the clock before anybody could notice: the last one to write has it."""
        return self.scene.governed() and all(
            self.scene.stub.locks_mhz()[number] != FOREIGN_MHZ for number in self.foreign
        )


class ForeignReset(Fault):
    """Somebody removes all locks (``nvidia-smi -rgc``) while the governor is killed."""

    name = "foreign reset and governor SIGKILL"

    def plan(self) -> None:
        self.yielding = GPUS

        def reset() -> None:
            for number in range(GPUS):
                self.scene.foreign_lock(number, 0)

        self.acts.append((0.0, reset))
        self.kill_governor(SIGKILL, self.after(1.0))


class StackGone(Fault):
    """Nothing can be seen any more: the governor itself gives back."""

    name = "stack does not answer"
    ends_governor = False

    def plan(self) -> None:
        def gone() -> None:
            self.scene.stack.gone = True

        self.acts.append((0.0, gone))


FAULTS: Final[tuple[type[Fault], ...]] = (
    *map(_governor_gets, (SIGTERM, SIGINT, SIGKILL, SIGSEGV, SIGABRT)),
    StoppedForGood,
    StoppedForAWhile,
    KeeperKilled,
    KeeperKilledStopPost,
    KeeperEnded,
    KeeperHangs,
    BothKilled,
    StoppedAndKilled,
    DriverRefuses,
    ForeignLock,
    ForeignReset,
    StackGone,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run."""

    number: int
    fault: str
    moment: str  # governed or starting
    restored_s: float | None  # from the fault until every GPU had been restored; None: never
    locked: int  # GPUs that were locked when it happened
    violation: str  # of the promise; empty: it was kept


def one_run(seed: int, number: int, library: Path, nursery: Nursery) -> Outcome:
    """A fault, chosen by the seed."""
    rng = np.random.default_rng((seed, number))
    kind = FAULTS[number % len(FAULTS)]
    moment = "starting" if rng.random() < 0.25 else "governed"
    scene = Scene(
        library,
        lease_s=1.0,
        interval_s=0.25,
        policy=str(rng.choice(POLICIES)),
        restore_mhz=RESTORED_MHZ[int(rng.integers(len(RESTORED_MHZ)))],
        seed=number,
        nursery=nursery,
    )
    with scene:
        scene.start_keeper()
        scene.start_governor()
        if moment == "governed":
            scene.until_governed()
        scene.clock.sleep_s(float(rng.uniform(0.0, 1.0)))
        fault = kind(scene, rng)
        locked = sum(not scene.as_found(gpu) for gpu in range(GPUS))
        try:
            restored_s = _strike(scene, fault)
            violation = _afterwards(scene, fault)
        except AssertionError as error:
            return Outcome(number, kind.name, moment, None, locked, str(error))
    return Outcome(number, kind.name, moment, restored_s, locked, violation)


def _strike(scene: Scene, fault: Fault) -> float:
    """Do it, and wait until every GPU has been as found since; how long that took."""
    began_s = scene.clock.monotonic_s()
    pending = sorted(fault.acts, key=lambda act: act[0])
    written = scene.stub.state.write_count
    open_gpus = set(range(GPUS)) - fault.foreign
    restored_s = 0.0
    first = True
    while pending or open_gpus:
        elapsed_s = scene.clock.monotonic_s() - began_s
        if elapsed_s > PROMISED_S:
            locks_mhz = scene.stub.locks_mhz()
            raise AssertionError(f"after {PROMISED_S:g} s still locked: {locks_mhz}; {scene.said()}")
        while pending and elapsed_s >= pending[0][0]:
            pending.pop(0)[1]()
        if not first:
            # A governor that lives locks them again soon, so the driver's own list of writes counts, too.
            back = {gpu for gpu, mhz in scene.stub.writes[written:] if mhz == scene.restore_mhz}
            now_open = {gpu for gpu in open_gpus - back if not scene.as_found(gpu) and not fault.void()}
            if open_gpus and not now_open:
                restored_s = scene.clock.monotonic_s() - began_s
            open_gpus = now_open
        first = False
        scene.clock.sleep_s(POLL_S)
    return restored_s


def _afterwards(scene: Scene, fault: Fault) -> str:
    """What is wrong after the fault, once everybody still there was asked to end."""
    governor, keeper = scene.governor, scene.keeper
    assert governor is not None
    assert keeper is not None
    if fault.ends_governor:
        scene.signal(governor, SIGKILL)
        governor.wait(PATIENCE_S)
        scene.until("nothing is locked for a dead governor", lambda: _given_back(scene, fault), PROMISED_S)
    else:
        scene.signal(governor, SIGTERM)
        scene.until("the governor gives back and ends", lambda: not governor.running(), PATIENCE_S)
        scene.until("nothing is locked after its end", lambda: _given_back(scene, fault), PROMISED_S)
    # A wish that was on its way when its sender died is still carried out, and taken back at once.
    scene.until("the keeper has done what is left to do", lambda: scene.phases() <= SETTLED)
    written = scene.stub.state.write_count
    scene.stack.gone = False
    with StackClient(scene.folder / "stack.sock", timeout_s=PATIENCE_S) as client:
        scene.until("the batch cap is open", lambda: _cap(client) == LARGEST_CAP, PROMISED_S)
    if scene.stub.state.write_count != written:
        return "something was written after the restore, with nobody alive to want it"
    scene.signal(keeper, SIGTERM)
    keeper.wait(PATIENCE_S)
    if keeper.code != 0:
        return f"the keeper ended with {keeper.code}: {scene.said()}"
    if not _given_back(scene, fault):
        return f"locked at the end: {scene.stub.locks_mhz()}"
    left = scene.saved()
    if len(left) > fault.yielding:
        return f"saved locks at the end: {left}"
    return ""


def _given_back(scene: Scene, fault: Fault) -> bool:
    """Whether nothing is locked by us. In doubt a foreign lock is removed, too: that makes the GPU faster."""
    return all(
        scene.as_found(gpu) or (gpu in fault.foreign and scene.stub.locks_mhz()[gpu] == FOREIGN_MHZ)
        for gpu in range(GPUS)
    )


def _cap(client: StackClient) -> int | None:
    try:
        return client.state().batch_cap
    except RlgovError:
        return None


def many_runs(
    runs: int, seed: int, workers: int, told: Callable[[Outcome], None], first: int = 0
) -> tuple[Outcome, ...]:
    """So many runs, some at once.

    Args:
        runs: How many.
        seed: Of the random parts.
        workers: How many at once.
        told: Called with each outcome.
        first: Number of the first: the number and the seed make a run.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        with closing(Nursery(library)) as nursery, ThreadPoolExecutor(workers) as pool:
            one = partial(one_run, seed, library=library, nursery=nursery)
            outcomes = []
            for outcome in pool.map(one, range(first, first + runs)):
                outcomes.append(outcome)
                told(outcome)
    return tuple(outcomes)


def summary(outcomes: tuple[Outcome, ...]) -> dict[str, Any]:
    """Counts by fault, times to restore, and every violation."""
    by_fault: dict[str, Any] = {}
    for name in dict.fromkeys(outcome.fault for outcome in outcomes):
        these = [outcome for outcome in outcomes if outcome.fault == name]
        took_s = [one.restored_s for one in these if one.restored_s is not None and one.locked]
        by_fault[name] = {
            "runs": len(these),
            "with_locked_gpus": sum(one.locked > 0 for one in these),
            "violations": sum(bool(one.violation) for one in these),
            "median_s": statistics.median(took_s) if took_s else None,
            "longest_s": max(took_s, default=None),
        }
    return {
        "runs": len(outcomes),
        "violations": sum(bool(outcome.violation) for outcome in outcomes),
        "with_locked_gpus": sum(outcome.locked > 0 for outcome in outcomes),
        "longest_s": max((one.restored_s for one in outcomes if one.restored_s is not None), default=None),
        "moments": dict(Counter(outcome.moment for outcome in outcomes)),
        "faults": by_fault,
        "broken": [asdict(outcome) for outcome in outcomes if outcome.violation],
    }
