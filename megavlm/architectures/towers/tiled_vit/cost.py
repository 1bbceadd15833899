"""The cost of a vision transformer on tiles: see :class:`megavlm.architectures.cost.TowerCost`.

Read off the layers that ``build`` makes, tensor by tensor. Every picture costs as much as one of all tiles.
"""

from __future__ import annotations

from megavlm.architectures.cost import Attention, Kernels, Parameter, Passage, Pictures, Product, Work
from megavlm.architectures.towers.tiled_vit.config import TiledViTConfig


def _each(vision: TiledViTConfig) -> int:
    """Return the positions of a picture."""
    return vision.max_num_tiles * vision.padded_features


def _layers(vision: TiledViTConfig) -> int:
    return vision.num_layers + vision.num_global_layers


def features(vision: TiledViTConfig, pictures: Pictures) -> float:
    """Return the features that come out: of each tile one more than patches."""
    return pictures.patches * vision.tile_features / vision.patches_per_image


def _pairs(vision: TiledViTConfig, pictures: Pictures) -> float:
    """Return pairs of positions that attend to each other: all but those of padding and padding."""
    each = _each(vision)
    held = features(vision, pictures) / max(pictures.count, 1)  # of a picture of average size
    return pictures.count * (each**2 - (each - held) ** 2)


def parameters(vision: TiledViTConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    width, ffn, rows, tiles = vision.hidden_size, vision.ffn_hidden_size, len(vision.ratios) + 1, vision.max_num_tiles
    shapes = [vision.patch_values * width, width, vision.tile_features * width, 1]
    shapes += [rows * tiles * vision.tile_features * width, rows * tiles * width, 1, rows * tiles * width, 1]
    shapes += [width] * 4
    layer = [width] * 4 + [3 * width * width // tensor, width * width // tensor]
    layer += [width * ffn // tensor, ffn // tensor, ffn * width // tensor, width]
    shapes += layer * vision.num_layers + [*layer, 1, 1] * vision.num_global_layers
    return [Parameter(elements) for elements in shapes]


def work(vision: TiledViTConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass; every rank makes the patch embedding whole."""
    width, positions = vision.hidden_size, pictures.count * _each(vision)
    weights = 4 * width * width + 2 * width * vision.ffn_hidden_size
    return Work(
        products=_layers(vision) * 2 * positions * weights,
        attention=_layers(vision) * 4 * width * _pairs(vision, pictures),
        whole=2 * pictures.patches * vision.patch_values * width,
    )


def again(vision: TiledViTConfig, pictures: Pictures) -> float:
    """Return the operations of the layers, where these are recomputed."""
    if not vision.gradient_checkpointing:
        return 0
    forward = work(vision, pictures)
    return forward.total - forward.whole


def _layer_kept(vision: TiledViTConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    b, positions = kernels.number_bytes, pictures.count * _each(vision)
    width, ffn = vision.hidden_size, vision.ffn_hidden_size // tensor
    # Inputs of two norms and of the linear layers behind them; QKV and the attention's result, once more where it is
    # put together; around the activation.
    kept = 4 * positions * width * b + (4 + int(not kernels.fused)) * positions * (width // tensor) * b
    return kept + 2 * positions * ffn * b + positions * (vision.num_attention_heads // tensor) * 4


def kept(vision: TiledViTConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return the bytes that a tower that learns keeps."""
    b = kernels.number_bytes
    stream = pictures.count * _each(vision) * vision.hidden_size * b
    if vision.gradient_checkpointing:
        layers = _layers(vision) * stream
    else:
        layers = _layers(vision) * _layer_kept(vision, tensor, pictures, kernels)
        layers += 2 * vision.num_global_layers * stream  # what gates multiply
    # Pixels into the patch embedding; inputs of the outer norms; rows of the learned tables.
    return layers + pictures.patches * vision.patch_values * b + 3 * stream


def passing(vision: TiledViTConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the most that the forward pass needs beyond what it keeps."""
    b, positions = kernels.number_bytes, pictures.count * _each(vision)
    stream = positions * vision.hidden_size * b
    # Pixels in uint8, in fp32 twice, and normalised.
    pixels = pictures.patches * vision.patch_values * (1 + 4 + 4 + b)
    between = features(vision, pictures) * vision.feature_size * b
    if learns:
        return max(pixels, 2 * stream, between)
    layer = max(4 * stream // tensor, positions * 2 * vision.ffn_hidden_size // tensor * b)
    held = len(vision.intermediate_layers) * stream
    return max(pixels + stream, 2 * stream + held + layer, held + stream + 2 * between)


def rebuilt(vision: TiledViTConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return the bytes of a recomputed layer."""
    return _layer_kept(vision, tensor, pictures, kernels) if vision.gradient_checkpointing else 0


def passage(vision: TiledViTConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> Passage:
    """Return what a forward pass takes time for."""
    positions, b = pictures.count * _each(vision), kernels.number_bytes
    width, ffn, layers = vision.hidden_size, vision.ffn_hidden_size // tensor, _layers(vision)
    shapes = [(3 * width // tensor, width), (width, width // tensor), (ffn, width), (width, ffn)] * layers
    products = [Product(positions, rows, inputs) for rows, inputs in shapes]
    products.append(Product(pictures.patches, width, vision.patch_values))
    stream, heads = positions * width * b, vision.num_attention_heads
    operations = layers * 4 * width * _pairs(vision, pictures)
    return Passage(
        products=products,
        attention=[Attention(operations, heads, width // heads, _each(vision))],
        moved=layers * (14 * stream + 4 * positions * ffn * b),
        stream=stream,
        collectives=4 * layers,
        layers=layers,
    )
