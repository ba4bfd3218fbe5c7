"""Lanes that work runs on, on a CPU or a GPU, and links between processes."""
