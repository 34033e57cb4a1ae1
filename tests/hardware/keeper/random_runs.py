"""Kills governors and keepers at random moments, many times, and counts how long the clocks take to be back.

``python -m tests.hardware.keeper.random_runs --runs 300 --seed 1``
"""

from __future__ import annotations

import argparse
import itertools
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlgov.hardware.keeper.options import LONGEST_PROMISED_S
from tests.fakes.nvml import NvmlStub, build
from tests.hardware.keeper.site import Site

CLIENT_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)
BOTH_ENDS = (signal.SIGKILL, signal.SIGSTOP)
KEEPER_ENDS = (signal.SIGKILL, signal.SIGTERM)
LONGEST_DOWNTIME_S = 1.0  # until the service manager has started the keeper again


@dataclass(frozen=True)
class Run:
    """What came of one run."""

    kind: str
    locked: bool  # something was locked when it was killed
    restored: bool
    took_s: float


class Runs:
    """Run after run on one machine; the keeper serves on until a run kills it.

    Args:
        site: The machine.
        seed: Fixes what is killed and when; the moments themselves depend on the machine.
    """

    def __init__(self, site: Site, seed: int) -> None:
        self._site = site
        self._rng = np.random.default_rng(seed)
        self._keeper: subprocess.Popen[str] | None = None

    def one(self) -> Run:
        """One run."""
        site, rng = self._site, self._rng
        if self._keeper is None:
            self._keeper = site.keeper()
        keeper = self._keeper
        uuids = site.stub.uuids
        groups = (uuids,) if rng.random() < 0.5 else (uuids[:2], uuids[2:])
        clients = [site.client(*group) for group in groups]
        site.clock.sleep_s(float(rng.uniform(0, 0.7)))
        locked = not site.restored()
        victims = rng.choice(["governor", "keeper", "both"], p=[0.5, 0.2, 0.3])
        if victims == "governor":
            number = CLIENT_ENDS[rng.integers(len(CLIENT_ENDS))]
            kind = f"governor {number.name}"
            began_s = site.clock.monotonic_s()
            for client in clients:
                client.send_signal(number)
        else:
            number = KEEPER_ENDS[rng.integers(len(KEEPER_ENDS))]
            kind = f"keeper {number.name}"
            began_s = site.clock.monotonic_s()
            if victims == "both":
                theirs = BOTH_ENDS[rng.integers(len(BOTH_ENDS))]
                kind = f"governor {theirs.name} and {kind}"
                for client in clients:
                    client.send_signal(theirs)
            keeper.send_signal(number)
            keeper.wait()
            site.clock.sleep_s(float(rng.uniform(0, LONGEST_DOWNTIME_S)))
            self._keeper = site.start_keeper()
        restored = site.wait_until(site.restored, LONGEST_PROMISED_S)
        took_s = site.clock.monotonic_s() - began_s
        for client in clients:
            client.kill()
            client.communicate()
            site.processes.remove(client)
        if victims != "governor":
            site.processes.remove(keeper)
            keeper.communicate()
            assert self._keeper is not None
            site.wait_for(self._keeper)
        site.wait_until(site.restored, LONGEST_PROMISED_S)
        site.stub.state.write_count = 0
        return Run(kind, locked, restored, took_s)


def main() -> int:
    """Print a table; 1 if a clock was not back in time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    by_kind: dict[str, list[Run]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        stub = NvmlStub(path / "nvml", build(path / "library"), 4)
        with Site(stub, path / "run") as site:
            runs = Runs(site, asked.seed)
            for _ in range(asked.runs):
                run = runs.one()
                by_kind[run.kind].append(run)
        stub.close()
    every = list(itertools.chain.from_iterable(by_kind.values()))
    sys.stdout.write(f"{'what was killed':45} runs  late  median s     max s\n")
    for kind, of_kind in sorted(by_kind.items()):
        took_s = [run.took_s for run in of_kind]
        late = sum(not run.restored for run in of_kind)
        sys.stdout.write(
            f"{kind:45} {len(of_kind):4d} {late:5d} {np.median(took_s):9.3f} {max(took_s):9.3f}\n"
        )
    late = sum(not run.restored for run in every)
    locked = sum(run.locked for run in every)
    sys.stdout.write(f"{len(every)} runs, {locked} with locks in force, {late} late\n")
    return int(late > 0)


if __name__ == "__main__":
    sys.exit(main())
