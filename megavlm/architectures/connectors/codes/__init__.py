"""No connector: the codes of a tower's pictures become tokens of the vocabulary (Chameleon)."""

from megavlm.architectures.connectors.codes import cost
from megavlm.architectures.connectors.codes.config import CodesConfig, rules
from megavlm.config.architecture import CONNECTORS, Architecture

CODES = Architecture(
    name="codes",
    config=CodesConfig,
    build="megavlm.architectures.connectors.codes.build:build",
    rules=rules,
    cost=cost,
)


def register() -> None:
    """Register the name that a recipe may call it by."""
    CONNECTORS.register("codes", CODES)
