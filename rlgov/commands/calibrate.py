"""``rlgov calibrate``: a profile from measurements, and how well it holds."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rlgov.commands.output import Json, console, put_fields, put_json

if TYPE_CHECKING:
    from rlgov.calibration.report import Line
    from rlgov.calibration.run_profile import Errors, Told
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
        published: Folder of the published measurements, or a table of decode rows alone (CSV).
        profile: Base profile, name or path: its GPU and model, its priors; the first run's own if not given.
        out: Where the calibrated profile is written (YAML); its name is the file's.
        report: Print every error of the fits to published measurements beside what was asked for.
        json: Report as JSON.
    """
    from rlgov.calibration.durable import replace_file
    from rlgov.errors import CalibrationError

    if report:
        _report(published, runs, out, json=json)
        return
    if out is None or out.suffix not in {".yaml", ".yml"}:
        msg = "say where the calibrated profile goes: --out NAME.yaml (or --report for the published fits)"
        raise CalibrationError(msg)
    if profile is not None and out.exists() and Path(profile).exists() and out.samefile(profile):
        msg = f"{out} is the base profile; choose another file with --out"
        raise CalibrationError(msg)
    if not runs and published is None:
        msg = "there is nothing to calibrate from: name run folders of `rlgov characterize`, or --published"
        raise CalibrationError(msg)
    made = _base(runs, profile)
    told: dict[str, Any] = {"profile": out.stem, "file": str(out), "base": made.name}
    errors: list[tuple[str, Errors]] = []
    parameters: tuple[Told, ...] = ()
    if published is not None:
        from rlgov.calibration.published_profile import fit_published

        _say(f"published rows of {made.gpu.name}")
        of_card = fit_published(made, published)
        made, parameters = of_card.profile, of_card.told
        errors += [("published rows", e) for e in (of_card.seen, *of_card.unseen)]
    if runs:
        from rlgov.calibration.run_profile import calibrate_profile
        from rlgov.calibration.runs import read_observations

        observed = read_observations(runs, made)
        of_runs = calibrate_profile(made, observed, out.stem, _say)
        made, parameters = of_runs.profile, of_runs.told
        errors += [("runs", e) for e in (of_runs.seen, *of_runs.unseen)]
        told |= {
            "points": len(observed.names),
            "noise": dict(of_runs.fit.noise.items()),
            "left_out_rows": dict(observed.left_out),
            "notes": list(observed.notes),
        }
    made = made.model_copy(update={"name": out.stem})
    text = made.to_yaml()
    replace_file(out, lambda part: part.write_text(text, encoding="utf-8"))
    told["decode_rows"] = len(made.decode_rows)
    told["range"] = "90 % of what the runs leave open" if runs else "fits without one of the models each"
    told["errors"] = [{"of": of, **_plain(asdict(e))} for of, e in errors]
    told["parameters"] = [asdict(t) for t in parameters]
    if json:
        put_json(told)
        return
    _print(told)


def _say(text: str) -> None:
    sys.stderr.write(f"calibrate: {text}\n")


def _base(runs: tuple[Path, ...], profile: str | None) -> Profile:
    from rlgov.calibration.table import read_header
    from rlgov.errors import CalibrationError
    from rlgov.simulation.profile import load_profile

    if profile is not None:
        return load_profile(profile)
    if not runs:
        msg = (
            "say which GPU and model the published rows are fitted for: --profile NAME (`rlgov profile list`)"
        )
        raise CalibrationError(msg)
    named = read_header(runs[0]).profile
    if not named:
        msg = f"{runs[0]} does not say which profile it was of; name the base profile: --profile NAME or FILE"
        raise CalibrationError(msg)
    return load_profile(named)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _print(told: dict[str, Any]) -> None:
    apart = {"errors", "parameters", "left_out_rows", "notes", "noise"}
    put_fields("calibration", {name: value for name, value in told.items() if name not in apart})
    for why, count in told.get("left_out_rows", {}).items():
        sys.stdout.write(f"  left out: {count} rows, {why}\n")
    for note in told.get("notes", ()):
        sys.stdout.write(f"  assumed: {note}\n")
    table = _table("mean errors, per cent", ("of", "left out", "points", "iteration time", "power"))
    for error in told["errors"]:
        values = ["-" if error[k] is None else f"{100 * error[k]:.2f}" for k in ("time", "power")]
        table.add_row(error["of"], error["what"], str(error["points"]), *values)
    console().print(table)
    headings = ("parameter", "prior", "fitted", "range", "identified", "why not, or what to mind")
    table = _table("parameters", headings)
    for p in told["parameters"]:
        table.add_row(
            p["name"],
            f"{p['prior']:.4g}",
            f"{p['value']:.4g}" if p["identified"] or p["value"] != p["prior"] else "-",
            f"{p['low']:.4g} to {p['high']:.4g}",
            "yes" if p["identified"] else "no",
            p["note"],
        )
    console().print(table)


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=number < len(headings) - 1)
    return table


def _report(published: Path | None, runs: tuple[Path, ...], out: Path | None, *, json: bool) -> None:
    from rlgov.calibration.report import published_report
    from rlgov.errors import CalibrationError

    if published is None:
        msg = (
            "--report prints the errors of the fits to published measurements: name their folder, --published"
        )
        raise CalibrationError(msg)
    if runs or out is not None:
        msg = "--report writes no profile and reads no run; leave out the run folders and --out"
        raise CalibrationError(msg)
    lines = published_report(published, _say)
    if json:
        put_json([asdict(line) | {"met": line.met} for line in lines])
        return
    _print_report(lines)


def _print_report(lines: list[Line]) -> None:
    table = Table(title="errors, per cent", title_justify="left", box=None, pad_edge=False)
    for heading in ("what", "how", "asked", "measured", "met", "rows", "note"):
        table.add_column(heading, overflow="fold", no_wrap=heading in {"asked", "measured", "met", "rows"})
    for line in lines:
        met = "-" if line.met is None else "yes" if line.met else "MISSED"
        asked = "-" if line.asked is None else f"{line.asked:g}"
        table.add_row(line.what, line.how, asked, f"{line.measured:.2f}", met, str(line.rows), line.note)
    console().print(table)
