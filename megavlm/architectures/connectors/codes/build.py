"""Codes as they are: see :class:`megavlm.models.fusion.Codes`, which writes them among the tokens.

Shape legend: P codes of an image, N images.
"""

from __future__ import annotations

from torch import Tensor, nn

from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig


class CodesConnector(nn.Module):
    """[P, N, 1] int64 codes to the same."""

    def forward(self, codes_PN1: Tensor) -> Tensor:
        """Return them."""
        return codes_PN1


def build(model: ModelConfig, context: BuildContext) -> CodesConnector:
    """Build it (the function that every module of this folder has)."""
    return CodesConnector()
