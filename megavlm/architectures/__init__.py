"""Architectures of parts of a model. Presets are data: see :mod:`megavlm.architectures.known`."""
