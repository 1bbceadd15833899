"""The keys of the three parts, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from megavlm.config.fields import config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, LanguageConfig, ModelConfig, ParallelConfig, VisionConfig


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
class ScaledDecoderConfig(LanguageConfig):
    """A decoder with a gain behind each MLP, and logits that are divided by a number.

    A class of its own, and not a kind of ``DecoderConfig``: it has the keys that megavlm's decoder is built from.
    """

    num_layers: int = Field(gt=0)
    """Number of layers."""
    hidden_size: int = Field(gt=0)
    """Width of the model."""
    ffn_hidden_size: int = Field(gt=0)
    """Width of the gated MLP."""
    num_attention_heads: int = Field(gt=0)
    """Attention heads."""
    num_query_groups: int = Field(gt=0)
    """Key/value heads."""
    kv_channels: int = Field(gt=0)
    """Width of an attention head."""
    vocab_size: int = Field(gt=0)
    """Rows of the embedding."""
    max_position_embeddings: int = Field(gt=0)
    """Longest segment that the model is meant for."""
    logits_scaling: float = Field(default=1.0, gt=0)
    """What the logits are divided by."""
    vocab_divisor: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    rotary_base: int = 10000
    """Base of the rotary position embedding."""
    rope_scaling: None = None
    """Rotary positions are not stretched."""
    rope_scaling_factor: float = 1.0
    """The same."""
    norm_epsilon: float = 1e-6
    """Epsilon of the norms."""
    add_qkv_bias: bool = False
    """Whether the QKV projection has a bias."""
    qk_layernorm: bool = False
    """Whether queries and keys are normalised."""
    tie_word_embeddings: bool = False
    """Whether embedding and output layer share their weight."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""


def decoder_rules(language: ScaledDecoderConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule."""
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        yield from divides(f"model.language.{key}", getattr(language, key), layout.tensor_model_parallel_size, TP)
    heads, groups = language.num_attention_heads, language.num_query_groups
    yield from divides("model.language.num_attention_heads", heads, groups, "model.language.num_query_groups")
