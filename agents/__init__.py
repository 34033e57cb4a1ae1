"""Who decides: policies, baselines, bundles, training and evaluation (imports as ``rlgov.agents``)."""
