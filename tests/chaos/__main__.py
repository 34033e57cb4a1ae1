"""``python -m tests.chaos``: does anything stay locked, whatever happens?

``--runs 200`` kills real governors and real keepers at random. ``--soak 24`` governs for so many hours of
virtual time, with random faults of everything. Prints what came of it; exits with 1 where it was too much.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rlgov.clock import SystemClock
from tests.chaos.runs import many_runs, summary
from tests.chaos.soak import soak

if TYPE_CHECKING:
    from tests.chaos.runs import Outcome
    from tests.chaos.soak import Tally

PROGRESS = Console(stderr=True)
CLOCK = SystemClock()


def main() -> int:
    """Break things, count, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=0, help="real processes: how many runs")
    parser.add_argument("--first", type=int, default=0, help="number of the first run, to repeat one")
    parser.add_argument("--workers", type=int, default=6, help="how many runs at once")
    parser.add_argument("--soak", type=float, nargs="?", const=24.0, default=0.0, help="virtual hours (24)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    wanted = parser.parse_args()
    if not wanted.runs and not wanted.soak:
        parser.error("give --runs, --soak or both")
    results: dict[str, Any] = {"seed": wanted.seed}
    broken = 0
    if wanted.runs:
        began_s = CLOCK.monotonic_s()
        outcomes = many_runs(wanted.runs, wanted.seed, wanted.workers, _told, wanted.first)
        results["runs"] = summary(outcomes) | {"took_s": CLOCK.monotonic_s() - began_s}
        _print_runs(results["runs"])
        broken += results["runs"]["violations"]
    if wanted.soak:
        began_s = CLOCK.monotonic_s()
        with tempfile.TemporaryDirectory() as folder:
            tally = soak(wanted.soak, wanted.seed, Path(folder), _hour)
        results["soak"] = tally.to_json() | {"took_s": CLOCK.monotonic_s() - began_s}
        _print_soak(tally)
        broken += len(tally.broken) + len(tally.leaked)
    if wanted.out is not None:
        wanted.out.parent.mkdir(parents=True, exist_ok=True)
        wanted.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return int(broken > 0)


def _told(outcome: Outcome) -> None:
    verdict = f"BROKEN: {outcome.violation}" if outcome.violation else "kept"
    PROGRESS.print(f"{outcome.number:5d}  {outcome.fault} ({outcome.moment}): {verdict}", highlight=False)


def _hour(tally: Tally) -> None:
    PROGRESS.print(
        f"{tally.ticks} ticks, {tally.locks} locks, {tally.governors} governors, {tally.keepers} keepers, "
        f"{sum(tally.faults.values())} faults",
        highlight=False,
    )


def _print_runs(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['runs']} runs in {found['took_s']:.0f} s: {found['violations']} broken")
    for name in ("fault", "runs", "with locks", "broken", "median, s", "longest, s"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for name, row in found["faults"].items():
        times = ("-" if row[which] is None else f"{row[which]:.2f}" for which in ("median_s", "longest_s"))
        table.add_row(name, str(row["runs"]), str(row["with_locked_gpus"]), str(row["violations"]), *times)
    Console(width=110).print(table)


def _print_soak(tally: Tally) -> None:
    mib = 2.0**20
    console = Console(width=110, highlight=False)
    console.print(
        f"{tally.hours:g} h: {tally.ticks} ticks ({tally.acting} acting), {tally.locks} locks, "
        f"{tally.governors} governors, {tally.keepers} keepers, {sum(tally.faults.values())} faults of "
        f"{len(tally.faults)} kinds\n"
        f"broken: {len(tally.broken)}; leaked: {len(tally.leaked)}; longest without a holder: "
        f"{tally.longest_s:.2f} s\n"
        f"objects: {tally.objects[1]} after an hour, {tally.objects[-1]} at the end; resident: "
        f"{tally.resident_bytes[1] / mib:.1f} MiB, {tally.resident_bytes[-1] / mib:.1f} MiB\n"
        f"journal: {tally.journal_files} files, {tally.journal_bytes / mib:.2f} MiB, "
        f"{tally.journal_dropped} entries dropped"
    )
    for line in tally.broken + tally.leaked:
        console.print(line)


if __name__ == "__main__":
    sys.exit(main())
