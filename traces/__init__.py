"""Workloads: read, generate, describe, fetch."""

SYNERDIFF = True
