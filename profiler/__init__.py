"""Measures a model on a device, or estimates it; profiles/ holds the profiles that ship."""

SYNERDIFF = True
