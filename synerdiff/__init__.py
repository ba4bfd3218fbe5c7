"""Scheduling, profiling and simulating the serving of diffusion models."""

SYNERDIFF = True
__version__ = "0.1.0"
