"""Atomic file writes, and the folder of a run."""
