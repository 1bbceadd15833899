"""Names of two towers' weights in published checkpoints: those of the towers' own tables."""
