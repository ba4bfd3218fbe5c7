"""The discrete-event engine: ``simulate`` replays requests through a policy on a profile."""

from simulator.engine import simulate

SYNERDIFF = True
__all__ = ["SYNERDIFF", "simulate"]
