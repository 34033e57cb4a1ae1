"""Deployments under control, simulated, replayed or recorded, and the scenarios that feed them."""
