"""The discrete-event engine: ``simulate`` serves requests on one worker, ``simulate_cluster`` on many."""

from simulator.cluster_run import ClusterResult, simulate_cluster
from simulator.engine import simulate

SYNERDIFF = True
__all__ = ["SYNERDIFF", "ClusterResult", "simulate", "simulate_cluster"]
