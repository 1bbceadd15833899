"""The cost of VQ-GAN's encoder: see :class:`megavlm.architectures.cost.TowerCost`.

Read off the blocks that ``build`` makes, tensor by tensor. It is whole on each rank, never trained, and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.architectures.cost import Kernels, Parameter, Passage, Pictures, Product, Work
from megavlm.architectures.towers.vq_gan.config import VQGANConfig

_AT_ONCE = 4
"""Pictures that go through it together (``build.py``)."""
_TAPS = 9
"""Of a 3 x 3 convolution."""


def _convolutions(vision: VQGANConfig) -> Iterator[tuple[int, int, int, int]]:
    """Yield of each convolution: channels in and out, taps, positions of one picture that it gives."""

    def block(before: int, width: int, positions: int) -> Iterator[tuple[int, int, int, int]]:
        yield before, width, _TAPS, positions
        yield width, width, _TAPS, positions
        if before != width:
            yield before, width, 1, positions

    before, last = vision.base_width, len(vision.widths) - 1
    yield 3, before, _TAPS, vision.side_of(0) ** 2
    for level, width in enumerate(vision.widths):
        for _ in range(vision.blocks_per_level):
            yield from block(before, width, vision.side_of(level) ** 2)
            before = width
        if level < last:
            yield width, width, _TAPS, vision.side_of(level + 1) ** 2
    positions = vision.side_of(last) ** 2
    for _ in range(2):
        yield from block(before, before, positions)
    yield from [(before, before, 1, positions)] * 4
    yield before, vision.latent_width, _TAPS, positions
    yield vision.latent_width, vision.code_width, 1, positions


def _norms(vision: VQGANConfig) -> Iterator[int]:
    """Yield the channels of each norm."""
    before = vision.base_width
    for width in vision.widths:
        for _ in range(vision.blocks_per_level):
            yield from (before, width)
            before = width
    yield from [before] * 6  # two blocks and attention in the middle, and behind them


def parameters(vision: VQGANConfig, tensor: int) -> list[Parameter]:
    """Return the parameters, the same on every rank."""
    shapes = [vision.num_codes * vision.code_width]
    for before, width, taps, _ in _convolutions(vision):
        shapes += [before * width * taps, width]
    for channels in _norms(vision):
        shapes += [channels, channels]
    return [Parameter(elements, fixed=True) for elements in shapes]


def work(vision: VQGANConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass, which each rank makes whole."""
    one = sum(2.0 * before * width * taps * positions for before, width, taps, positions in _convolutions(vision))
    positions = vision.patches_per_image
    one += 2.0 * positions * vision.num_codes * vision.code_width
    # Every position of the last map attends to all.
    return Work(0, attention=4.0 * pictures.count * positions**2 * vision.hidden_size, whole=pictures.count * one)


def again(vision: VQGANConfig, pictures: Pictures) -> float:
    """Return nothing: it has no backward pass."""
    return 0.0


def kept(vision: VQGANConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return nothing: codes have no gradient."""
    return 0.0


def passing(vision: VQGANConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the most that the forward pass needs: around a convolution of the largest map, or the distances."""
    b, shown = kernels.number_bytes, min(pictures.count, _AT_ONCE)
    # The stream, what is normed, and what comes of it, which its activation doubles.
    largest = max((2 * before + 2 * width) * positions for before, width, _, positions in _convolutions(vision))
    distances = vision.patches_per_image * vision.num_codes * 4 * 2
    pixels = pictures.count * 3 * vision.image_size**2
    return pixels + shown * max(largest * b, distances)


def rebuilt(vision: VQGANConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return nothing: it has no backward pass."""
    return 0.0


def passage(vision: VQGANConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> Passage:
    """Return what a forward pass takes time for; a convolution is taken for a product of its taps."""
    count, b = pictures.count, kernels.number_bytes
    found = list(_convolutions(vision))
    products = [Product(count * positions, width, before * taps) for before, width, taps, positions in found]
    products.append(Product(count * vision.patches_per_image, vision.num_codes, vision.code_width))
    # A norm reads its input twice and writes, as does the activation behind it; the sum of a block.
    moved = sum(6.0 * count * positions * max(before, width) * b for before, width, _, positions in found)
    return Passage(products=products, attention=(), moved=moved, stream=0, collectives=0, layers=vision.num_layers)
