"""The hardware engine: the same policy object on real lanes, with the same records as the simulator."""

SYNERDIFF = True
