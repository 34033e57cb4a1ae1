"""Characterise a deployment: latency and energy over clocks, batch caps, TP degrees, lengths and load."""
