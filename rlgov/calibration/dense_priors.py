"""What no published measurement of an H100 identifies: assumptions, with the ranges training draws from.

A tuple holds value, low, high and where it comes from; names are those of
:class:`rlgov.simulation.profile.Parameters`.
"""

from __future__ import annotations

from typing import Final

PRIORS: Final[dict[str, tuple[float, float, float, str]]] = {
    "prefill_mfu": (
        0.65, 0.55, 0.72,
        (
            "calibration prior 0.5-0.65 of effective prefill, which TDP slows; with 250 prompt tokens it "
            "gives the measured cost of a prefill (mean minus median gap between tokens)"
        ),
    ),
    "attention_mfu": (0.35, 0.25, 0.5, "assumed; attention is a few per cent of prefill at these lengths"),
    "layer_overhead_clock_share": (0.5, 0.2, 0.8, "unmeasured: launch and latency within CUDA graphs"),
    "sequence_overhead_clock_share": (0.3, 0.0, 0.6, "unmeasured: sampling and host work per sequence"),
    "kv_clock_share": (0.1, 0.0, 0.3, "unmeasured: attention kernels that do not saturate HBM"),
    "memory_knee": (0.43, 0.35, 0.55, "MuxServe decode over SM shares (an analogy, not a clock sweep)"),
    "host_floor_s": (0.004, 0.002, 0.007, "assumed: vLLM V1 scheduling and output processing"),
    "voltage_knee": (
        0.6, 0.5, 0.65,
        (
            "not identified by H100 data: the prefill sweep is fitted within 5 % for 0.5-0.6 and V 1.2-1.4; "
            "taken together with voltage_at_max where 1.6 against 2.0 GHz costs less than 80 % of the "
            "energy at most batch sizes (arXiv 2403.20306)"
        ),
    ),
    "voltage_at_max": (
        1.38, 1.25, 1.4,
        "clock sweeps of RTX 3090 and 5090 (club-3090) give 1.38-1.39; see voltage_knee",
    ),
    "memory_clocked_share": (
        0.8, 0.65, 0.9,
        "DRAM and its interface take about 4 pJ/bit of the fitted energy per byte; the rest is the chip",
    ),
    "all_reduce_latency_s": (
        2e-6, 0.0, 6e-6,
        "one-shot all-reduce in a CUDA graph; a free fit puts it at 0-2 us, far below NCCL's 20 us (vidur)",
    ),
    "clocked_w": (
        40.0, 20.0, 60.0,
        "fits with constant_w only in sum; taken so that a busy GPU draws more than an idle one at any clock",
    ),
    "idle_low_w": (70.0, 60.0, 85.0, "calibration prior 65-80 W for an idle H100 SXM"),
    "idle_high_w": (115.0, 90.0, 140.0, "assumed: loaded and idle at full clock; L40S 105 against 61 W"),
    "clock_delay_s": (0.05, 0.01, 0.2, "PowerWeave: Hopper 10-100 ms; throttLL'eM: 200 ms on A100"),
    "wake_s": (1.0, 0.4, 5.0, "vLLM sleep mode level 1 (weights in host memory): 0.1-0.4 s and up by size"),
    "cold_start_s": (60.0, 30.0, 100.0, "vLLM: reload takes 30-100 s and more"),
    "warmup_s": (0.5, 0.2, 2.0, "assumed: a first completion before traffic moves"),
    "startup_w": (130.0, 100.0, 180.0, "assumed: copying weights at low utilisation"),
    "warmup_w": (300.0, 200.0, 400.0, "assumed: a batch of one"),
}  # fmt: skip
