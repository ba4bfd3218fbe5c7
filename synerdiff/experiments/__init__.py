"""Simulated runs: one, a grid, comparisons between policies."""
