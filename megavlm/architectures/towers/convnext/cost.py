"""The cost of ConvNeXt: see :class:`megavlm.architectures.cost.TowerCost`.

Read off the blocks that ``build`` makes, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.architectures.cost import Kernels, Parameter, Passage, Pictures, Product, Work
from megavlm.architectures.towers.convnext.config import EXPANSION, ConvNextConfig

_TAPS = 49
"""Of the depthwise convolution."""
_MOMENTS = 8
"""Bytes that a norm keeps of a position beside its input: mean and deviation, in fp32."""


def _stages(vision: ConvNextConfig) -> Iterator[tuple[int, int, int, int]]:
    """Yield of each stage: its number, its blocks, its channels, its positions of one picture."""
    for stage, (depth, width) in enumerate(zip(vision.depths, vision.widths, strict=True)):
        yield stage, depth, width, vision.side_of(stage) ** 2


def parameters(vision: ConvNextConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank; every rank has convolutions and norms whole."""
    first = vision.widths[0]
    shapes = [3 * vision.patch_size**2 * first, first, first, first]
    for stage, depth, width, _ in _stages(vision):
        inside = EXPANSION * width
        block = [width, _TAPS * width, width, width, width]
        block += [width * inside // tensor, inside // tensor, inside * width // tensor, width]
        if stage:
            before = vision.widths[stage - 1]
            shapes += [block[0], before, before, 4 * before * width, width, *block[1:], *block * (depth - 1)]
        else:
            shapes += block * depth
    return [Parameter(elements) for elements in shapes]


def work(vision: ConvNextConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass; every rank makes the convolutions whole."""
    products = 0.0
    whole = 2.0 * pictures.count * vision.side_of(0) ** 2 * 3 * vision.patch_size**2 * vision.widths[0]
    for stage, depth, width, positions in _stages(vision):
        shown = pictures.count * positions
        products += depth * shown * 4 * EXPANSION * width**2
        whole += depth * shown * 2 * _TAPS * width
        if stage:
            whole += shown * 2 * 4 * vision.widths[stage - 1] * width
    return Work(products=products, whole=whole)


def again(vision: ConvNextConfig, pictures: Pictures) -> float:
    """Return the operations of the blocks, where these are recomputed."""
    if not vision.gradient_checkpointing:
        return 0
    stem = 2.0 * pictures.count * vision.side_of(0) ** 2 * 3 * vision.patch_size**2 * vision.widths[0]
    return work(vision, pictures).total - stem


def _block_kept(width: int, positions: float, tensor: int, b: int) -> float:
    # Inputs of convolution, norm and linear layer, what is scaled; around the activation.
    return positions * (b * (4 * width + 2 * EXPANSION * width // tensor) + _MOMENTS)


def _halving_kept(vision: ConvNextConfig, stage: int, positions: float, b: int) -> float:
    """Return what the norm and the convolution in front of a stage keep: of four times as many positions."""
    return 4 * positions * (2 * vision.widths[stage - 1] * b + _MOMENTS) if stage else 0.0


def kept(vision: ConvNextConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return the bytes that a tower that learns keeps."""
    b = kernels.number_bytes
    positions = pictures.count * vision.side_of(0) ** 2
    total = pictures.count * 3 * vision.image_size**2 * b + positions * (vision.widths[0] * b + _MOMENTS)
    for stage, depth, width, each in _stages(vision):
        shown = pictures.count * each
        if vision.gradient_checkpointing:
            total += (depth - 1) * shown * width * b
            total += (4 * vision.widths[stage - 1] if stage else width) * shown * b
        else:
            total += depth * _block_kept(width, shown, tensor, b) + _halving_kept(vision, stage, shown, b)
    return total


def passing(vision: ConvNextConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the most that the forward pass needs beyond what it keeps."""
    b, most = kernels.number_bytes, 0.0
    # Pixels in uint8, in fp32 twice, and normalised.
    pixels = pictures.count * 3 * vision.image_size**2 * (1 + 4 + 4 + b)
    features = pictures.patches * vision.feature_size * b
    for _, _, width, each in _stages(vision):
        most = max(most, pictures.count * each * b * (3 * width + 2 * EXPANSION * width // tensor))
    # A map is stretched in fp32, and all are joined and turned around.
    joined = (2 * features + 2 * features * 4 / b) if len(vision.stages) > 1 else features
    return max(pixels, joined) if learns else max(pixels, most + features, joined)


def rebuilt(vision: ConvNextConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return the bytes of a recomputed block: of the stage that keeps most."""
    if not vision.gradient_checkpointing:
        return 0
    b, count = kernels.number_bytes, pictures.count
    return max(
        _block_kept(width, count * each, tensor, b) + _halving_kept(vision, stage, count * each, b)
        for stage, _, width, each in _stages(vision)
    )


def passage(vision: ConvNextConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> Passage:
    """Return what a forward pass takes time for; depthwise convolutions go by the bytes that they read and write."""
    b, count, moved = kernels.number_bytes, pictures.count, 0.0
    pixels = 3 * vision.patch_size**2
    products = [Product(count * vision.side_of(0) ** 2, vision.widths[0], pixels)]
    for stage, depth, width, each in _stages(vision):
        shown, inside = count * each, EXPANSION * width // tensor
        products += [Product(shown, inside, width), Product(shown, width, inside)] * depth
        if stage:
            products.append(Product(shown, width, 4 * vision.widths[stage - 1]))
        moved += depth * shown * b * (10 * width + 2 * inside)
    moved += 2 * pictures.patches * vision.feature_size * b * int(len(vision.stages) > 1)
    layers = vision.num_layers
    stream = sum(depth * each * width for _, depth, width, each in _stages(vision)) * count * b / layers
    # A row-parallel layer's sum is a scatter and a gather of the stream.
    return Passage(products=products, attention=(), moved=moved, stream=stream, collectives=2 * layers, layers=layers)
