"""``rlgov profile create``: a profile of a GPU and a model that nobody measured, and the GPUs it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.table import Table

from rlgov.commands.output import Json, console, put_fields, put_json
from rlgov.errors import ProfileError
from rlgov.simulation.cards import cards, find_card
from rlgov.simulation.create import Offer, create_profile
from rlgov.simulation.model_config import read_model
from rlgov.simulation.profile import load_profile


def create(
    *,
    gpu: str,
    model: Path,
    out: Path,
    name: str | None = None,
    model_name: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "fp8"] = "auto",
    kv_dtype: Literal["auto", "bfloat16", "float16", "fp8"] = "auto",
    tp: str | None = None,
    slo_ttft_s: float | None = None,
    slo_tpot_s: float | None = None,
    force: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Write a profile from a GPU's data sheet and a model's config.json, by physics alone.

    Nothing in it is measured: every parameter is a prior with a range, and says where it comes from.
    Calibrate it once the pair can be measured.

    Args:
        gpu: A GPU of the table; `rlgov profile gpus` lists it.
        model: A model's config.json from Hugging Face, or the folder it lies in.
        out: The YAML file to write.
        name: Of the profile; made of GPU and model if not given.
        model_name: What to call the model, if config.json and folder do not tell.
        dtype: Of the weights; auto is what config.json says, fp8 quantises a 16-bit model while loading.
        kv_dtype: Of cached keys and values.
        tp: TP degrees to offer, such as 4,2,1; otherwise up to three from the smallest that holds the model.
        slo_ttft_s: Objective for the first token; 5 x that of a lone request if not given.
        slo_tpot_s: Objective for each later token; 5 x that of a lone request if not given.
        force: Overwrite the file if it exists.
        json: Report as JSON.
    """
    for flag, value in (("--slo-ttft-s", slo_ttft_s), ("--slo-tpot-s", slo_tpot_s)):
        if value is not None and not value > 0:
            raise ProfileError(f"{flag} must be above 0, got {value}")
    if out.suffix not in {".yaml", ".yml"}:
        raise ProfileError(f"--out {out} must end in .yaml, so that it can be named wherever a profile can")
    if out.exists() and not force:
        raise ProfileError(f"{out} exists; choose another --out, or overwrite it with --force")
    offer = Offer(name=name, tp_degrees=_degrees(tp), ttft_s=slo_ttft_s, tpot_s=slo_tpot_s)
    shape = read_model(model, name=model_name, dtype=dtype, kv_dtype=kv_dtype)
    card = find_card(gpu)
    profile = create_profile(card, shape, offer)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(profile.to_yaml(), encoding="utf-8")
    written = load_profile(out)
    report: dict[str, object] = {
        "file": str(out),
        "name": written.name,
        "description": written.description,
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "weight_bytes": shape.weight_bytes,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "tp_degrees": list(written.deployment.tp_degrees),
        "kv_capacity_tokens": list(written.limits().kv_capacity_tokens),
        "ttft_s": written.deployment.service_level.ttft_s,
        "tpot_s": written.deployment.service_level.tpot_s,
        "not_verified": list(card.unchecked),
    }
    if json:
        put_json(report)
        return
    put_fields(
        f"{written.name}: {written.description}",
        {
            "file": out,
            "parameters": f"{shape.parameters / 1e9:.2f} billion",
            "parameters per token": f"{shape.active_parameters / 1e9:.2f} billion",
            "weights": f"{shape.weight_bytes / 1e9:.1f} GB",
            "KV per token": f"{shape.kv_bytes_per_token / 1e3:.1f} kB",
            "TP degrees": ", ".join(map(str, written.deployment.tp_degrees)),
            "KV capacity (tokens)": ", ".join(map(str, written.limits().kv_capacity_tokens)),
            "service level": written.deployment.service_level.source,
            "not verified": ", ".join(card.unchecked) or "nothing",
            "next": f"rlgov profile show {out}",
        },
    )


def gpus(*, json: Json = False) -> None:
    """The GPUs that `profile create` knows.

    Args:
        json: Report every number with its source as JSON.
    """
    table = cards()
    if json:
        put_json({name: card.model_dump(mode="json", exclude_none=True) for name, card in table.items()})
        return
    lines = Table(title="GPUs (* not verified)", title_justify="left", box=None, pad_edge=False)
    headings = ("name", "memory GB", "TB/s", "bf16 TFLOP/s", "fp8", "fp4", "TDP W", "clocks MHz", "link")
    for heading in headings:
        lines.add_column(heading, no_wrap=True)
    for name, card in table.items():
        doubt = card.unchecked

        def shown(
            field: str, unit: float = 1.0, *, of: object = card, marked: tuple[str, ...] = doubt
        ) -> str:
            figure = getattr(of, field)
            return "-" if figure is None else f"{figure.value / unit:.4g}{'*' if field in marked else ''}"

        lines.add_row(
            name,
            shown("hbm_bytes", 1e9),
            shown("hbm_bytes_per_s", 1e12),
            shown("peak_bf16_flop_per_s", 1e12),
            shown("peak_fp8_flop_per_s", 1e12),
            shown("peak_fp4_flop_per_s", 1e12),
            shown("tdp_w"),
            f"{shown('sm_clock_min_mhz')} to {shown('sm_clock_max_mhz')} by {shown('sm_clock_step_mhz')}",
            card.link,
        )
    console().print(lines)


def _degrees(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        degrees = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ProfileError(f"--tp {text} must be TP degrees with commas between, such as 4,2,1") from error
    if any(degree < 1 for degree in degrees):
        raise ProfileError(f"--tp {text} must be of degrees of at least 1")
    return degrees
