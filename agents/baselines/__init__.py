"""Baselines as first-class policies: static settings and the control rules others have published."""

from __future__ import annotations

from rlgov.agents.baselines.registry import FAMILIES, NAMES, TUNED_RULES, by_name
from rlgov.agents.baselines.space import PolicyContext

__all__ = ["FAMILIES", "NAMES", "TUNED_RULES", "PolicyContext", "by_name"]
