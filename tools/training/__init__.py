"""Training of the embedded model `digits`."""
