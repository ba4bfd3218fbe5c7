"""Scheduling policies: one decision rule per file, and their registry."""

SYNERDIFF = True
