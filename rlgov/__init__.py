"""A governor for LLM serving: the least energy that still meets the latency objectives."""

from __future__ import annotations

__version__ = "0.1.0"
