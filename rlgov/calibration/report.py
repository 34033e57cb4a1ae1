"""Every error that was asked for, beside what the fits come to. A miss is printed like a hit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlgov.calibration import decode_power, decode_time
from rlgov.calibration.clock_sweeps import fit_desktop, fit_jetson
from rlgov.calibration.dense_fit import fit_sweep_error
from rlgov.calibration.interpolation import leave_batches_out
from rlgov.calibration.published import read_ml_energy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import pandas as pd

    from rlgov.calibration.clock_sweeps import Sweep
    from rlgov.calibration.decode_power import PowerFit
    from rlgov.calibration.decode_time import TimeFit

_MODELS = "leave-one-model-out, mean over rows"
_SHAPES = "leave-one-architecture-out, with all its finetunes and precisions"
_BATCHES = "leave-one-batch-out, mean over configurations"


@dataclass(frozen=True, slots=True)
class Line:
    """One error, in per cent."""

    what: str
    how: str
    asked: float | None  # at most; None where nothing was asked
    measured: float
    rows: int
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the asked error is kept, to its one decimal; None where nothing was asked."""
        return None if self.asked is None else round(self.measured, 1) <= self.asked


def published_report(data: Path, say: Callable[[str], None] = lambda _: None) -> list[Line]:
    """Fit everything published, and hold it against what was asked.

    Args:
        data: folder of the published tables.
        say: is told what is being fitted.

    Raises:
        CalibrationError: A table is missing or damaged.
    """
    frame = read_ml_energy(data)
    lines: list[Line] = []
    for gpu in ("H100", "B200"):
        say(f"decode time on {gpu}")
        lines += _time_lines(frame, gpu)
        say(f"decode power on {gpu}")
        lines += _power_lines(frame, gpu)
    say("prefill power over clock and prompt length")
    sweep, rows = fit_sweep_error(data)
    what, how = "H100 prefill power over clock and prompt length", "in sample, TDP plateau included"
    lines.append(Line(what, how, 8.0, 100.0 * sweep, rows))
    say("clock sweeps of desktop cards and Jetson")
    lines += [_sweep_line(found, asked) for found, asked in _asked_sweeps(data)]
    return lines


def _time_lines(frame: pd.DataFrame, gpu: str) -> list[Line]:
    dense = decode_time.fit_time(frame, gpu, "dense")
    mixed = decode_time.fit_time(frame, gpu, "experts", dense.errors.best.values)
    asked = {"H100": (9.0, 20.0), "B200": (13.0, None)}[gpu]
    note = "reasoning rows of Qwen3 by a host floor of their own" if gpu == "B200" else ""
    weak = "" if asked[1] is not None else "nothing asked: its rows jump where the host is late"
    lines = _left_out(f"{gpu} dense, decode time", dense, asked[0], note)
    lines += _left_out(f"{gpu} mixture of experts, decode time", mixed, asked[1], weak)
    for kind, fit in (("dense", dense), ("mixture of experts", mixed)):
        host = "rows jump where the host is late" if gpu == "B200" else ""
        lines.append(_batch_line(f"{gpu} {kind}, decode time", _time_batches(fit), 5.0, len(fit.work), host))
    return lines


def _power_lines(frame: pd.DataFrame, gpu: str) -> list[Line]:
    asked = {"H100": 10.0, "B200": 14.0}[gpu]
    lines: list[Line] = []
    for kind, label, bar in (
        ("all", "all models", asked),
        ("dense", "dense, fitted alone", asked),
        ("experts", "mixture of experts, fitted alone", asked if gpu == "H100" else None),
    ):
        fit = decode_power.fit_power(frame, gpu, kind)
        lines += _left_out(f"{gpu} {label}, power", fit, bar)
        if kind == "all":
            batches = _power_batches(fit)
            lines.append(_batch_line(f"{gpu} {label}, power", batches, 2.5, len(fit.work)))
    return lines


def _time_batches(fit: TimeFit) -> dict[str, float]:
    work = fit.work
    physics = decode_time.iteration_s(work, fit.card, fit.parameters)
    return leave_batches_out(work.curve, work.batch, work.median_s, physics)


def _power_batches(fit: PowerFit) -> dict[str, float]:
    work = fit.work
    physics = decode_power.power_w(work, fit.card, fit.parameters)
    return leave_batches_out(work.curve, work.batch, work.power_w, physics)


def _left_out(what: str, fit: TimeFit | PowerFit, asked: float | None, note: str = "") -> list[Line]:
    errors, shapes = fit.errors, fit.by_shape
    worst, error = max(errors.by_group.items(), key=lambda item: item[1])
    known = f"{len(errors.best.values)} parameters, in sample {errors.in_sample:.1%}"
    more = f"{known}; mean over models {errors.over_groups:.1%}, worst {worst} {error:.0%}"
    text = f"{more}; {note}" if note else more
    count = len(errors.outside)
    return [
        Line(what, _MODELS, asked, 100.0 * errors.over_rows, count, text),
        Line(what, _SHAPES, None, 100.0 * shapes.over_rows, count, f"{len(shapes.by_group)} architectures"),
    ]


def _batch_line(what: str, errors: Mapping[str, float], asked: float, rows: int, note: str = "") -> Line:
    values = list(errors.values())
    more = f"{len(values)} configurations; median {np.median(values):.1%}, worst {max(values):.0%}"
    text = f"{more}; {note}" if note else more
    return Line(what, _BATCHES, asked, 100.0 * float(np.mean(values)), rows, text)


def _asked_sweeps(data: Path) -> list[tuple[Sweep, float]]:
    asked = {
        "RTX 3090 decode, time": 0.3,
        "RTX 3090 decode, power": 1.8,
        "RTX 3090 prefill, time": 0.8,
        "RTX 3090 prefill, power": 1.5,
        "RTX 5090 decode, full memory clock, time": 3.3,
        "RTX 5090 decode, half memory clock, time": 1.8,
        "RTX 5090 decode, all clocks, power": 2.8,
        "Jetson Orin decode, time": 0.9,
        "Jetson Orin decode, power": 0.7,
    }
    return [(sweep, asked[sweep.name]) for sweep in (*fit_desktop(data), *fit_jetson(data))]


def _sweep_line(sweep: Sweep, asked: float) -> Line:
    error = sweep.in_sample if sweep.left_out is None else sweep.left_out
    how = "in sample" if sweep.left_out is None else "leave-one-point-out"
    values = ", ".join(f"{name} {value:.3g}" for name, value in sweep.values.items())  # noqa: PD011  # no frame's
    return Line(sweep.name, how, asked, 100.0 * error, sweep.points, values)
