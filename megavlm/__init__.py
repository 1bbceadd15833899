"""megavlm: a Megatron-style 3D-parallel trainer for vision-language models."""

__version__ = "0.1.0"
