"""Changing the TP degree without losing a request, recoverable after a crash."""
