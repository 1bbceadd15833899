"""The cost of a vision transformer on square images: see :class:`megavlm.architectures.cost.TowerCost`.

Read off the layers that ``build`` makes, tensor by tensor.
"""

from __future__ import annotations

from megavlm.architectures.cost import Attention, Kernels, Parameter, Passage, Pictures, Product, Work
from megavlm.architectures.towers.vit.config import ViTConfig


def _seen(vision: ViTConfig, pictures: Pictures) -> Pictures:
    """Return what goes through the layers: the pictures, or the tiles of all their sizes."""
    return pictures.times(vision.tiles)


def _positions(vision: ViTConfig, pictures: Pictures) -> float:
    return pictures.patches + vision.tokens * pictures.count


def _fc1(vision: ViTConfig) -> int:
    return vision.ffn_hidden_size * (1 + int(vision.gated_mlp))


def parameters(vision: ViTConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    width, ffn = vision.hidden_size, vision.ffn_hidden_size
    shapes = [3 * vision.patch_size**2 * width, vision.positional_rows * width]
    shapes += [width] * int(vision.conv_bias) + [width] * int(vision.class_token)
    shapes += [vision.register_tokens * width] * int(vision.register_tokens > 0)
    shapes += [vision.positional_grid**2 * width] * int(vision.feature_table)
    norm = [width] if vision.normalization == "RMSNorm" else [width, width]
    shapes += norm * (int(vision.pre_layernorm) + int(vision.post_layernorm))
    layer = norm * 2 + [width] * (2 * int(vision.layer_scale))
    biases = [3 * width // tensor] if vision.key_bias else [width // tensor] * 2
    layer += [3 * width * width // tensor, *biases * int(vision.add_qkv_bias)]
    layer += [width // tensor] * (2 * int(vision.qk_norm is not None))
    layer += [width * width // tensor, width, *[width // tensor] * (2 * int(vision.attention_norm))]
    layer += [width * _fc1(vision) // tensor, _fc1(vision) // tensor, ffn * width // tensor, width]
    layer += [ffn // tensor] * (2 * int(vision.mlp_norm))
    return [Parameter(elements) for elements in shapes + layer * vision.num_layers]


def work(vision: ViTConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass; every rank makes the patch embedding whole."""
    pictures = _seen(vision, pictures)
    width, tokens = vision.hidden_size, vision.tokens
    weights = 4 * width * width + width * (_fc1(vision) + vision.ffn_hidden_size)
    squared = pictures.squared + tokens * (2 * pictures.patches + tokens * pictures.count)
    return Work(
        products=vision.num_layers * 2 * _positions(vision, pictures) * weights,
        attention=vision.num_layers * 4 * squared * width,
        whole=2 * pictures.patches * 3 * vision.patch_size**2 * width,
    )


def again(vision: ViTConfig, pictures: Pictures) -> float:
    """Return the operations of the layers, where these are recomputed."""
    if not vision.gradient_checkpointing:
        return 0
    forward = work(vision, pictures)
    return forward.total - forward.whole


def _layer_kept(vision: ViTConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    b, positions = kernels.number_bytes, _positions(vision, pictures)
    width, ffn = vision.hidden_size, vision.ffn_hidden_size // tensor
    # Inputs of two norms and of the linear layers behind them; QKV and the attention's result; around the activation.
    around = 3 if vision.activation == "quick_gelu" else 2
    if vision.gated_mlp:  # both inputs of the gate, and what they become before and behind their product
        around = 5
    kept = 4 * positions * width * b + 4 * positions * (width // tensor) * b + around * positions * ffn * b
    kept += _beside(vision, tensor, positions, b)
    # Plain torch computes these norms in fp32: it keeps such a copy, and what is normalised but not yet scaled.
    copy = 0 if b == 4 else 4
    if vision.qk_norm is not None:  # the results too, as the values' view keeps what they were made of
        kept += 2 * positions * (width // tensor) * (copy + 2 * b)
    if vision.normalization == "RMSNorm" and not kernels.fused:  # instead of the stream
        kept += 2 * positions * width * 4
    if vision.layer_scale:  # what attention and MLP give, with its bias
        kept += 2 * positions * width * b
    return kept + positions * (vision.num_attention_heads // tensor) * 4


def _beside(vision: ViTConfig, tensor: int, positions: float, b: int) -> float:
    """Return the bytes of what EVA02's layers keep beside a plain one's."""
    kept, part = 0.0, vision.hidden_size // tensor
    # Turned, or with a bias of their own, two of queries, keys and values are kept apart from the projection's result,
    # which the third is a view of; with both nothing is.
    kept += 2 * positions * part * b * int((vision.rotary_base is not None) != _own_biases(vision))
    if vision.rotary_base is not None:  # sines and cosines for queries and for keys
        kept += 4 * vision.positions * (vision.hidden_size // vision.num_attention_heads) * b
    for width, normed in ((part, vision.attention_norm), (vision.ffn_hidden_size // tensor, vision.mlp_norm)):
        # Its result; over several ranks in fp32 what is around the mean and what that becomes, but not what went in.
        kept += int(normed) * positions * width * (b if tensor == 1 else 8)
    return kept


def _own_biases(vision: ViTConfig) -> bool:
    return vision.add_qkv_bias and not vision.key_bias


def kept(vision: ViTConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return the bytes that a tower that learns keeps."""
    pictures = _seen(vision, pictures)
    stream = _positions(vision, pictures) * vision.hidden_size * kernels.number_bytes
    if vision.gradient_checkpointing:
        layers = vision.num_layers * stream
        if vision.rotary_base is not None:  # angles
            layers += 4 * vision.positions * (vision.hidden_size // vision.num_attention_heads)
    else:
        layers = vision.num_layers * _layer_kept(vision, tensor, pictures, kernels)
    # Pixels into the patch embedding; inputs of the outer norms.
    pixels = pictures.count * 3 * vision.tile_size**2 * kernels.number_bytes
    return layers + pixels + stream * (int(vision.pre_layernorm) + int(vision.post_layernorm))


def passing(vision: ViTConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the most that the forward pass needs beyond what it keeps."""
    pictures = _seen(vision, pictures)
    b, positions = kernels.number_bytes, _positions(vision, pictures)
    stream = positions * vision.hidden_size * b
    split = stream // tensor
    # The residual stream with a norm's result, then QKV and the attention's result, or the MLP around its bias.
    attention, mlp = 3 * split + split, positions * (_fc1(vision) + vision.ffn_hidden_size) // tensor * b
    # Pixels in fp32, their normalised copy and the patches they become.
    pixels = pictures.count * 3 * vision.tile_size**2 * (1 + 4 + 4 + b)
    if learns:
        return max(pixels, 2 * stream)
    # Outputs of lower layers that are features too wait for the last one.
    waiting = (len(set(vision.feature_layers)) - 1) * stream if vision.feature_layers else 0
    return max(pixels + stream, waiting + 2 * stream + max(attention, mlp))


def rebuilt(vision: ViTConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return the bytes of a recomputed layer."""
    return _layer_kept(vision, tensor, _seen(vision, pictures), kernels) if vision.gradient_checkpointing else 0


def passage(vision: ViTConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> Passage:
    """Return what a forward pass takes time for."""
    attention, pictures = work(vision, pictures).attention, _seen(vision, pictures)
    positions, b = _positions(vision, pictures), kernels.number_bytes
    width, ffn, fc1 = vision.hidden_size, vision.ffn_hidden_size // tensor, _fc1(vision) // tensor
    shapes = [(3 * width // tensor, width), (width, width // tensor), (fc1, width), (width, ffn)] * vision.num_layers
    products = [Product(positions, rows, inputs) for rows, inputs in shapes]
    products.append(Product(pictures.patches, width, 3 * vision.patch_size**2))
    stream = positions * width * b
    heads = vision.num_attention_heads
    # Layer scale reads and writes both branches again; the norm of queries and keys passes over them in fp32.
    moved = 14 * stream + 2 * positions * (fc1 + ffn) * b
    # Turning queries and keys, adding to queries and values, norms inside: each reads and writes.
    moved += 4 * stream / tensor * (int(vision.rotary_base is not None) + int(_own_biases(vision)))
    moved += 2 * stream / tensor * int(vision.attention_norm) + 2 * positions * ffn * b * int(vision.mlp_norm)
    moved += 4 * stream * int(vision.layer_scale) + 12 * stream / tensor * int(vision.qk_norm is not None)
    return Passage(
        products=products,
        attention=[Attention(attention, heads, width // heads, vision.positions)],
        moved=vision.num_layers * moved,
        stream=stream,
        collectives=4 * vision.num_layers,
        layers=vision.num_layers,
    )
