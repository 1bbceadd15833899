"""Names of a SigLIP's and a SAM's weights in published checkpoints: those of the towers' own tables."""
