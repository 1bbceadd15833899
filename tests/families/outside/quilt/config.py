"""The keys of the three parts, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from megavlm.architectures.decoders.decoder.config import DecoderConfig
from megavlm.config.fields import config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig, VisionConfig


@config_class
class PatchworkConfig(VisionConfig):
    """A tower without attention: patches, and linear layers on each of them."""

    image_size: int = Field(gt=0)
    """Side of the square that pictures are made, in pixels."""
    patch_size: int = Field(gt=0)
    """Side of a patch, in pixels."""
    hidden_size: int = Field(gt=0)
    """Width of the tower."""
    num_layers: int = Field(gt=0)
    """Linear layers with a residual connection."""
    layernorm_epsilon: float = 1e-6
    """Of connectors that have norms; the tower has none."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of red, green and blue that pixels (0 to 1) are normalised with."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Standard deviation of red, green and blue."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size // self.patch_size, self.image_size // self.patch_size


def patchwork_rules(vision: PatchworkConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule."""
    yield from divides("model.vision.hidden_size", vision.hidden_size, layout.tensor_model_parallel_size, TP)
    yield from divides("model.vision.image_size", vision.image_size, vision.patch_size, "model.vision.patch_size")


def patchwork_products(vision: PatchworkConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of matrix products."""
    return (("model.vision.hidden_size", vision.hidden_size, tp),)


@config_class
class PoolConfig(ConnectorConfig):
    """The mean of squares of patches, and a linear layer."""

    side: int = Field(gt=0)
    """Side of a square of patches that becomes one token."""

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return one for each square."""
        return (grid[0] // self.side) * (grid[1] // self.side)


def pool_rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule."""
    yield from divides("model.language.hidden_size", model.language.hidden_size, layout.tensor_model_parallel_size, TP)
    if any(side % model.connector.side for side in model.vision.grid):
        side, grid = model.connector.side, model.vision.grid
        yield f"model.connector.side: {side} does not divide the grid {grid} of patches; take a divisor"


def pool_products(model: ModelConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of matrix products."""
    return (("model.language.hidden_size", model.language.hidden_size, tp),)


@config_class
class ScaledDecoderConfig(DecoderConfig):
    """A decoder with a gain behind each MLP, and logits that are divided by a number."""

    logits_scaling: float = Field(default=1.0, gt=0)
    """What the logits are divided by."""
