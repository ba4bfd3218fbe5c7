"""The engine that executes a policy on hardware."""

SYNERDIFF = True
