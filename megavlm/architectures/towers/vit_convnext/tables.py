"""Names of a CLIP's and a ConvNeXt's weights in published checkpoints: those of the towers' own tables."""
