"""Language models of an encoder and a decoder: T5, UL2."""

from megavlm.architectures.decoders.encoder_decoder.config import EncoderDecoderConfig, rules
from megavlm.architectures.decoders.encoder_decoder.presets import KINDS, SIZES
from megavlm.config.architecture import LANGUAGE, Architecture

ENCODER_DECODER = Architecture(
    name="encoder_decoder",
    config=EncoderDecoderConfig,
    build="megavlm.architectures.decoders.encoder_decoder.build:build",
    rules=rules,
)
"""Without a cost: which positions are the encoder's follows from each sample's words."""


def register() -> None:
    """Register the language models that a recipe may call it by."""
    for name, values in (*KINDS.items(), *SIZES.items()):
        LANGUAGE.register(name, ENCODER_DECODER, **values)
