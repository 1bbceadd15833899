"""Mamba language models, of the first kind: no layer attends."""

from megavlm.architectures.decoders.mamba import cost
from megavlm.architectures.decoders.mamba.config import MambaConfig, rules
from megavlm.architectures.decoders.mamba.presets import KINDS, SIZES
from megavlm.architectures.decoders.mamba.tables import targets
from megavlm.config.architecture import LANGUAGE, Architecture

MAMBA = Architecture(
    name="mamba",
    config=MambaConfig,
    build="megavlm.architectures.decoders.mamba.build:build",
    rules=rules,
    cost=cost,
    targets=targets,
)


def register() -> None:
    """Register the language models that a recipe may call it by."""
    for name, values in (*KINDS.items(), *SIZES.items()):
        LANGUAGE.register(name, MAMBA, **values)
