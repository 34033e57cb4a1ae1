"""``rlgov calibrate``: a profile from measurements, and how well it holds."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rlgov.commands.output import Json, console, put_fields, put_json

if TYPE_CHECKING:
    from rlgov.calibration.report import Line
    from rlgov.calibration.run_profile import Calibrated
    from rlgov.simulation.profile import Profile


def calibrate(
    *runs: Path,
    published: Path | None = None,
    profile: str | None = None,
    out: Path | None = None,
    report: bool = False,
    json: Json = False,
) -> None:
    """Fit a profile's parameters to characterisation runs, to published rows, or to both.

    What the measurements cannot tell keeps its prior, and the profile says why. Without RUNS, the published
    rows of the base profile's card are fitted; with both, the runs are fitted after them.

    Args:
        runs: Run folders of `rlgov characterize`, all of one deployment.
        published: Folder of the published measurements (ml_energy_llm.csv and the others beside it).
        profile: Base profile, name or path: its GPU and model, its priors; the first run's own if not given.
        out: Where the calibrated profile is written (YAML); its name is the file's.
        report: Print every error of the fits to published measurements beside what was asked for.
        json: Report as JSON.
    """
    from rlgov.errors import CalibrationError

    if report:
        _report(published, runs, out, json=json)
        return
    if out is None or out.suffix not in {".yaml", ".yml"}:
        msg = "say where the calibrated profile goes: --out NAME.yaml (or --report for the published fits)"
        raise CalibrationError(msg)
    if not runs and published is None:
        msg = "nothing to calibrate from: name run folders of `rlgov characterize`, or --published FOLDER"
        raise CalibrationError(msg)
    base = _base(runs, profile)
    if published is not None:
        base = _from_published(base, published)
    found: Calibrated | None = None
    if runs:
        from rlgov.calibration.run_profile import calibrate_profile
        from rlgov.calibration.runs import read_observations

        found = calibrate_profile(base, read_observations(runs, base), out.stem, _say)
        base = found.profile
    base = base.model_copy(update={"name": out.stem})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(base.to_yaml(), encoding="utf-8")
    _tell(base, found, out, json=json)


def _say(text: str) -> None:
    sys.stderr.write(f"calibrate: {text}\n")


def _base(runs: tuple[Path, ...], profile: str | None) -> Profile:
    from rlgov.calibration.table import read_header
    from rlgov.errors import CalibrationError
    from rlgov.simulation.profile import load_profile

    if profile is not None:
        return load_profile(profile)
    if not runs:
        msg = "say for which GPU and model to fit published rows: --profile NAME (`rlgov profile list`)"
        raise CalibrationError(msg)
    named = read_header(runs[0]).profile
    if not named:
        msg = f"{runs[0]} does not say which profile it was of; name the base profile: --profile NAME or FILE"
        raise CalibrationError(msg)
    return load_profile(named)


def _from_published(base: Profile, published: Path) -> Profile:
    from rlgov.calibration.dense_fit import calibrate as fit_card
    from rlgov.calibration.shipped import refitted, setup_of

    setup = setup_of(base.gpu.name)
    _say(f"published rows of {setup.table_gpu}")
    folder = published if published.is_dir() else published.parent
    return refitted(base, fit_card(folder, setup))


def _tell(profile: Profile, found: Calibrated | None, out: Path, *, json: bool) -> None:
    kinds = {
        kind: [n for n, p in profile.parameters.items() if p.kind == kind] for kind in ("fitted", "prior")
    }
    told: dict[str, Any] = {
        "profile": profile.name,
        "file": str(out),
        "decode_rows": len(profile.decode_rows),
    }
    if found is not None:
        told |= {
            "points": found.points,
            "left_out_rows": found.left_out,
            **{
                name: None if value != value else value  # noqa: PLR0124  # NaN
                for name, value in (
                    ("time_error", found.time_error),
                    ("time_error_left_out", found.time_error_left_out),
                    ("power_error", found.power_error),
                    ("power_error_left_out", found.power_error_left_out),
                )
            },
            "kept": found.fit.kept,
        }
    told |= {"fitted": kinds["fitted"], "priors": kinds["prior"]}
    if json:
        put_json(told)
        return
    shown = {k: v for k, v in told.items() if k not in {"kept", "fitted", "priors", "left_out_rows"}}
    for name in ("time_error", "time_error_left_out", "power_error", "power_error_left_out"):
        if name in shown:
            shown[name] = "unknown" if shown[name] is None else f"{shown[name]:.2%}"
    put_fields("calibration", shown)
    for why, count in (found.left_out if found is not None else {}).items():
        sys.stdout.write(f"  left out: {count} rows, {why}\n")
    table = Table(title="parameters", title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "value", "range", "kind", "why a prior, or the fit's error"):
        table.add_column(heading, overflow="fold", no_wrap=heading in {"name", "kind"})
    kept = {} if found is None else found.fit.kept
    for name, p in profile.parameters.items():
        why = kept.get(name) or p.error or p.source
        table.add_row(name, f"{p.value:.4g}", f"{p.low:.3g} to {p.high:.3g}", p.kind, why)
    console().print(table)


def _report(published: Path | None, runs: tuple[Path, ...], out: Path | None, *, json: bool) -> None:
    from rlgov.calibration.report import published_report
    from rlgov.errors import CalibrationError

    if published is None:
        msg = "--report prints the errors of the fits to published tables: name their folder with --published"
        raise CalibrationError(msg)
    if runs or out is not None:
        msg = "--report writes no profile and reads no run; leave out the run folders and --out"
        raise CalibrationError(msg)
    lines = published_report(published, _say)
    if json:
        put_json([asdict(line) | {"met": line.met} for line in lines])
        return
    _table(lines)


def _table(lines: list[Line]) -> None:
    table = Table(title="errors, per cent", title_justify="left", box=None, pad_edge=False)
    for heading in ("what", "how", "asked", "measured", "met", "rows", "note"):
        table.add_column(heading, overflow="fold", no_wrap=heading in {"asked", "measured", "met", "rows"})
    for line in lines:
        met = "-" if line.met is None else "yes" if line.met else "MISSED"
        asked = "-" if line.asked is None else f"{line.asked:g}"
        table.add_row(line.what, line.how, asked, f"{line.measured:.2f}", met, str(line.rows), line.note)
    console().print(table)
