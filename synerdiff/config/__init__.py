"""Experiment files and cluster files."""
