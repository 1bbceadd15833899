"""Vision-language models built from Megatron-Core blocks. Presets are data: see :mod:`megavlm.models.registry`."""
