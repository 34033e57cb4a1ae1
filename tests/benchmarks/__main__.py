"""``python -m tests.benchmarks``: what the project's speed budgets are checked with.

Throughputs and seconds are processor time of one core, so that another program on the machine does not
count; latencies are wall time. Ratios are of figures taken in the same run, BLIS's excepted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from rlgov.agents.bundle import software_versions
from tests.benchmarks import simulator
from tests.benchmarks.timing import CLOCK, Figure, cpu_s, peak_mb

BUSY = 1.15  # wall time over processor time from which on a warning is due


def main() -> int:
    """Measure everything and print a table, or JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of the table")
    wanted = parser.parse_args()
    progress = Console(stderr=True)
    begin_s, begin_cpu_s = CLOCK.monotonic_s(), cpu_s()
    load = os.getloadavg()[0]

    progress.print("simulator ...")
    trace = simulator.benchmark_trace()
    figures = simulator.measure(trace)
    figures.append(Figure("simulator_peak_mb", peak_mb(), "MB", "peak memory so far", "simulator only"))
    # Imported late: they bring in torch, which must not count as the simulator's memory.
    from tests.benchmarks import environments, learning

    progress.print("environments ...")
    figures += environments.measure(trace)
    progress.print("training and decisions ...")
    figures += learning.measure(trace)
    figures.append(Figure("peak_mb", peak_mb(), "MB", "peak memory of all", "torch included"))

    wall_s = CLOCK.monotonic_s() - begin_s
    processor_s = cpu_s() - begin_cpu_s
    about: dict[str, Any] = {
        "trace": trace.name,
        "requests": len(trace),
        "profile": simulator.PROFILE,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the beginning",
        "versions": software_versions(),
        "wall_s": round(wall_s, 1),
        "cpu_s": round(processor_s, 1),
    }
    if wanted.json:
        document = about | {"figures": {figure.key: asdict(figure) for figure in figures}}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        show(figures, about)
    if wall_s > BUSY * processor_s:
        progress.print(
            f"The machine was busy: {wall_s:.0f} s for {processor_s:.0f} s of work. "
            "Latencies are too high, throughputs may be low."
        )
    return 0


def show(figures: list[Figure], about: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(
        title=f"{about['profile']} on {about['trace']}: {about['requests']:,} requests", title_justify="left"
    )
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("note")
    for figure in figures:
        digits = 0 if figure.value >= 100 else 3 if figure.value < 1 else 1  # three figures, about
        table.add_row(figure.what, f"{figure.value:,.{digits}f}", figure.unit, figure.note)
    console = Console(width=120)
    console.print(table)
    console.print(f"{about['machine']}; {about['cpu_s']} s of work in {about['wall_s']} s", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
