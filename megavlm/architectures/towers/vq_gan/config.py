"""Keys of VQ-GAN's encoder (arXiv 2012.09841; Chameleon's: 2405.09818), and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP
from megavlm.config.schema import ParallelConfig, VisionConfig

_OWN = "model.vision"
GROUPS = 32
"""Of its norms."""
EPSILON = 1e-6
"""Of its norms."""
_PIXELS = 1 / (255 * 0.0078)
"""Chameleon's processor multiplies by 0.0078 and subtracts 1."""


@config_class
class VQGANConfig(VisionConfig):
    """The vision tower: VQ-GAN's encoder and codebook, never trained. A picture is a code for each square of pixels."""

    image_size: Annotated[int, Meaning.USE] = Field(gt=0, le=100_000)
    """Side of the square that an image is resized to, in pixels: whole squares of the last level."""
    base_width: int = Field(gt=0, le=100_000)
    """Channels that the first convolution gives."""
    width_multipliers: tuple[int, ...] = Field(min_length=1)
    """Channels of each level, in times base_width; each level behind the first halves the map."""
    blocks_per_level: int = Field(gt=0, le=1000)
    """Residual blocks of a level."""
    latent_width: int = Field(gt=0, le=100_000)
    """Channels that the encoder gives."""
    code_width: int = Field(gt=0, le=100_000)
    """Width of a code's vector."""
    num_codes: int = Field(gt=1, le=10_000_000)
    """Rows of the codebook."""
    code_order: tuple[int, ...] = ()
    """For each code, in the order of the codebook, which of model.language.image_tokens it is, from 0; empty where they
    follow each other as their codes do. A checkpoint's vocabulary_map says it."""
    image_mean: Annotated[tuple[float, float, float], Meaning.PIXELS] = (_PIXELS, _PIXELS, _PIXELS)
    """Mean of red, green and blue that pixels (0 to 1) are normalised with; the default is Chameleon's processor's."""
    image_std: Annotated[tuple[float, float, float], Meaning.PIXELS] = (_PIXELS, _PIXELS, _PIXELS)
    """Standard deviation of red, green and blue."""

    @property
    def codes(self) -> int | None:
        """As many as the codebook has."""
        return self.num_codes

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.base_width * one for one in self.width_multipliers)

    @property  # type: ignore[misc]
    def hidden_size(self) -> int:
        """Channels of the last level."""
        return self.widths[-1]

    @property  # type: ignore[misc]
    def num_layers(self) -> int:
        """Residual blocks, two in the middle among them."""
        return len(self.width_multipliers) * self.blocks_per_level + 2

    @property  # type: ignore[misc]
    def layernorm_epsilon(self) -> float:
        """Of its norms."""
        return EPSILON

    @property
    def feature_size(self) -> int:
        """One number: the code."""
        return 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        side = self.side_of(len(self.width_multipliers) - 1)
        return side, side

    def side_of(self, level: int) -> int:
        """Return the rows of a level's map; levels are counted from 0."""
        return int(self.image_size // 2**level)


def rules(vision: VQGANConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    if min(vision.image_std) <= 0:
        yield f"{_OWN}.image_std: {list(vision.image_std)} must be above 0, as pixels are divided by it; correct it"
    if vision.code_order and sorted(vision.code_order) != list(range(vision.num_codes)):
        yield (
            f"{_OWN}.code_order: is not each number from 0 to {vision.num_codes - 1} (num_codes - 1) once; take what"
            " the conversion wrote, or leave it out"
        )
    levels = len(vision.width_multipliers)
    if levels > 12 or min(vision.width_multipliers) < 1 or max(vision.width_multipliers) > 1000:
        yield (
            f"{_OWN}.width_multipliers: {list(vision.width_multipliers)[:20]} are not at most 12 numbers from 1 to"
            " 1000; correct it"
        )
        return
    if vision.base_width % GROUPS:
        yield f"{_OWN}.base_width: {vision.base_width} is not a multiple of {GROUPS}, the groups of a norm; change it"
    whole = 2 ** (levels - 1)
    if vision.image_size % whole:
        yield (
            f"{_OWN}.image_size: {vision.image_size} is not a multiple of {whole}, one position of the last level;"
            " change it"
        )
    if layout.tensor_model_parallel_size > 1:
        yield f"{_OWN}.tensor_parallel: convolutions are whole on each of {TP} ranks; set it to replicate"
