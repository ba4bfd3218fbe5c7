"""The discrete-event engine: ``simulate`` serves requests on one worker, ``simulate_cluster`` on many."""

from simulator.engine import ClusterResult, simulate, simulate_cluster

SYNERDIFF = True
__all__ = ["SYNERDIFF", "ClusterResult", "simulate", "simulate_cluster"]
