"""A profile fitted to published decode rows of its card, with every model left out once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rlgov.calibration.dense_fit import TIME_BOUNDS, calibrate, decode_s, mean_power_w
from rlgov.calibration.published import ML_ENERGY_FILE, read_ml_energy
from rlgov.calibration.run_profile import Errors, Told
from rlgov.calibration.shipped import refitted, setup_of
from rlgov.errors import CalibrationError
from rlgov.simulation.cards import find_card
from rlgov.simulation.profile import Parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from rlgov.calibration.dense_fit import Calibration, Setup
    from rlgov.simulation.profile import Parameter, Profile

    Floats = NDArray[np.float64]

_LEAST_MODELS = 2  # one to leave out, one to learn from
_BF16_BYTES = 2.0
_EDGE = 1e-3  # of the range a fit may use
_TOGETHER = 0.9  # correlation from which two parameters are told only together


@dataclass(frozen=True, slots=True)
class PublishedFit:
    """A refitted profile, and how well its parameters hold."""

    profile: Profile
    seen: Errors
    unseen: tuple[Errors, ...]  # over all rows of models left out, then each model
    told: tuple[Told, ...]


def fit_published(base: Profile, path: Path) -> PublishedFit:
    """Refit a profile's time and power to the published rows of dense bf16 models on its card.

    Args:
        base: card, model, and priors of what the rows cannot tell.
        path: the folder of the published tables, or a table of decode rows alone, with the columns of
            ``ml_energy_llm.csv``. With the table alone, arithmetic stays as it is in the profile, and
            all-reduce as it is in the table of cards.

    Raises:
        CalibrationError: There are no rows of this card, or of too few models; a table is missing or damaged;
            or the profile's model is none that such rows say anything about.
    """
    _check_model(base)
    setup = setup_of(base.gpu.name)
    if path.is_file():
        card = find_card(setup.table_gpu.lower())
        setup = replace(
            setup,
            sweep=False,
            kernels=False,
            all_reduce={tp: figure.value for tp, figure in card.all_reduce_bytes_per_s.items()},
            priors={name: p.value for name, p in base.parameters.items()},
        )
    _check_rows(path, setup)
    found = calibrate(path, setup)
    fitted = refitted(base, found).model_copy(update={"deployment": base.deployment})
    told = tuple(_told(base, fitted, found))
    return PublishedFit(_noted(fitted, told), *_errors(found), told)


def _check_model(base: Profile) -> None:
    model = base.model
    if model.experts is None and model.bytes_per_weight == _BF16_BYTES and not model.other_weights:
        return
    kind = "a mixture of experts" if model.experts is not None else "quantised"
    msg = (
        f"{model.name} is {kind}; profiles are fitted to published rows of dense bf16 models only "
        "(--report shows how well the others can be told); calibrate from a run of `rlgov characterize`"
    )
    raise CalibrationError(msg)


def _check_rows(path: Path, setup: Setup) -> None:
    where = path if path.is_file() else path / ML_ENERGY_FILE
    frame = read_ml_energy(path)
    mine = frame[(frame["gpu"] == setup.table_gpu) & (frame["precision"] == "bfloat16")]
    if mine.empty:
        have = ", ".join(sorted(set(frame["gpu"].astype(str))))
        msg = f"{where} has no bfloat16 rows of the {setup.table_gpu}; it has rows of {have}"
        raise CalibrationError(msg)
    known = sorted(set(mine["model"]) & set(setup.models))
    if len(known) < _LEAST_MODELS:
        msg = (
            f"{where} has rows of {len(known)} of the models that a fit for the {setup.table_gpu} knows "
            f"({', '.join(sorted(setup.models))}); it takes {_LEAST_MODELS}, so that one can be left out"
        )
        raise CalibrationError(msg)


def _errors(found: Calibration) -> tuple[Errors, tuple[Errors, ...]]:
    report = found.report
    rows: dict[str, int] = {}
    for each in found.rows:
        rows[each.model.name] = rows.get(each.model.name, 0) + len(each.batch)
    total = sum(rows.values())

    def over_rows(errors: Mapping[str, float]) -> float:
        return float(np.average([errors[name] for name in rows], weights=list(rows.values())))

    time, power = report.time_error_left_out, report.power_error_left_out
    unseen = [Errors("each model", total, over_rows(time), over_rows(power))]
    unseen += [Errors(f"model {name}", count, time[name], power[name]) for name, count in rows.items()]
    return Errors("seen by the fit", total, report.time_error, report.power_error), tuple(unseen)


def _told(base: Profile, fitted: Profile, found: Calibration) -> Iterator[Told]:
    """Fitted parameters with what rows leave open of each; all others with why they keep their prior."""
    setup, p = found.setup, found.parameters
    notes: dict[str, tuple[bool, str]] = {}
    for bounds, predict in ((TIME_BOUNDS, decode_s), (setup.power_bounds, mean_power_w)):
        logs = partial(_logs, predict, found)
        notes |= _weighed({name: p[name] for name in bounds}, bounds, logs)
    for name, known in fitted.parameters.items():
        identified, note = notes.get(name, (False, f"not told by these rows: {known.source}"))
        prior: Parameter = getattr(base.parameters, name)
        yield Told(name, prior.value, known.value, known.low, known.high, identified=identified, note=note)


def _logs(predict: Callable[..., Floats], found: Calibration, values: Mapping[str, float]) -> Floats:
    """Of every row as predicted with some values replaced."""
    p = {**found.parameters, **values}
    return np.asarray(np.log(np.concatenate([predict(r, p, found.all_reduce) for r in found.rows])))


def _weighed(
    best: Mapping[str, float],
    bounds: Mapping[str, tuple[float, float, float]],
    logs: Callable[[Mapping[str, float]], Floats],
) -> dict[str, tuple[bool, str]]:
    """Whether rows tell each value from the others, and what to mind."""
    names = list(best)
    slopes = np.stack(
        [(logs({n: best[n] * 1.001}) - logs({n: best[n] * 0.999})) / 0.002 for n in names], axis=1
    )
    spread = np.linalg.pinv(slopes.T @ slopes)
    deviation = np.sqrt(np.maximum(np.diag(spread), 1e-300))
    related = spread / np.outer(deviation, deviation)
    np.fill_diagonal(related, 0.0)
    found = {}
    for i, name in enumerate(names):
        _, low, high = bounds[name]
        other = int(np.argmax(np.abs(related[i])))
        edge = min(best[name] - low, high - best[name]) < _EDGE * (high - low)
        together = abs(float(related[i, other])) > _TOGETHER
        parts = ["at the edge of what is possible"] if edge else []
        parts += [f"told only together with {names[other]}"] if together else []
        found[name] = (not parts, "; ".join(parts))
    return found


def _noted(profile: Profile, told: tuple[Told, ...]) -> Profile:
    known = dict(profile.parameters.items())
    for t in told:
        p = known[t.name]
        if p.kind == "fitted" and t.note:
            known[t.name] = p.model_copy(update={"source": f"{p.source} [{t.note}]"})
    return profile.model_copy(update={"parameters": Parameters.model_validate(known)})
