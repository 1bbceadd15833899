"""The cost of a vision transformer on pictures of any size: see :class:`megavlm.architectures.cost.TowerCost`.

Read off the layers that ``build`` makes, tensor by tensor.
"""

from __future__ import annotations

from megavlm.architectures.cost import Attention, Kernels, Parameter, Passage, Pictures, Product, Work
from megavlm.architectures.towers.packed_vit.config import PackedViTConfig


def _positions(vision: PackedViTConfig, pictures: Pictures) -> float:
    return pictures.patches + int(vision.class_token) * pictures.count


def _whole_layers(vision: PackedViTConfig) -> int:
    """Return the layers that attend to whole pictures."""
    return vision.num_layers if vision.window is None else len(set(vision.full_attention_layers))


def _fc1(vision: PackedViTConfig) -> int:
    return vision.ffn_hidden_size * (1 + int(vision.gated_mlp))


def _squared(vision: PackedViTConfig, pictures: Pictures) -> tuple[float, float]:
    """Return pairs of positions that attend to each other, in a layer of whole pictures and in one of windows."""
    token = int(vision.class_token)
    whole = pictures.squared + token * (2 * pictures.patches + pictures.count)
    if vision.window is None:
        return whole, 0
    # Windows at the edges are smaller; none is larger than its picture.
    window = (vision.window * vision.spatial_merge_size) ** 2
    return whole, min(pictures.patches * window, whole)


def parameters(vision: PackedViTConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    width, ffn, fc1 = vision.hidden_size, vision.ffn_hidden_size, _fc1(vision)
    bias = int(vision.add_bias_linear)
    shapes = [vision.patch_values * width] + [width] * int(vision.conv_bias)
    if vision.positional_grid is not None:
        shapes.append(vision.positional_grid**2 * width)
    if vision.class_token:
        shapes += [width, width // vision.num_attention_heads // 2]
    norm = [width] if vision.normalization == "RMSNorm" else [width, width]
    shapes += norm * (int(vision.pre_layernorm) + int(vision.post_layernorm))
    layer = norm * 2 + [3 * width * width // tensor, *[3 * width // tensor] * int(vision.add_qkv_bias)]
    layer += [width * width // tensor] + [width] * bias
    layer += [width * fc1 // tensor, *[fc1 // tensor] * bias, ffn * width // tensor, *[width] * bias]
    return [Parameter(elements) for elements in shapes + layer * vision.num_layers]


def work(vision: PackedViTConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass; every rank makes the patch embedding whole."""
    width, whole = vision.hidden_size, _whole_layers(vision)
    weights = 4 * width * width + width * (_fc1(vision) + vision.ffn_hidden_size)
    full, windowed = _squared(vision, pictures)
    return Work(
        products=vision.num_layers * 2 * _positions(vision, pictures) * weights,
        attention=4 * width * (whole * full + (vision.num_layers - whole) * windowed),
        whole=2 * pictures.patches * vision.patch_values * width,
    )


def again(vision: PackedViTConfig, pictures: Pictures) -> float:
    """Return the operations of the layers, where these are recomputed."""
    if not vision.gradient_checkpointing:
        return 0
    forward = work(vision, pictures)
    return forward.total - forward.whole


def _layer_kept(vision: PackedViTConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    b, positions = kernels.number_bytes, _positions(vision, pictures)
    width, ffn, fc1 = vision.hidden_size, vision.ffn_hidden_size // tensor, _fc1(vision) // tensor
    # Inputs of two norms and of the linear layers behind them; QKV and the attention's result.
    kept = 4 * positions * width * b + 4 * positions * (width // tensor) * b
    if vision.rotary_base is not None:  # turned queries and keys, and the sines and cosines of either
        kept += positions * (2 * (width // tensor) + 4 * (width // vision.num_attention_heads)) * b
    if vision.class_token:  # whose angles learn: what they turned
        kept += 2 * positions * (width // tensor) * b
    if not kernels.fused:  # the results of pictures, before they are joined
        kept += positions * (width // tensor) * b
    # Around the activation: with a gate both of its inputs, and what they become before and behind their product.
    around = fc1 + 3 * ffn if vision.gated_mlp else (3 if vision.activation == "quick_gelu" else 2) * ffn
    kept += positions * around * b
    if vision.normalization == "RMSNorm" and not kernels.fused:  # instead of the stream
        kept += 2 * positions * width * 4
    return kept + positions * (vision.num_attention_heads // tensor) * 4


def kept(vision: PackedViTConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return the bytes that a tower that learns keeps."""
    b = kernels.number_bytes
    stream = _positions(vision, pictures) * vision.hidden_size * b
    if vision.gradient_checkpointing:
        layers = vision.num_layers * stream
    else:
        layers = vision.num_layers * _layer_kept(vision, tensor, pictures, kernels)
    # Pixels into the patch embedding; rotary angles; inputs of the outer norms.
    pixels = pictures.patches * vision.patch_values * b
    angles = _positions(vision, pictures) * (vision.hidden_size // vision.num_attention_heads) * 4
    outer = stream * (int(vision.pre_layernorm) + int(vision.post_layernorm))
    if vision.normalization == "RMSNorm" and not kernels.fused:  # what is normalised but not yet scaled
        outer *= 2
    return layers + pixels + angles + outer


def passing(vision: PackedViTConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the most that the forward pass needs beyond what it keeps."""
    b, positions = kernels.number_bytes, _positions(vision, pictures)
    stream = positions * vision.hidden_size * b
    attention = 4 * stream // tensor
    mlp = positions * (_fc1(vision) + vision.ffn_hidden_size) // tensor * b
    # Pixels in uint8, in fp32 twice, and normalised.
    pixels = pictures.patches * vision.patch_values * (1 + 4 + 4 + b)
    if vision.positional_grid is not None:  # rows of the table in fp32: a tap, it weighted, and their sum
        pixels = max(pixels, 3 * positions * vision.hidden_size * 4)
    if learns:
        return max(pixels, 2 * stream)
    return max(pixels + stream, 2 * stream + max(attention, mlp))


def rebuilt(vision: PackedViTConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return the bytes of a recomputed layer."""
    return _layer_kept(vision, tensor, pictures, kernels) if vision.gradient_checkpointing else 0


def passage(vision: PackedViTConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> Passage:
    """Return what a forward pass takes time for."""
    positions, b = _positions(vision, pictures), kernels.number_bytes
    width, ffn, fc1 = vision.hidden_size, vision.ffn_hidden_size // tensor, _fc1(vision) // tensor
    shapes = [(3 * width // tensor, width), (width, width // tensor), (fc1, width), (width, ffn)] * vision.num_layers
    products = [Product(positions, rows, inputs) for rows, inputs in shapes]
    products.append(Product(pictures.patches, width, vision.patch_values))
    stream, heads, whole = positions * width * b, vision.num_attention_heads, _whole_layers(vision)
    full, windowed = (4 * width * pairs for pairs in _squared(vision, pictures))
    kinds = [Attention(whole * full, heads, width // heads, pictures.squared / max(pictures.patches, 1))]
    if vision.window is not None:
        side = (vision.window * vision.spatial_merge_size) ** 2
        kinds.append(Attention((vision.num_layers - whole) * windowed, heads, width // heads, side))
    # Turning queries and keys reads and writes both.
    moved = 14 * stream + 2 * positions * (fc1 + ffn) * b + 4 * stream / tensor * int(vision.rotary_base is not None)
    return Passage(
        products=products,
        attention=kinds,
        moved=vision.num_layers * moved,
        stream=stream,
        collectives=4 * vision.num_layers,
        layers=vision.num_layers,
    )
