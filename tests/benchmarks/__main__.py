"""``python -m tests.benchmarks [PART ...]``: what the project's speed budgets are checked with.

Without a part named, all of them are measured. Of the core's, throughputs and seconds are processor time of
one core, so that another program on the machine does not count; latencies are wall time. Ratios are of
figures taken in the same run, BLIS's excepted.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
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
PARTS = {
    "core": "simulator, environments, training and decisions",
    "gateway": "the gateway before the engines",
    "load": "the load generator",
    "plugin": "the plugin in vLLM",
    "govern": "the governor",
}
"""Each but the first is a module beside this one, whose ``measure()`` returns its figures."""


def main() -> int:
    """Measure everything and print a table, or JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of the table")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    wanted = parser.parse_args()
    parts = wanted.parts or [*PARTS]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}; known: {', '.join(PARTS)}")
    progress = Console(stderr=True)
    load = os.getloadavg()[0]
    about: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the beginning",
        "versions": software_versions(),
    }
    figures: list[Figure] = []
    busy = ""
    if "core" in parts:
        figures, core = measure_core(progress)
        about |= core
        if core["wall_s"] > BUSY * core["cpu_s"]:
            busy = f"The machine was busy: {core['wall_s']:.0f} s for {core['cpu_s']:.0f} s of work. "
    for part in parts:
        if part != "core" and importlib.util.find_spec(f"tests.benchmarks.{part}") is not None:
            progress.print(f"{PARTS[part]} ...")
            figures += importlib.import_module(f"tests.benchmarks.{part}").measure()
    if wanted.json:
        document = about | {"figures": {figure.key: asdict(figure) for figure in figures}}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        show(figures, about)
    if busy:
        progress.print(busy + "Latencies are too high, throughputs may be low.")
    return 0


def measure_core(progress: Console) -> tuple[list[Figure], dict[str, Any]]:
    """Simulator, environments, training and decisions: one thread of work, so a busy machine shows."""
    begin_s, begin_cpu_s = CLOCK.monotonic_s(), cpu_s()
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
    about: dict[str, Any] = {
        "trace": trace.name,
        "requests": len(trace),
        "profile": simulator.PROFILE,
        "wall_s": round(CLOCK.monotonic_s() - begin_s, 1),
        "cpu_s": round(cpu_s() - begin_cpu_s, 1),
    }
    return figures, about


def show(figures: list[Figure], about: dict[str, Any]) -> None:
    """Print the table."""
    traced = "trace" in about
    title = f"{about['profile']} on {about['trace']}: {about['requests']:,} requests" if traced else None
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("note")
    for figure in figures:
        digits = 0 if figure.value >= 100 else 3 if figure.value < 1 else 1  # three figures, about
        table.add_row(figure.what, f"{figure.value:,.{digits}f}", figure.unit, figure.note)
    console = Console(width=120)
    console.print(table)
    work = f"; {about['cpu_s']} s of work in {about['wall_s']} s" if traced else ""
    console.print(f"{about['machine']}{work}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
