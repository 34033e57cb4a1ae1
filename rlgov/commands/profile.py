"""``rlgov profile``: the simulated deployments that come with rlgov, and what they rest on."""

from __future__ import annotations

from rich.table import Table

from rlgov.commands.output import Json, console, put_fields, put_json
from rlgov.simulation.profile import Profile, load_profile, profile_names


def list_profiles(*, json: Json = False) -> None:
    """Name the profiles that come with rlgov.

    Args:
        json: Report as JSON.
    """
    profiles = [load_profile(name) for name in profile_names()]
    if json:
        put_json([{"name": profile.name, "description": profile.description} for profile in profiles])
        return
    put_fields("profiles", {profile.name: profile.description for profile in profiles})


def show(profile: str, *, json: Json = False) -> None:
    """What a profile holds: limits, and every parameter with its range, kind and source.

    Args:
        profile: Name of a profile that comes with rlgov, or path of a profile file.
        json: Report everything as JSON.
    """
    loaded = load_profile(profile)
    if json:
        put_json(loaded.model_dump(mode="json"))
        return
    put_fields(f"{loaded.name}: {loaded.description}", _limits(loaded))
    table = Table(title="parameters", title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "value", "range", "kind", "source"):
        table.add_column(heading, overflow="fold", no_wrap=heading in {"name", "kind"})
    for name, parameter in loaded.parameters.items():
        table.add_row(
            name,
            f"{parameter.value:.4g}",
            f"{parameter.low:.3g} to {parameter.high:.3g}",
            parameter.kind,
            parameter.source,
        )
    console().print(table)


def _limits(profile: Profile) -> dict[str, object]:
    limits = profile.limits()
    level = limits.service_level
    return {
        "GPUs": f"{limits.allotted_gpus} x {profile.gpu.name}, {limits.tdp_w:g} W each",
        "model": profile.model.name,
        "clocks (MHz)": _listed(limits.sm_clocks_mhz),
        "batch caps": _listed(limits.batch_caps),
        "TP degrees": _listed(limits.tp_degrees),
        "KV capacity (tokens)": _listed(limits.kv_capacity_tokens),
        "TP switch (s)": _listed(limits.switch_s),
        "interval": f"{limits.interval_s:g} s",
        "service level": f"first token within {level.ttft_s:g} s, then {1000 * level.tpot_s:g} ms a token",
        "other engines wait": profile.standby,
    }


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.10g}" for value in values)
