"""Governs a running stack with a bundle for some intervals, and prints what came of it as JSON.

A program, because a process finds the stand-in for the NVIDIA driver only when it starts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rlgov.agents.bundle import BundlePolicy, load_bundle
from rlgov.agents.live import run_live
from rlgov.clock import SystemClock
from rlgov.deployments.live import exit_on_sigterm
from rlgov.envs.registration import make_live
from rlgov.hardware.hardware import open_hardware


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--windows", type=int, required=True)
    parser.add_argument("--start-tp", type=int, required=True)
    parser.add_argument("--gpus", nargs="+", required=True)
    asked = parser.parse_args()
    policy = BundlePolicy(load_bundle(asked.bundle), start_tp=asked.start_tp)
    with exit_on_sigterm():
        env = make_live(
            asked.control,
            asked.profile,
            episode_s=None,
            start_tp=asked.start_tp,
            record=asked.journal,
            policy_digest=policy.digest,
            hardware=open_hardware(asked.gpus, SystemClock()),
        )
        try:
            run = run_live(policy, env, asked.windows)
        finally:
            env.close()
    json.dump(run.to_json(), sys.stdout)


if __name__ == "__main__":
    main()
