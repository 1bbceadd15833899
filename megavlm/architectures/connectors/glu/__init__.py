"""CogVLM's connector: a linear layer, a gated MLP, and learned vectors around each picture."""

from megavlm.architectures.connectors.glu import cost
from megavlm.architectures.connectors.glu.config import GLUConfig, rules
from megavlm.config.architecture import CONNECTORS, Architecture

GLU = Architecture(
    name="glu",
    config=GLUConfig,
    build="megavlm.architectures.connectors.glu.build:build",
    rules=rules,
    # products: none, as 35 x 35 patches are no multiple of anything that FP8 asks for: it is refused.
    cost=cost,
)


def register() -> None:
    """Register the name that a recipe may call it by."""
    CONNECTORS.register("glu", GLU)
