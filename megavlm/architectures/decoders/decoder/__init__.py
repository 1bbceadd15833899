"""Decoder-only language models: Qwen v1, 2 and 3, and Llama."""

from megavlm.architectures.decoders.decoder.config import DecoderConfig, products, rules
from megavlm.architectures.decoders.decoder.latent_cost import CostByAttention
from megavlm.architectures.decoders.decoder.presets import KINDS, SIZES
from megavlm.architectures.decoders.decoder.tables import targets
from megavlm.config.architecture import LANGUAGE, Architecture

DECODER = Architecture(
    name="decoder",
    config=DecoderConfig,
    build="megavlm.architectures.decoders.decoder.build:build",
    rules=rules,
    products=products,
    cost=CostByAttention(),
    targets=targets,
)


def register() -> None:
    """Register the language models that a recipe may call it by."""
    for name, values in KINDS.items():
        LANGUAGE.register(name, DECODER, **values)
    for name, (size, values) in SIZES.items():
        LANGUAGE.register(name, DECODER, **size._asdict(), **values)
