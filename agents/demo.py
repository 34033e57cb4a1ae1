"""The whole product in a few minutes: train on simulated traffic, replay a day it has never seen."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rlgov.agents.replay import ReplaySpec, replay
from rlgov.agents.report import print_table, write_report
from rlgov.agents.train import TrainConfig, say_on_stderr, train
from rlgov.agents.train_config import EvaluationSettings
from rlgov.deployments.scenario import synthetic_capacity
from rlgov.errors import ConfigError
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.workload.readers import write_trace
from rlgov.workload.synthesis import SPECS, synthesize

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rlgov.workload.trace import Trace

STEPS = 1_000_000  # a fifth of what the published figures are trained with
DAY_S = 3600.0
BASELINES = ("fastest", "best-static", "two-level", "ecofreq", "kv-threshold")
_DAY_SEED = 0xDA7  # of the replayed day; training draws from other streams
_MARKER = "demo.csv"


def demo_day(profile_name: str, seed: int) -> Trace:
    """One compressed day whose load swings from 10 to 80 % of the fastest setting's capacity."""
    profile = load_profile(profile_name)
    limits = profile.limits()
    spec = SPECS["day"]
    capacity = synthetic_capacity(limits, build_tables(profile), spec, limits.service_level)
    spec = replace(spec, rate_per_s=capacity.full, duration_s=DAY_S, low=0.1, high=0.8)
    return synthesize(spec, np.random.default_rng([_DAY_SEED, seed]))


def run_demo(
    out: Path,
    *,
    profile: str,
    seed: int,
    quiet: bool,
    steps: int = STEPS,
    say: Callable[[str], None] = say_on_stderr,
) -> dict[str, Any]:
    """Train, replay, draw. Returns the replay's JSON with the paths of what was written.

    Args:
        out: Folder for everything; an earlier demo in it is replaced.
        profile: Profile name or file.
        seed: Fixes traffic and training.
        quiet: Print no table (for ``--json``).
        steps: Training steps.
        say: Takes progress lines.

    Raises:
        ConfigError: ``out`` holds something that is not an earlier demo.
    """
    if out.exists() and any(out.iterdir()):
        if not (out / _MARKER).exists():
            msg = f"{out} holds files that no demo wrote; give another folder with --out"
            raise ConfigError(msg)
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    say("1/3  measuring what the simulated deployment can carry, and drawing a day of traffic")
    day = demo_day(profile, seed)
    write_trace(day, out / _MARKER)
    say(f"2/3  training PPO on other simulated traffic, {steps:,} steps")
    trained = train(
        TrainConfig(
            out=out / "train",
            profile=profile,
            traces=("synthetic:day", "synthetic:conversation"),
            slo_scales=(1.0,),
            total_steps=steps,
            checkpoint_steps=steps,
            evaluation=EvaluationSettings(every_steps=max(steps // 5, 1)),
            seed=seed,
        ),
        say=say,
    )
    if trained.bundle is None:
        msg = f"training was interrupted; continue with: rlgov train --resume --out {out / 'train'}"
        raise ConfigError(msg)
    say(f"3/3  replaying the day ({len(day):,} requests in an hour) through the policy and the baselines")
    result = replay(
        ReplaySpec(trace=out / _MARKER, profile=profile, policies=(*BASELINES, str(trained.bundle)))
    )
    files = write_report(result, out)
    if not quiet:
        print_table(result)
        say(f"\nlook at {files['front']} and {files['timeline']}")
        say(f"what it learned: tensorboard --logdir {out / 'train'}")
    return result.to_json() | {
        "bundle": str(trained.bundle),
        "files": {name: str(path) for name, path in files.items()},
    }
