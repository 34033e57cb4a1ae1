"""``python -m tests.fidelity``: a real vLLM on this machine's CPU against the simulator.

A tiny model is served by vLLM, its iterations are calibrated from closed loops, and then
other traffic is sent at several loads and under several batch caps. The simulator gets the same traffic and
the profile of the calibration. Prints how far TTFT, TPOT and E2E are apart, misses included.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from rlgov.errors import RlgovError
from tests.fakes.tiny_model import Shape
from tests.fidelity.analyse import analyse
from tests.fidelity.measured import Measured
from tests.fidelity.plan import MAX_MODEL_LEN, Plan
from tests.fidelity.report import print_tables, write_report

PROGRAM = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "vllm"
SHAPE = Shape(hidden=384, layers=16, heads=6, kv_heads=6, intermediate=768, max_model_len=MAX_MODEL_LEN)


def main() -> int:
    """Measure, compare, print, write."""
    plan = Plan()
    parser = argparse.ArgumentParser(prog="python -m tests.fidelity", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"), help="folder of the results")
    parser.add_argument("--vllm", type=Path, default=PROGRAM, help="the vllm program; rlgov beside it")
    parser.add_argument("--duration-s", type=float, default=plan.duration_s, help="of each cell")
    parser.add_argument("--repeats", type=int, default=plan.repeats, help="of each cell")
    parser.add_argument("--retries", type=int, default=plan.retries, help="of what was disturbed")
    parser.add_argument("--seed", type=int, default=plan.seed, help="of the traffic")
    parser.add_argument("--realtime", action="store_true", help="priority, where the machine is not idle")
    parser.add_argument("--again", action="store_true", help="compare what lies in --out anew")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    wanted = parser.parse_args()
    progress = Console(stderr=True)
    kept = wanted.out / "measured.json"
    try:
        if wanted.again:
            measured = Measured.read(kept)
        else:
            plan = replace(
                plan,
                duration_s=wanted.duration_s,
                repeats=wanted.repeats,
                retries=wanted.retries,
                seed=wanted.seed,
            )
            measured = _measure(wanted.vllm, plan, wanted.out, progress, realtime=wanted.realtime)
            measured.write(kept)
        analysis = analyse(measured)
    except FileNotFoundError as error:
        progress.print(f"fidelity: {error}", style="red")
        return 2
    except RlgovError as error:
        progress.print(f"fidelity: {error}", style="red")
        return 2
    print_tables(measured, analysis, Console(width=200))
    for path in write_report(measured, analysis, wanted.out):
        progress.print(f"wrote {path}")
    missed = [v for v in analysis.verdicts if not v.met]
    return int(wanted.check and bool(missed))


def _measure(program: Path, plan: Plan, out: Path, progress: Console, *, realtime: bool) -> Measured:
    if not program.is_file():
        msg = f"there is no vLLM at {program}; `make vllm` installs one for the CPU"
        raise FileNotFoundError(msg)
    from tests.fidelity.engine import RealEngine
    from tests.fidelity.measure import measure

    out.mkdir(parents=True, exist_ok=True)
    progress.print("starting vLLM (a minute or two) ...")
    with RealEngine.started(program, SHAPE, plan, out, realtime=realtime) as engine:
        return measure(engine, plan, SHAPE, progress.print)


if __name__ == "__main__":
    sys.exit(main())
