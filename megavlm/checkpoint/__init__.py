"""Distributed checkpoints: saving, publishing and loading a run."""
