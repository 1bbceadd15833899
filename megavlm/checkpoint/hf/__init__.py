"""Hugging Face checkpoints to and from Megatron distributed checkpoints, by one table of name rules per family."""
