"""``rlgov profile``: the simulated deployments that come with rlgov, and what they rest on."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from rich.table import Table

from rlgov.commands.output import Json, console, put_fields, put_json
from rlgov.simulation.insight import CONTEXT_TOKENS, compare_clocks, isolated_latencies
from rlgov.simulation.model import Model
from rlgov.simulation.profile import Profile, load_profile, profile_names

PROMPT_TOKENS = 4096  # of the lone request: the 99th percentile of the Azure conversation trace


def list_profiles(*, json: Json = False) -> None:
    """Name the profiles that come with rlgov.

    Args:
        json: Report as JSON.
    """
    profiles = [load_profile(name) for name in profile_names()]
    if json:
        put_json(
            [
                {
                    "name": profile.name,
                    "description": profile.description,
                    "gpu": profile.gpu.name,
                    "model": profile.model.name,
                    "tp_degrees": list(profile.deployment.tp_degrees),
                    "kind": kind(profile),
                }
                for profile in profiles
            ]
        )
        return
    table = Table(title="profiles", title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "GPU", "model", "TP", "what it rests on"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "name")
    for profile in profiles:
        degrees = "/".join(map(str, profile.deployment.tp_degrees))
        table.add_row(profile.name, profile.gpu.name, profile.model.name, degrees, kind(profile))
    console().print(table)


def kind(profile: Profile) -> str:
    """What the profile's figures rest on: measured rows of this pair, fits on others, or physics alone."""
    kinds = {parameter.kind for _, parameter in profile.parameters.items()}
    if profile.decode_rows:
        return "measured"
    return "fitted" if kinds & {"fitted", "measured"} else "physics alone"


def show(profile: str, *, json: Json = False) -> None:
    """What a profile holds: limits, and every parameter with its range, kind and source.

    Args:
        profile: Name of a profile that comes with rlgov, or path of a profile file.
        json: Report everything as JSON.
    """
    loaded = load_profile(profile)
    alone, clocks = isolated_latencies(loaded, PROMPT_TOKENS), compare_clocks(loaded)
    if json:
        follows = {
            "kind": kind(loaded),
            "kv_capacity_tokens": list(loaded.limits().kv_capacity_tokens),
            "active_parameters": loaded.model.active_parameters,
            "weight_bytes": loaded.model.weight_bytes,
            "kv_bytes_per_token": loaded.model.kv_bytes_per_token,
            "isolated": [asdict(row) for row in alone],
            "clocks": [asdict(row) for row in clocks],
        }
        put_json(loaded.model_dump(mode="json") | {"follows": follows})
        return
    put_fields(f"{loaded.name}: {loaded.description}", _limits(loaded))
    put_fields("model", _model(loaded.model))
    put_fields(
        f"a lone request of {PROMPT_TOKENS:,} prompt tokens at the highest clock",
        {
            f"TP {a.tp_degree}": f"first token {a.ttft_s:.3g} s, then {1e3 * a.tpot_s:.3g} ms a token"
            for a in alone
        },
    )
    if clocks:
        pair = f"{clocks[0].low_mhz} against {clocks[0].high_mhz} MHz"
        put_fields(
            f"decoding at {pair}, {CONTEXT_TOKENS:,.0f} tokens each",
            {
                f"TP {c.tp_degree}, batch {c.batch}": (
                    f"{c.throughput_ratio:.1%} of the throughput at {c.energy_ratio:.1%} of the energy"
                )
                for c in clocks
            },
        )
    table = Table(title="parameters", title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "value", "range", "kind", "error", "source"):
        table.add_column(heading, overflow="fold", no_wrap=heading in {"name", "kind"})
    for name, parameter in loaded.parameters.items():
        table.add_row(
            name,
            f"{parameter.value:.4g}",
            f"{parameter.low:.3g} to {parameter.high:.3g}",
            parameter.kind,
            parameter.error or "-",
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


def _model(model: Model) -> dict[str, object]:
    shown: dict[str, object] = {
        "parameters": f"{model.parameters / 1e9:.2f} billion in {model.layers} layers",
        "weights": f"{model.weight_bytes / 1e9:.1f} GB",
        "KV per token": f"{model.kv_bytes_per_token / 1e3:.1f} kB",
    }
    if model.experts is not None:
        experts = model.experts
        shown["experts"] = f"{experts.per_token} of {experts.count} a token"
        shown["parameters per token"] = f"{model.active_parameters / 1e9:.2f} billion"
        batches = np.array([1.0, 8.0, 64.0])
        shares = ", ".join(
            f"{share:.0%} at batch {batch:g}"
            for batch, share in zip(batches.tolist(), experts.coverage(batches).tolist(), strict=True)
        )
        shown["experts read"] = shares
    if model.latent_attention is not None:
        shown["attention"] = f"latent, {model.latent_attention.kv_lora_rank} values a token and layer"
    if model.window is not None:
        shown["window"] = f"{model.window.tokens} tokens in {model.window.layers} of {model.layers} layers"
    for group in model.other_weights:
        shown[f"stored otherwise: {group.name}"] = f"{group.bytes_per_weight:g} bytes a weight"
    return shown


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.10g}" for value in values)
