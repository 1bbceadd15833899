"""DenseConnector: features of several layers of the tower, through linear layers."""

from megavlm.architectures.connectors.dense_connector import cost
from megavlm.architectures.connectors.dense_connector.config import DenseConnectorConfig, products, rules
from megavlm.config.architecture import CONNECTORS, Architecture

DENSE_CONNECTOR = Architecture(
    name="dense_connector",
    config=DenseConnectorConfig,
    build="megavlm.architectures.connectors.dense_connector.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the names that a recipe may call it by."""
    for integration in ("sti", "sci", "dci"):
        CONNECTORS.register(f"dense_{integration}", DENSE_CONNECTOR, integration=integration)
