"""Baselines as first-class policies: static settings and the control rules others have published."""
