"""One linear layer, or several with GELU between them."""

from megavlm.architectures.connectors.mlp import cost
from megavlm.architectures.connectors.mlp.config import MLPConfig, products, rules
from megavlm.config.architecture import CONNECTORS, Architecture

MLP = Architecture(
    name="mlp",
    config=MLPConfig,
    build="megavlm.architectures.connectors.mlp.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the names that a recipe may call it by."""
    CONNECTORS.register("linear", MLP)
    CONNECTORS.register("mlp<N>x_gelu", MLP)
