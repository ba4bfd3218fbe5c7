"""Profiles: tables of times, their folder, adapter tables, scaling, capacity."""
