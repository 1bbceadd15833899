"""The cost of SAM's tower: see :class:`megavlm.architectures.cost.TowerCost`.

Read off the layers that ``build`` makes, tensor by tensor. What is asked of features is computed of the patches behind
which they stand, which are as many for each picture.
"""

from __future__ import annotations

from megavlm.architectures.cost import Attention, Kernels, Parameter, Passage, Pictures, Product, Work
from megavlm.architectures.towers.sam.config import SamConfig

_MOMENTS = 8
"""Bytes that a norm keeps of a position beside its input: mean and deviation, in fp32."""


def _necks(vision: SamConfig) -> int:
    return 1 + int(vision.second_neck_layer is not None)


def _square(vision: SamConfig, layer: int) -> tuple[int, int]:
    """Return the squares that a picture is cut to in a layer, and the side of one."""
    window = vision.window_of(layer)
    return (1, vision.side) if window is None else ((-(-vision.side // window)) ** 2, window)


def _seen(vision: SamConfig, layer: int) -> int:
    """Return the positions of a picture that a layer attends to, with those that fill its windows."""
    squares, side = _square(vision, layer)
    return squares * side**2


def parameters(vision: SamConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank; every rank has convolutions, norms and tables whole."""
    width, ffn, size = vision.hidden_size, vision.ffn_hidden_size, vision.neck_size
    shapes = [vision.side**2 * width, *[1] * (_necks(vision) - 1), 3 * vision.patch_size**2 * width, width]
    for layer in range(vision.num_layers):
        table = (2 * _square(vision, layer)[1] - 1) * (width // vision.num_attention_heads)
        shapes += [width, width, table, table, width * width // tensor, width]
        shapes += [3 * width * width // tensor, 3 * width // tensor, width, width]
        shapes += [width * ffn // tensor, ffn // tensor, ffn * width // tensor, width]
    neck = [width * size, size, size, 9 * size**2, size, size]
    shapes += neck * _necks(vision) + [9 * 2 * size**2, 9 * 8 * size**2]
    return [Parameter(elements) for elements in shapes]


def _attention(vision: SamConfig, layer: int) -> float:
    """Return the operations of a layer's scores, their products with values, and the tables', of one picture."""
    squares, side = _square(vision, layer)
    return 4 * squares * side**4 * vision.hidden_size + 4 * squares * side**3 * vision.hidden_size


def work(vision: SamConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass; every rank makes the convolutions whole."""
    width, size, count = vision.hidden_size, vision.neck_size, pictures.count
    layers = range(vision.num_layers)
    projections = sum(_seen(vision, layer) for layer in layers) * 4 * width**2
    mlps = vision.num_layers * vision.side**2 * 2 * width * vision.ffn_hidden_size
    convolutions = vision.side**2 * (width * size + 9 * size**2) * _necks(vision)
    grid = vision.output_grid**2
    convolutions += (4 * grid * 9 * 2 * size**2 + grid * 9 * 8 * size**2) * _necks(vision)
    return Work(
        products=2 * count * (projections + mlps),
        attention=count * sum(_attention(vision, layer) for layer in layers),
        whole=2 * count * (vision.side**2 * 3 * vision.patch_size**2 * width + convolutions),
    )


def again(vision: SamConfig, pictures: Pictures) -> float:
    """Return the operations of the layers, where these are recomputed."""
    if not vision.gradient_checkpointing:
        return 0
    forward = work(vision, pictures)
    return forward.total - forward.whole


def _layer_kept(vision: SamConfig, layer: int, tensor: int, count: float, b: int) -> float:
    width, ffn, seen = vision.hidden_size, vision.ffn_hidden_size // tensor, count * _seen(vision, layer)
    own, heads = count * vision.side**2, vision.num_attention_heads // tensor
    squares, side = _square(vision, layer)
    # Inputs of two norms and of the MLP; of the projection, what fills windows with it. QKV, and what heads give.
    kept = 3 * own * width * b + seen * width * b + 4 * seen * (width // tensor) * b + 2 * own * _MOMENTS
    # Queries in the order of either table; where no kernel attends, they and the keys scaled (counted for all).
    kept += 4 * seen * (width // tensor) * b
    # The scores, of which a kernel keeps the bias and plain torch what they became.
    kept += count * squares * side**4 * heads * b
    return kept + 2 * own * ffn * b


def _behind(vision: SamConfig, count: float, b: int) -> float:
    """Return what the necks and the convolutions keep."""
    size, own, wide = vision.neck_size, count * vision.side**2, count * (4 * vision.output_grid) ** 2
    each = own * size * b * 3 + 2 * own * _MOMENTS
    each += wide * size * b + wide // 4 * 2 * size * b
    features = count * vision.output_grid**2 * vision.feature_size * b
    # What goes into the second neck is a layer's input, and kept as such.
    return own * vision.hidden_size * b + each * _necks(vision) + (features if _necks(vision) > 1 else 0)


def kept(vision: SamConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return the bytes that a tower that learns keeps."""
    b, count = kernels.number_bytes, pictures.count
    if vision.gradient_checkpointing:
        layers = vision.num_layers * count * vision.side**2 * vision.hidden_size * b
    else:
        layers = sum(_layer_kept(vision, layer, tensor, count, b) for layer in range(vision.num_layers))
    return layers + count * 3 * vision.image_size**2 * b + _behind(vision, count, b)


def passing(vision: SamConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the most that the forward pass needs beyond what it keeps."""
    b, count = kernels.number_bytes, pictures.count
    # Pixels in uint8, in fp32 twice, and normalised.
    pixels = count * 3 * vision.image_size**2 * (1 + 4 + 4 + b)
    stream, heads = count * vision.side**2 * vision.hidden_size * b, vision.num_attention_heads // tensor
    if learns:
        return max(pixels, 2 * stream)
    most = 0.0
    for layer in range(vision.num_layers):
        squares, side = _square(vision, layer)
        qkv = 4 * count * _seen(vision, layer) * vision.hidden_size // tensor * b
        most = max(most, qkv + count * squares * side**4 * heads * b * (1 if kernels.fused else 2))
    mlp = 2 * count * vision.side**2 * vision.ffn_hidden_size // tensor * b
    second = count * vision.output_grid**2 * vision.feature_size * b * (_necks(vision) - 1)
    return max(pixels + stream, second + 2 * stream + max(most, mlp))


def rebuilt(vision: SamConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
    """Return the bytes of a recomputed layer: of the one that keeps most."""
    if not vision.gradient_checkpointing:
        return 0
    b, layers = kernels.number_bytes, range(vision.num_layers)
    return max(_layer_kept(vision, layer, tensor, pictures.count, b) for layer in layers)


def passage(vision: SamConfig, tensor: int, pictures: Pictures, kernels: Kernels) -> Passage:
    """Return what a forward pass takes time for."""
    b, count, width, ffn = kernels.number_bytes, pictures.count, vision.hidden_size, vision.ffn_hidden_size // tensor
    own, size, heads = count * vision.side**2, vision.neck_size, vision.num_attention_heads
    products, attention, moved = [Product(own, width, 3 * vision.patch_size**2)], [], 0.0
    for layer in range(vision.num_layers):
        squares, side = _square(vision, layer)
        seen = count * squares * side**2
        products += [Product(seen, 3 * width // tensor, width), Product(seen, width, width // tensor)]
        products += [Product(own, ffn, width), Product(own, width, ffn)]
        attention.append(Attention(count * _attention(vision, layer), heads, width // heads, side**2))
        # Windows are cut and put together; the bias is written, and read.
        moved += (14 * own + 4 * seen * int(squares > 1)) * width * b + 4 * own * ffn * b
        moved += 2 * count * squares * side**4 * heads // tensor * b
    grid = count * vision.output_grid**2
    for _ in range(_necks(vision)):
        products += [Product(own, size, width), Product(own, size, 9 * size)]
        products += [Product(4 * grid, 2 * size, 9 * size), Product(grid, 4 * size, 18 * size)]
    return Passage(
        products=products,
        attention=attention,
        moved=moved,
        stream=own * width * b,
        collectives=4 * vision.num_layers,
        layers=vision.num_layers,
    )
