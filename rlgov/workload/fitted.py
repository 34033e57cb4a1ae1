"""Parameters of the synthetic generator, fitted to public traces by :mod:`rlgov.workload.fit_synthesis`.

Source: Azure LLM inference traces 2023, ``AzureLLMInferenceTrace_{conv,code}.csv`` of
https://github.com/Azure/AzurePublicDataset (CC-BY-4.0; Patel et al., Splitwise, ISCA 2024), the first
70 % of the span at hand (conversation 1961 s, 11 374 requests; code 1877 s, 5 928 requests), so that
nothing of a test span is in them. Fitted in November 2026. Checked by a test that fits again.
"""

from __future__ import annotations

from rlgov.workload.lengths import LengthComponent, LengthMixture

CONVERSATION_RATE_PER_S = 5.8007

CONVERSATION_BURSTINESS = {
    "busy_share": 0.04508,
    "quiet_ratio": 0.5804,
    "memory_s": 0.751,
    "drift_std": 0.2585,
    "drift_memory_s": 469.9,
}

# weight, prompt log mean and std, output log mean and std, correlation of the logs, longest of each
CONVERSATION_LENGTHS = LengthMixture(
    (
        LengthComponent(0.2826, 5.9834, 0.0439, 4.4951, 0.2664, 0.4423, 14050, 1000),
        LengthComponent(0.2764, 6.9719, 0.0653, 6.0059, 0.0485, -0.0214, 14050, 1000),
        LengthComponent(0.1286, 7.3806, 0.5082, 4.3540, 0.4256, -0.0087, 14050, 1000),
        LengthComponent(0.1222, 8.3159, 0.0057, 4.0326, 0.5016, 0.0576, 14050, 1000),
        LengthComponent(0.0885, 7.0715, 0.1071, 5.8718, 0.5522, -0.8143, 14050, 1000),
        LengthComponent(0.0590, 5.2639, 0.0733, 5.1373, 0.2715, 0.2472, 14050, 1000),
        LengthComponent(0.0216, 5.3374, 0.5306, 2.7702, 0.2075, 0.2264, 14050, 1000),
        LengthComponent(0.0210, 3.8044, 1.1260, 5.1195, 0.2290, 0.5844, 14050, 1000),
    )
)

CODE_RATE_PER_S = 3.1580

CODE_BURSTINESS = {
    "busy_share": 0.2993,
    "quiet_ratio": 0.003078,
    "memory_s": 3.421,
    "drift_std": 0.7336,
    "drift_memory_s": 198,
}

# weight, prompt log mean and std, output log mean and std, correlation of the logs, longest of each
CODE_LENGTHS = LengthMixture(
    (
        LengthComponent(0.3325, 7.5748, 0.6525, 2.5027, 0.3190, -0.0585, 7437, 1899),
        LengthComponent(0.1565, 7.3372, 0.6877, 1.9865, 0.1708, -0.1260, 7437, 1899),
        LengthComponent(0.1514, 5.1309, 0.8353, 2.4342, 0.4050, 0.0149, 7437, 1899),
        LengthComponent(0.1414, 7.6025, 0.6476, 3.3783, 0.5545, 0.0982, 7437, 1899),
        LengthComponent(0.0849, 5.5293, 1.2693, 3.6313, 0.8329, -0.0306, 7437, 1899),
        LengthComponent(0.0754, 7.2176, 0.7612, 4.2705, 1.0005, 0.3580, 7437, 1899),
        LengthComponent(0.0490, 8.9133, 0.0044, 2.7469, 0.7406, -0.0703, 7437, 1899),
        LengthComponent(0.0089, 2.5659, 0.5494, 2.4839, 0.4187, -0.1392, 7437, 1899),
    )
)
