"""Clock sweeps of desktop cards and a Jetson, fitted with the forms that the simulator uses.

    t(x) = max(host, memory + compute / x),                       x = clock / highest clock of the sweep
    P(x) = constant + (idle + busy x activity) x V(x)^2,          V = max(1, 1 + slope (x - knee))

The profiles also let memory slow down below a clock fraction of 0.43. These sweeps reach down to 0.06 and
show nothing of it (fitted, it lands below every point), so that stays a prior of data-centre cards.
The Jetson's host floor is joined by a norm: a hard maximum has a kink that its sweep does not show. These
cards are not those of the shipped profiles; the sweeps say whether the forms hold, and what the priors of
data-centre cards are taken from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlgov.calibration.fitting import Bound, solve
from rlgov.calibration.published import check_columns, read_desktop, read_jetson

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Predict = Callable[["Mapping[str, float]", "Mapping[str, Floats]"], Floats]

_NOISE = 0.01  # clocks and meters of a sweep are good to about this; larger residuals count linearly
_TIME = {"memory": Bound(0.5, 0.0, 3.0), "compute": Bound(0.5, 0.0, 3.0)}
_HOST = {"host": Bound(1.0, 0.5, 1.5)}
_VOLTAGE = {"knee": Bound(0.65, 0.3, 0.95), "slope": Bound(1.2, 0.0, 6.0)}


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a fit of one sweep came to; errors are mean absolute, relative."""

    name: str
    points: int
    values: dict[str, float]
    in_sample: float
    left_out: float | None  # every point left out once; None where it was not done


def clock_time(p: Mapping[str, float], data: Mapping[str, Floats]) -> Floats:
    """Time in units of the fastest point."""
    x = data["x"]
    return np.asarray(np.maximum(p.get("host", 0.0), p["memory"] + p["compute"] / x))


def voltage_squared(p: Mapping[str, float], x: Floats) -> Floats:
    """V^2 in units of the lowest voltage."""
    return np.asarray(np.maximum(1.0, 1.0 + p["slope"] * (x - p["knee"])) ** 2)


def clock_power(p: Mapping[str, float], data: Mapping[str, Floats]) -> Floats:
    """Watts of one card at constant activity."""
    return np.asarray(p["constant"] + p["busy"] * data["x"] * voltage_squared(p, data["x"]))


def memory_power(p: Mapping[str, float], data: Mapping[str, Floats]) -> Floats:
    """Watts of one card whose memory clock and activity change, too."""
    clocked = (p["idle"] + p["busy"] * data["activity"]) * data["x"] * voltage_squared(p, data["x"])
    return np.asarray(p["constant"] + p["memory"] * data["memory"] + p["moved"] * data["activity"] + clocked)


def host_norm_time(p: Mapping[str, float], data: Mapping[str, Floats]) -> Floats:
    """Seconds of an iteration of the Jetson."""
    work = (p["fixed"] + p["sequence"] * data["batch"]) / data["x"]
    return np.asarray((p["host"] ** p["norm"] + work ** p["norm"]) ** (1.0 / p["norm"]))


def busy_power(p: Mapping[str, float], data: Mapping[str, Floats]) -> Floats:
    """Watts of the Jetson, whose GPU works during a share of the iteration."""
    clocked = (p["idle"] + p["busy"] * data["activity"]) * data["x"] * voltage_squared(p, data["x"])
    return np.asarray(p["constant"] + clocked)


def _fit(
    name: str, bounds: Mapping[str, Bound], predict: Predict, data: dict[str, Floats], measured: Floats,
    *, leave_out: bool,
) -> Sweep:  # fmt: skip
    def fitted(chosen: NDArray[np.bool_]) -> dict[str, float]:
        some = {key: values[chosen] for key, values in data.items()}
        solution = solve(bounds, lambda p: np.log(predict(p, some) / measured[chosen]), outlier=_NOISE)
        return solution.values  # noqa: PD011  # a solution's, no frame's

    every = np.ones(len(measured), dtype=np.bool_)
    best = fitted(every)
    inside = float(np.mean(np.abs(predict(best, data) / measured - 1.0)))
    outside = None
    if leave_out:
        errors = []
        for i in range(len(measured)):
            others = every.copy()
            others[i] = False
            one = {key: values[i : i + 1] for key, values in data.items()}
            errors.append(abs(float(predict(fitted(others), one)[0] / measured[i] - 1.0)))
        outside = float(np.mean(errors))
    return Sweep(name, len(measured), best, inside, outside)


def _clocks(frame: pd.DataFrame) -> dict[str, Floats]:
    check_columns(frame, ("sm_mhz",), (), "clock sweep")
    clock = frame["sm_mhz"].to_numpy(np.float64)
    return {"x": clock / clock.max()}


def fit_desktop(data: Path) -> list[Sweep]:
    """Time and power of the desktop sweeps that publish an SM clock."""
    frame = read_desktop(data)
    sweeps = []
    for phase in ("decode", "prefill"):
        rows = frame[(frame["gpu"] == "RTX3090") & (frame["phase"] == phase) & frame["sm_mhz"].notna()]
        x = _clocks(rows)
        seconds = 1.0 / rows["tok_s"].to_numpy(np.float64)
        watts = rows["power_w"].to_numpy(np.float64)
        power = {"constant": Bound(120.0, 10.0, 200.0), "busy": Bound(100.0, 10.0, 300.0), **_VOLTAGE}
        sweeps += [
            _fit(f"RTX 3090 {phase}, time", _TIME, clock_time, x, seconds / seconds.min(), leave_out=True),
            _fit(f"RTX 3090 {phase}, power", power, clock_power, x, watts, leave_out=True),
        ]
    locked = frame[(frame["gpu"] == "RTX5090") & (frame["control"] == "clock_lock")]
    for name, memory_mhz, bounds in (("full", 14001, _TIME), ("half", 7001, {**_TIME, **_HOST})):
        rows = locked[locked["mem_mhz"] == memory_mhz]
        seconds = 1.0 / rows["tok_s"].to_numpy(np.float64)
        x = {"x": rows["sm_mhz"].to_numpy(np.float64) / float(locked["sm_mhz"].max())}
        label = f"RTX 5090 decode, {name} memory clock, time"
        sweeps.append(_fit(label, bounds, clock_time, x, seconds / seconds.min(), leave_out=True))
    columns = _clocks(locked) | {
        "memory": locked["mem_mhz"].to_numpy(np.float64) / float(locked["mem_mhz"].max()),
        "activity": locked["tok_s"].to_numpy(np.float64) / float(locked["tok_s"].max()),
    }
    power = {
        "constant": Bound(40.0, 5.0, 100.0), "memory": Bound(20.0, 0.0, 150.0),
        "moved": Bound(60.0, 0.0, 400.0),
        "idle": Bound(20.0, 0.0, 200.0), "busy": Bound(150.0, 0.0, 600.0), **_VOLTAGE,
    }  # fmt: skip
    watts = locked["power_w"].to_numpy(np.float64)
    sweeps.append(
        _fit("RTX 5090 decode, all clocks, power", power, memory_power, columns, watts, leave_out=False)
    )
    return sweeps


def fit_jetson(data: Path) -> list[Sweep]:
    """Decode time and power of a Jetson AGX Orin over clock and batch."""
    frame = read_jetson(data)
    columns = _clocks(frame) | {"batch": frame["batch"].to_numpy(np.float64)}
    seconds = frame["decode_iter_ms"].to_numpy(np.float64) * 1e-3
    time_bounds = {
        "host": Bound(0.043, 0.03, 0.06), "fixed": Bound(0.013, 0.001, 0.04),
        "sequence": Bound(3e-4, 0.0, 2e-3),
        "norm": Bound(7.0, 1.0, 20.0),
    }  # fmt: skip
    time = _fit("Jetson Orin decode, time", time_bounds, host_norm_time, columns, seconds, leave_out=False)
    p = time.values  # noqa: PD011  # a solution's, no frame's
    work = (p["fixed"] + p["sequence"] * columns["batch"]) / columns["x"]
    columns["activity"] = np.minimum(1.0, work / seconds)
    power_bounds = {
        "constant": Bound(13.0, 2.0, 25.0), "idle": Bound(1.0, 0.0, 20.0), "busy": Bound(30.0, 0.0, 80.0),
        **_VOLTAGE,
    }  # fmt: skip
    watts = frame["power_w"].to_numpy(np.float64)
    power = _fit("Jetson Orin decode, power", power_bounds, busy_power, columns, watts, leave_out=False)
    return [time, power]
