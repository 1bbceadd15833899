"""Keys of ConvNeXt (arXiv 2201.03545), and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ParallelConfig, VisionConfig

_OWN = "model.vision"
EXPANSION = 4
"""How much wider a block is inside."""


@config_class
class ConvNextConfig(VisionConfig):
    """The vision tower: ConvNeXt on square images. Its features are those of one stage or several."""

    image_size: Annotated[int, Meaning.USE] = Field(gt=0, le=100_000)
    """Side of the square that an image is resized to, in pixels: whole positions of the last stage."""
    patch_size: int = Field(default=4, gt=0, le=1000)
    """Side of the square of pixels that is one position of the first stage; each stage behind it halves the map."""
    depths: tuple[int, ...] = Field(min_length=1)
    """Blocks of each stage."""
    widths: tuple[int, ...] = Field(min_length=1)
    """Channels of each stage."""
    feature_stages: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Stages, counted from 1 and rising to the last one, whose maps are the features: stretched to the first one's,
    side by side (all in MiniGemini). Null for the last one's alone."""
    layernorm_epsilon: float = Field(default=1e-6, gt=0)
    """Epsilon of the norms."""
    layer_scale_init: Annotated[float, Meaning.RUN] = Field(default=1e-6, gt=0)
    """Initial value of the learned vectors that each block's result is multiplied by."""
    image_mean: Annotated[tuple[float, float, float], Meaning.PIXELS] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of red, green and blue that pixels (0 to 1) are normalised with; the default is CLIP's."""
    image_std: Annotated[tuple[float, float, float], Meaning.PIXELS] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of red, green and blue."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    gradient_checkpointing: Annotated[bool, Meaning.RUN] = False
    """Recompute every block of the tower in the backward pass, to save activation memory."""

    @property
    def stages(self) -> tuple[int, ...]:
        """Stages whose maps are the features, counted from 0."""
        return (len(self.widths) - 1,) if self.feature_stages is None else tuple(n - 1 for n in self.feature_stages)

    @property  # type: ignore[misc]
    def hidden_size(self) -> int:
        """Width of the last stage."""
        return self.widths[-1]

    @property  # type: ignore[misc]
    def num_layers(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the map that the features have."""
        side = self.side_of(self.stages[0])
        return side, side

    @property
    def feature_size(self) -> int:
        """Channels of all stages that are taken."""
        return sum(self.widths[stage] for stage in self.stages)

    def side_of(self, stage: int) -> int:
        """Return the rows of a stage's map; stages are counted from 0."""
        return int(self.image_size // self.patch_size // 2**stage)


def rules(vision: ConvNextConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    if min(vision.image_std) <= 0:
        yield f"{_OWN}.image_std: {list(vision.image_std)} must be above 0, as pixels are divided by it; correct it"
    count = len(vision.widths)
    if len(vision.depths) != count or min((*vision.depths, *vision.widths)) < 1:
        yield (
            f"{_OWN}.depths: {list(vision.depths)[:20]} and {_OWN}.widths {list(vision.widths)[:20]} are not a number"
            " above 0 for each stage; correct one"
        )
        return
    if max((*vision.depths, *vision.widths)) > 1_000_000 or count > 12:
        yield f"{_OWN}.depths: no tower is so large; correct it or {_OWN}.widths"
        return
    taken = vision.feature_stages
    if taken is not None and (list(taken) != sorted(set(taken)) or min(taken) < 1 or max(taken) != count):
        yield (
            f"{_OWN}.feature_stages: {list(taken)[:20]} are not rising numbers from 1 on that end with {count}, the"
            " last stage; correct it"
        )
        return
    whole = vision.patch_size * 2 ** (count - 1)
    if vision.image_size % whole:
        yield (
            f"{_OWN}.image_size: {vision.image_size} is not a multiple of {whole}, one position of the last stage;"
            " change it"
        )
    for width in dict.fromkeys(vision.widths):
        size = layout.tensor_model_parallel_size
        yield from divides(f"{_OWN}.widths x {EXPANSION}", width * EXPANSION, size, TP)


def products(vision: ConvNextConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the tower's matrix products: key, number, ranks that share it."""
    found = []
    for stage, width in enumerate(vision.widths):
        found += [(f"{_OWN}.widths", width, 1), (f"{_OWN}.widths x {EXPANSION}", EXPANSION * width, tp)]
        found.append((f"{_OWN}.image_size", vision.side_of(stage) ** 2, 1))
    return tuple(found)
