"""Names of DenseConnector's weights in published checkpoints."""

from __future__ import annotations

import dataclasses

from megavlm.architectures.connectors.mlp.tables import SEQUENTIAL_PROJECTOR

DENSE_PROJECTOR = dataclasses.replace(SEQUENTIAL_PROJECTOR, prefix="model.mm_projector.")
"""What follows the integration, which has no weights: LLaVA's projector."""
