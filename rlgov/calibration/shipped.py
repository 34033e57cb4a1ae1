"""The profiles that come with rlgov: fitted, assembled, written, and held against what is shipped.

``python -m rlgov.calibration.shipped --data FOLDER [--out FOLDER | --check]``

Four kinds, as each description says: H100 profiles of measured models; a B200 profile fitted to B200 rows;
an A100 profile fitted to the rows of two older serving stacks; and one by physics alone. What those three
take over unfitted comes from :func:`rlgov.simulation.create.create_profile`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import cyclopts
import yaml

from rlgov.calibration.a100 import fit_a100
from rlgov.calibration.dense_fit import H100_SETUP, SWEEP, Setup, calibrate, decode_rows
from rlgov.calibration.dense_priors import PRIORS
from rlgov.calibration.dense_rows import CHAT, H100, MODELS
from rlgov.errors import CalibrationError
from rlgov.simulation.cards import find_card
from rlgov.simulation.create import Offer as Creation
from rlgov.simulation.create import create_profile
from rlgov.simulation.insight import isolated_latencies
from rlgov.simulation.profile import (
    AllReduce,
    DecodeRow,
    DeploymentShape,
    Objective,
    Parameter,
    Parameters,
    Profile,
    load_profile,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rlgov.calibration.dense_fit import Calibration, Fit
    from rlgov.simulation.profile import Model

_TOLERANCE = 2e-3  # relative; solvers of other releases differ in the last digits
_LLAMA_70B: Final = "meta-llama/Llama-3.3-70B-Instruct"


@dataclass(frozen=True, slots=True)
class Offer:
    """What is decided, not fitted, about a shipped profile of an H100."""

    name: str
    model: str
    tp_degrees: tuple[int, ...]
    reserved_bytes_per_gpu: float
    service_level: Objective


OFFERS: Final = (
    Offer(
        name="h100-qwen3-32b",
        model="Qwen/Qwen3-32B",
        tp_degrees=(4, 2, 1),
        reserved_bytes_per_gpu=4.5e9,  # TP 1 then holds the 29 sequences ML.ENERGY reached under a cap of 32
        service_level=Objective(
            ttft_s=1.0,
            tpot_s=0.075,
            source="about 5 x isolated latency: a prompt of 4,096 tokens at TP 4, a lone decode at TP 2",
        ),
    ),
    Offer(
        name="h100-qwen3-8b",
        model="Qwen/Qwen3-8B",
        tp_degrees=(1,),
        reserved_bytes_per_gpu=2.5e9,
        service_level=Objective(
            ttft_s=0.75,
            tpot_s=0.04,
            source="5 x isolated latency, rounded: a prompt of 4,096 tokens (99th percentile of the Azure "
            "conversation trace) and a lone decode",
        ),
    ),
    Offer(
        name="h100-llama-3.3-70b",
        model=_LLAMA_70B,
        tp_degrees=(8, 4, 2),
        reserved_bytes_per_gpu=2.5e9,  # more, and TP 2 holds no context beside the weights
        service_level=Objective(
            ttft_s=1.5,
            tpot_s=0.085,
            source="about 5 x isolated latency: a prompt of 4,096 tokens and a lone decode at TP 4",
        ),
    ),
)


def _copied(model: str, **changes: object) -> Model:
    return MODELS[model].model_copy(update=changes)


_LLAMA_31_70B: Final = _copied(_LLAMA_70B, name="meta-llama/Llama-3.1-70B-Instruct")
LLAMA_31_8B: Final = MODELS["Qwen/Qwen3-8B"].model_copy(
    update={
        "name": "meta-llama/Llama-3.1-8B-Instruct",
        "layers": 32,
        "parameters": 8.03e9,
        "lookup_parameters": 128256 * 4096.0,
    }
)
LLAMA_2_70B: Final = _copied(
    _LLAMA_70B, name="meta-llama/Llama-2-70b-chat-hf", parameters=68.98e9, lookup_parameters=32000 * 8192.0
)


def setup_of(gpu: str) -> Setup:
    """Which rows of ML.ENERGY the profiles of a card are fitted to.

    Raises:
        CalibrationError: No such rows are published.
    """
    if gpu == H100.name:
        return H100_SETUP
    card = find_card("b200")
    if gpu != card.gpu().name:
        msg = (
            f"no published rows of decode time and power on {gpu!r}; there are some of {H100.name!r} and "
            f"{card.gpu().name!r}: characterise this card and calibrate from that run"
        )
        raise CalibrationError(msg)
    base = create_profile(card, MODELS[_LLAMA_70B], Creation(tp_degrees=(4, 2, 1)))
    # Smaller models leave a B200 waiting for its host, so their rows say nothing about the card.
    large = ("Qwen/Qwen3-32B", "google/gemma-3-27b-it", _LLAMA_70B)
    return Setup(
        gpu=card.gpu(),
        table_gpu="B200",
        models={**{name: MODELS[name] for name in large}, _LLAMA_31_70B.name: _LLAMA_31_70B},
        priors={name: p.value for name, p in base.parameters.items()},
        tasks=(CHAT,),
        sweep=False,
        all_reduce={row.tp_degree: row.bytes_per_s for row in base.all_reduce},
        power_bounds={  # constant_w runs to any bound, at little gain: it stays a prior
            "weight_j_per_byte": (1.2e-10, 1e-11, 4e-10),
            "kv_j_per_byte": (1.0e-10, 1e-11, 4e-10),
            "flop_j": (1.0e-12, 3e-13, 3e-12),
        },
    )


def fit_profile(calibration: Calibration, offer: Offer) -> Profile:
    """A profile of an H100 from the calibration of that card."""
    profile = Profile(
        schema_version=1,
        name=offer.name,
        description=f"{H100.name} with {offer.model}, TP {'/'.join(map(str, offer.tp_degrees))}",
        gpu=H100,
        model=MODELS[offer.model],
        deployment=DeploymentShape(
            allotted_gpus=offer.tp_degrees[0],
            tp_degrees=offer.tp_degrees,
            sm_clocks_mhz=(1980, 1830, 1680, 1530, 1380, 1230, 1080, 930, 780, 600, 405, 210),
            batch_caps=(256, 128, 64, 32, 16, 8),
            max_num_batched_tokens=1024,
            gpu_memory_utilization=0.9,
            reserved_bytes_per_gpu=offer.reserved_bytes_per_gpu,
            interval_s=1.0,
            service_level=offer.service_level,
        ),
        standby="asleep",
        parameters=Parameters.model_validate(_fitted(calibration) | _h100_priors()),
        decode_rows=(),
        all_reduce=tuple(
            AllReduce(
                tp_degree=tp,
                bytes_per_s=calibration.all_reduce[tp],
                source="vidur all_reduce.csv, h100_dgx, slope above 8 MB",
            )
            for tp in offer.tp_degrees
            if tp > 1
        ),
    )
    return profile.model_copy(update={"decode_rows": measured_rows(calibration, offer.model)})


def measured_rows(calibration: Calibration, model: str) -> tuple[DecodeRow, ...]:
    """Pure decode of one model as its profile carries it; none where it was not measured."""
    rows = [r for r in calibration.rows if r.model.name == model and r.task == CHAT]
    p, all_reduce = calibration.parameters, calibration.all_reduce
    return tuple(row for r in rows for row in decode_rows(r, p, all_reduce))


def refitted(base: Profile, calibration: Calibration) -> Profile:
    """A profile of the same card with what a calibration fitted, and the measured rows of its model."""
    fitted = {name: _widened(name, p) for name, p in _fitted(calibration, kernels=False).items()}
    known = dict(base.parameters.items()) | fitted
    changes = {
        "parameters": Parameters.model_validate(known),
        "decode_rows": measured_rows(calibration, base.model.name),
        "description": f"{base.gpu.name} with {base.model.name}, fitted to {calibration.setup.source}",
    }
    return with_objective(Profile.model_validate(base.model_copy(update=changes).model_dump()))


def _widened(name: str, known: Parameter) -> Parameter:
    """The range no narrower than 5 % down and up: fits that all end at one bound agree by accident."""
    low, high = (float(f"{known.value * share:.4g}") for share in (0.95, 1.05))
    if name.endswith("_efficiency"):
        high = min(high, 1.0)
    return known.model_copy(update={"low": min(known.low, low), "high": max(known.high, high)})


def with_objective(profile: Profile, slowdown: float = 5.0, prompt_tokens: int = 4096) -> Profile:
    """The profile with latency objectives of so many times a lone request at its largest TP degree."""
    alone = isolated_latencies(profile, prompt_tokens)[0]
    objective = Objective(
        ttft_s=float(f"{slowdown * alone.ttft_s:.2g}"),
        tpot_s=float(f"{slowdown * alone.tpot_s:.2g}"),
        source=f"{slowdown:g} x isolated latency: a prompt of {prompt_tokens:,} tokens and a lone decode at "
        f"TP {alone.tp_degree} and the highest clock",
    )
    shape = profile.deployment.model_copy(update={"service_level": objective})
    return profile.model_copy(update={"deployment": shape})


def _fitted(calibration: Calibration, *, kernels: bool = True) -> dict[str, Parameter]:
    source = calibration.setup.source
    sources: list[tuple[Fit, str]] = [
        (calibration.time, source),
        (calibration.power, f"{source}; {SWEEP}" if calibration.setup.sweep else source),
    ]
    if kernels:
        sources.insert(
            0, (calibration.gemm_mfu, "vidur mlp.csv, H100: 2-norm of weight reading and arithmetic")
        )
    return {
        name: Parameter(
            value=value, low=fit.low[name], high=fit.high[name], kind="fitted", source=text, error=fit.error
        )
        for fit, text in sources
        for name, value in fit.best.items()
    }


def _h100_priors() -> dict[str, Parameter]:
    return {
        name: Parameter(value=value, low=low, high=high, kind="prior", source=source)
        for name, (value, low, high, source) in PRIORS.items()
    }


def shipped_profiles(data: Path) -> Iterator[Profile]:
    """Every shipped profile, made from the published tables.

    Raises:
        CalibrationError: A table is missing or damaged.
    """
    h100 = calibrate(data)
    for offer in OFFERS:
        yield fit_profile(h100, offer)
    b200 = find_card("b200")
    base = create_profile(b200, MODELS[_LLAMA_70B], Creation(name="b200-llama-3.3-70b", tp_degrees=(4, 2, 1)))
    yield refitted(base, calibrate(data, setup_of(b200.gpu().name)))
    yield with_objective(fit_a100(data, LLAMA_2_70B))
    yield create_profile(
        find_card("h200"), LLAMA_31_8B, Creation(name="h200-llama-3.1-8b", tp_degrees=(2, 1))
    )


def differences(fresh: Any, shipped: Any, where: str = "profile") -> list[str]:  # noqa: ANN401  # YAML values
    """Where two profiles differ by more than solvers do; sentences about errors are not compared."""
    if isinstance(fresh, dict) and isinstance(shipped, dict):
        if fresh.keys() != shipped.keys():
            return [f"{where}: fields {sorted(fresh.keys() ^ shipped.keys())}"]
        return [d for key in fresh for d in differences(fresh[key], shipped[key], f"{where}.{key}")]
    if isinstance(fresh, list) and isinstance(shipped, list):
        if len(fresh) != len(shipped):
            return [f"{where}: {len(fresh)} entries, shipped {len(shipped)}"]
        pairs = enumerate(zip(fresh, shipped, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}[{i}]")]
    if isinstance(fresh, float) and isinstance(shipped, float):
        same = abs(fresh - shipped) <= _TOLERANCE * max(abs(fresh), abs(shipped))
        return [] if same else [f"{where}: {fresh:g}, shipped {shipped:g}"]
    same = fresh == shipped or where.endswith(".error")
    return [] if same else [f"{where}: {fresh!r}, shipped {shipped!r}"]


def check(profiles: Mapping[str, Profile]) -> list[str]:
    """How fresh profiles differ from the shipped ones of the same names."""
    found = []
    for name, profile in profiles.items():
        shipped = yaml.safe_load(load_profile(name).to_yaml())
        found += differences(yaml.safe_load(profile.to_yaml()), shipped, name)
    return found


app = cyclopts.App(name="rlgov-shipped", help="Fit the shipped profiles and write their YAML.")


@app.default
def main(
    *,
    data: Path,
    out: Path | None = None,
    check_only: Annotated[bool, cyclopts.Parameter(name="--check")] = False,
) -> None:
    """Fit and write.

    Args:
        data: Folder of the published measurements.
        out: Folder for one YAML file a profile; the package's own if not given.
        check_only: Write nothing; fail where a shipped profile differs from what the data give.
    """
    profiles = {profile.name: profile for profile in shipped_profiles(data)}
    if check_only:
        found = check(profiles)
        sys.stdout.writelines(f"{line}\n" for line in found or ["every shipped profile comes from the data"])
        sys.exit(1 if found else 0)
    folder = Path(__file__).parents[1] / "simulation" / "profiles" if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    for name, profile in profiles.items():
        path = folder / f"{name}.yaml"
        path.write_text(profile.to_yaml(), encoding="utf-8")
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    app()
