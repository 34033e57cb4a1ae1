"""A profile fitted to published decode rows of its card, with every model left out once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rlgov.calibration.dense_fit import calibrate
from rlgov.calibration.published import ML_ENERGY_FILE, read_ml_energy
from rlgov.calibration.run_profile import Errors
from rlgov.calibration.shipped import refitted, setup_of
from rlgov.errors import CalibrationError
from rlgov.simulation.cards import find_card

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rlgov.calibration.dense_fit import Calibration, Setup
    from rlgov.simulation.profile import Profile

_LEAST_MODELS = 2  # one to leave out, one to learn from
_BF16_BYTES = 2.0


@dataclass(frozen=True, slots=True)
class PublishedFit:
    """A refitted profile, and how well its parameters hold."""

    profile: Profile
    seen: Errors
    unseen: tuple[Errors, ...]  # over all rows of models left out, then each model


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
    return PublishedFit(fitted, *_errors(found))


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
