"""What planner and MFU ask of the tower."""

from __future__ import annotations

from megavlm.architectures.cost import Kernels, Parameter, Passage, Pictures, Product, Work
from quilt.config import PatchworkConfig


def _input(vision: PatchworkConfig) -> int:
    return 3 * vision.patch_size**2


def parameters(vision: PatchworkConfig, tensor: int) -> list[Parameter]:
    """Return each parameter on one rank."""
    width, (rows, columns) = vision.hidden_size, vision.grid
    layers = [width * width // tensor, width // tensor] * vision.num_layers
    return [Parameter(n) for n in (rows * columns * width, _input(vision) * width // tensor, width // tensor, *layers)]


def work(vision: PatchworkConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    width = vision.hidden_size
    return Work(2 * pictures.patches * width * (_input(vision) + vision.num_layers * width))


def again(_vision: PatchworkConfig, _pictures: Pictures) -> float:
    """Nothing is computed twice."""
    return 0


def kept(vision: PatchworkConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return what is kept: inputs of the products, and of the activations."""
    stream = pictures.patches * vision.hidden_size * kernels.number_bytes
    return pictures.patches * _input(vision) * kernels.number_bytes + 2 * vision.num_layers * stream


def passing(vision: PatchworkConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return what comes and goes."""
    return 3 * pictures.patches * vision.hidden_size * kernels.number_bytes


def rebuilt(_vision: PatchworkConfig, _tensor: int, _pictures: Pictures, _kernels: Kernels) -> float:
    """Nothing is computed twice."""
    return 0


def passage(vision: PatchworkConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> Passage:
    """Return what a forward pass takes time for."""
    width, patches = vision.hidden_size, pictures.patches
    stream = patches * width * kernels.number_bytes
    products = [Product(patches, width // tensor, n) for n in (_input(vision), *[width] * vision.num_layers)]
    return Passage(products, (), 3 * vision.num_layers * stream, stream, vision.num_layers + 1, vision.num_layers)
