"""Vision-language models: towers, connectors and language models of :mod:`megavlm.architectures`, put together."""
