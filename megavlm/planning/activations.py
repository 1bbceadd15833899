"""Bytes of activations: what a forward pass keeps for the backward pass, and what comes and goes on top of it.

Read off the layers that megavlm builds, tensor by tensor, for both kinds of layers (Transformer Engine's fused ones
and plain torch). ``tests/planning/test_activations.py`` holds what is kept against the tensors that autograd saves in
the plain-torch layers. Korthikanti et al. (arXiv 2205.05198) count the same for GPT's layers.

Legend: S tokens of a pack; s tokens that this rank has between the tensor-parallel regions (S / TP with sequence
parallelism, else S); E width of the language model, F of its MLP; W and T width and positions of the tower; b bytes
of a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megavlm.config.lora import targets_of
from megavlm.config.schema import LanguageConfig, LoraConfig, ModelConfig, Recipe, VisionConfig
from megavlm.planning.layout import Chunk, Layout
from megavlm.planning.parameters import gathered_width, linear_shapes, local_groups, mlp_depth, padded_vocabulary
from megavlm.planning.shares import share


@dataclass(frozen=True)
class Held:
    """Bytes of one pass of a micro-batch through a chunk, on one rank."""

    language: int
    """Kept by the language layers, from the forward to the backward pass."""
    vision: int
    """Kept by tower and connector."""
    output: int
    """Kept by the output layer and the loss."""
    forward: int
    """Most that comes and goes within the forward pass, beyond what is kept."""
    backward: int
    """Most that comes and goes within the backward pass, with the activations of what is recomputed."""

    @property
    def kept(self) -> int:
        """All that is kept."""
        return self.language + self.vision + self.output


@dataclass(frozen=True)
class Kernels:
    """What the layers are made of."""

    fused: bool
    """Transformer Engine's layers; False for plain torch."""
    number_bytes: int
    """Bytes of an activation: 2 in bf16, 4 in fp32."""
    fp8: bool = False
    """The language model's linear layers multiply in FP8, and keep their inputs so."""


def kernels_of(recipe: Recipe) -> Kernels:
    """Return the kernels on a GPU: Transformer Engine, unless the recipe asks for plain torch or for fp32."""
    half = recipe.training.precision != "fp32"
    fused = half and recipe.parallel.transformer_impl != "torch"
    fp8 = fused and engine_key(recipe, "fp8") is not None
    return Kernels(fused=fused, number_bytes=2 if half else 4, fp8=fp8)


def engine_key(recipe: Recipe, name: str) -> Any:
    """Return a key of the recipe's ``engine`` branch, or None where it has none."""
    return getattr(getattr(recipe, "engine", None), name, None)


def weights_learn(recipe: Recipe) -> bool:
    """Whether the language model's own weights learn, and so do not wait beside adapters."""
    return not recipe.modules.language.freeze and recipe.lora.rank is None


def layer_kept(language: LanguageConfig, layout: Layout, tokens: int, kernels: Kernels, *, learns: bool) -> int:
    """Return the bytes that one language layer keeps without recomputation."""
    b, tp = kernels.number_bytes, layout.tensor
    local = tokens // tp if layout.sequence_parallel else tokens
    hidden = language.hidden_size
    queries = language.num_attention_heads * language.kv_channels // tp
    keys = local_groups(language, tp) * language.kv_channels
    ffn = language.ffn_hidden_size // tp
    stream = local * hidden
    # Both norms keep their input, the plain one in fp32; what they give goes into a linear layer.
    norms = 2 * stream * (b if kernels.fused else 4)
    inputs = 0
    if learns:
        inputs = (2 * stream + tokens * (queries + ffn)) * (1 if kernels.fp8 else b)
        inputs += 0 if kernels.fused else 2 * stream * b  # the plain norm's, before its weight is applied
    # The value stays inside the output of the QKV projection; rotation makes new queries and keys.
    projected = queries + 2 * keys
    gathered = gathered_width(language, tp)
    # Of what ranks gather to share a key/value head the value is copied, unless a norm in fp32 holds on to all of it.
    held_whole = bool(gathered) and language.qk_layernorm and not kernels.fused and b == 4
    if gathered:
        projected = keys + gathered * int(held_whole)
    attention = tokens * (projected + queries + keys) * b
    attention += tokens * (language.num_attention_heads // tp) * 4  # log-sum-exp of the softmax
    if not kernels.fused:  # cosines and sines, for queries and for keys
        attention += 4 * tokens * language.kv_channels * b
    # Its result: that of the fused kernel is also the input of the projection behind it.
    attention += 0 if kernels.fused and learns and not kernels.fp8 else tokens * queries * b
    if language.qk_layernorm:
        # The plain norm reads in fp32: keys are there already, where that is no conversion.
        read = (queries + keys) * b if kernels.fused else 4 * (queries * int(not held_whole) + keys * int(b == 2))
        attention += tokens * (read + (queries + keys) * b * int(learns and not kernels.fused))
    return norms + inputs + attention + tokens * 2 * ffn * b


def adapters_kept(language: LanguageConfig, lora: LoraConfig, layout: Layout, tokens: int, kernels: Kernels) -> int:
    """Return the bytes that the adapters of one language layer keep: what A and B multiply."""
    assert lora.rank is not None
    b, tp = kernels.number_bytes, layout.tensor
    local = tokens // tp if layout.sequence_parallel else tokens
    queries, keys = (n * language.kv_channels // tp for n in (language.num_attention_heads, language.num_query_groups))
    inputs = {
        "linear_qkv": local * language.hidden_size, "linear_proj": tokens * queries,
        "linear_fc1": local * language.hidden_size, "linear_fc2": tokens * language.ffn_hidden_size // tp,
    }  # fmt: skip
    kept = 0
    for name, elements in inputs.items():
        own = [target for target in targets_of(lora, language.layer_names) if target.linear.endswith(name)]
        if not own:
            continue
        # The fused attention's result is kept as such; dropout makes another tensor, and has a mask of bytes.
        there = kernels.fused and name == "linear_proj" and not lora.dropout
        kept += elements * (b * int(not there) + int(lora.dropout > 0))
        column = name in ("linear_qkv", "linear_fc1")
        kept += len(own) * (tokens if column else local) * lora.rank * b
        rows = sum((queries, keys, keys)[target.part] for target in own)
        if own[0].parts == 3 and gathered_width(language, tp):  # what multiplies each row of the layer, zeros among it
            kept += (queries + 2 * keys) * len(own) * lora.rank * b
        elif own[0].parts == 3:  # the rows of each part's B, side by side
            kept += rows * lora.rank * b
    return kept


def language_kept(recipe: Recipe, layout: Layout, chunk: Chunk, tokens: int, kernels: Kernels) -> int:
    """Return the bytes that the language layers of a chunk keep, with the recipe's recomputation."""
    language, parallel = recipe.model.language, recipe.parallel
    learns, adapted = weights_learn(recipe), recipe.lora.rank is not None
    local = tokens // layout.tensor if layout.sequence_parallel else tokens
    if parallel.recompute_granularity == "full":
        units = -(-chunk.layers // (parallel.recompute_num_layers or 1))
        angles = tokens * language.kv_channels * 4  # of the rotary positions, fp32, one tensor for all layers
        return units * local * language.hidden_size * kernels.number_bytes + angles
    layer = layer_kept(language, layout, tokens, kernels, learns=learns)
    if parallel.recompute_granularity == "selective":
        heads = language.num_attention_heads // layout.tensor
        layer -= tokens * heads * 4
        # The result is still there as the input of the projection, where that keeps one.
        if not (kernels.fused and learns):
            layer -= tokens * heads * language.kv_channels * kernels.number_bytes
    if adapted:
        layer += adapters_kept(language, recipe.lora, layout, tokens, kernels)
    return chunk.layers * layer


def vision_layer_kept(vision: VisionConfig, tensor: int, images: int, kernels: Kernels) -> int:
    """Return the bytes that one layer of a tower that learns keeps."""
    b = kernels.number_bytes
    positions = images * (vision.patches_per_image + int(vision.class_token))
    width, ffn = vision.hidden_size, vision.ffn_hidden_size // tensor
    # Inputs of two norms and of the linear layers behind them; QKV and the attention's result; around the activation.
    around = 3 if vision.activation == "quick_gelu" else 2
    kept = 4 * positions * width * b + 4 * positions * (width // tensor) * b + around * positions * ffn * b
    return kept + positions * (vision.num_attention_heads // tensor) * 4


def vision_kept(recipe: Recipe, layout: Layout, images: int, kernels: Kernels) -> int:
    """Return the bytes that tower and connector keep for ``images`` images."""
    vision, modules, b = recipe.model.vision, recipe.modules, kernels.number_bytes
    tensor, connected = _share(recipe, "connector", layout, images)
    connector = connector_kept(recipe.model, tensor, connected, kernels, learns=not modules.connector.freeze)
    tensor, images = _share(recipe, "vision", layout, images)
    kept = 0
    if not modules.vision.freeze:
        positions = images * (vision.patches_per_image + int(vision.class_token))
        stream = positions * vision.hidden_size * b
        if vision.gradient_checkpointing:
            kept += vision.num_layers * stream
        else:
            kept += vision.num_layers * vision_layer_kept(vision, tensor, images, kernels)
        # Pixels into the patch embedding; inputs of the outer norms.
        kept += images * 3 * vision.image_size**2 * b
        kept += stream * (int(vision.pre_layernorm) + int(vision.post_layernorm))
    if not (modules.vision.freeze and modules.connector.freeze):
        kept += connector
    return kept


def _share(recipe: Recipe, part: str, layout: Layout, images: int) -> tuple[int, int]:
    ranks, seen = share(recipe.model, part, layout, images)
    return ranks, int(seen)


def connector_kept(model: ModelConfig, tensor: int, images: int, kernels: Kernels, *, learns: bool) -> int:
    """Return the bytes that the connector keeps."""
    b, hidden = kernels.number_bytes, model.language.hidden_size
    patches = images * model.vision.patches_per_image
    features = patches * model.vision.hidden_size * b * int(learns)
    if model.connector.num_queries is None:
        depth, kept = mlp_depth(model.connector.preset), features
        for layer in range(depth - 1):
            width = hidden // tensor if layer % 2 == 0 else hidden
            kept += patches * width * b * (1 + int(learns))  # before and after the activation
        return kept
    assert model.connector.head_dim is not None
    queries = images * model.connector.num_queries
    wide, split = patches * hidden * b, patches * hidden // tensor * b
    # ln_kv's input; keys and values, which see it with and without positions.
    kept = wide + 2 * split + 2 * wide * int(learns)
    # Queries and result of the attention; ln_post's input and output.
    kept += 2 * queries * hidden // tensor * b + queries * hidden * b * (1 + int(learns))
    kept += queries * (hidden // model.connector.head_dim // tensor) * 4
    return kept + features * int(model.vision.hidden_size != hidden)


def vision_passing(recipe: Recipe, layout: Layout, images: int, kernels: Kernels) -> int:
    """Return the most that the tower's forward pass needs beyond what it keeps: all of it, where it is frozen."""
    vision, b = recipe.model.vision, kernels.number_bytes
    tp, images = _share(recipe, "vision", layout, images)
    positions = images * (vision.patches_per_image + int(vision.class_token))
    stream = positions * vision.hidden_size * b
    split, ffn = stream // tp, positions * vision.ffn_hidden_size // tp * b
    # The residual stream with a norm's result, then QKV and the attention's result, or the MLP around its bias.
    attention, mlp = 3 * split + split, 2 * ffn
    # Pixels in fp32, their normalised copy and the patches they become.
    pixels = images * 3 * vision.image_size**2 * (1 + 4 + 4 + b)
    if not recipe.modules.vision.freeze:
        return max(pixels, 2 * stream)
    return max(pixels + stream, 2 * stream + max(attention, mlp))


def held_by(recipe: Recipe, layout: Layout, chunk: Chunk, tokens: int, images: int) -> Held:
    """Return the bytes of one micro-batch in one chunk, on one rank."""
    kernels = kernels_of(recipe)
    b, tp, language = kernels.number_bytes, layout.tensor, recipe.model.language
    learns, lora = weights_learn(recipe), recipe.lora
    head = learns or lora.train_head
    hidden, ffn = language.hidden_size, language.ffn_hidden_size // tp
    local = tokens // tp if layout.sequence_parallel else tokens
    wide, stream = tokens * hidden * b, local * hidden * b
    kept = language_kept(recipe, layout, chunk, tokens, kernels)
    vision = output = 0
    # Within a layer, forward: what the projection gives before it is reduced, and after.
    forward = wide + 2 * stream
    # Backward, beside the gradient of the residual stream: gradients around the activation, less the result that the
    # second product has let go of; then the gradients of the first product's weight and input, less the activation's.
    inner = tokens * ffn * b
    backward = 2 * stream + max(3 * inner, int(learns) * 2 * ffn * hidden * b + wide - inner)
    if lora.rank is not None:  # what adapters add to gate and up, before or after the activation's own gradient
        backward = 2 * stream + 4 * inner
    if lora.quantize is not None:  # the largest weight, while it multiplies
        weight = max(linear_shapes(language, tp)) * b
        forward += weight
        backward = 2 * stream + max(4 * inner, 2 * inner + weight + wide)
    # What ranks gather to share key/value heads, before and after it is put in order, or its gradient. The rest of the
    # layer is not there yet, or no more.
    gathered = 2 * tokens * gathered_width(language, tp) * b
    layer = layer_kept(language, layout, tokens, kernels, learns=learns)
    if lora.rank is not None:
        layer += adapters_kept(language, lora, layout, tokens, kernels)
    if recipe.parallel.recompute_granularity == "full":
        unit = min(recipe.parallel.recompute_num_layers or 1, chunk.layers)
        backward += unit * layer
        if gathered:
            forward = max(forward, gathered + 2 * stream)
            backward = max(backward, gathered + 2 * stream + (unit - 1) * layer)
    elif gathered:
        forward, backward = (max(most, gathered + 4 * stream - layer) for most in (forward, backward))
    if chunk.last:
        rows = padded_vocabulary(language, tp) // tp
        # The final norm and the output layer keep their inputs; the loss keeps the softmax in fp32.
        output = stream * (b if kernels.fused else 4 + b * int(learns)) // b + stream * int(head) + tokens * rows * 4
        # The logits themselves, forward; their gradient and the weight's, backward. In fp32 these are in place.
        logits = tokens * rows * b * int(b == 2)
        forward = max(forward, logits)
        products = logits + wide + int(head) * rows * hidden * b - tokens * rows * 4 * int(b == 2)
        # By the time that the layers' turn comes, the loss has let go of what it kept.
        backward = max(logits, products, backward - output)
    if chunk.first:
        vision = vision_kept(recipe, layout, images, kernels)
        if layout.sequence_parallel:  # the first layer's input is a view of the whole sequence
            vision += wide - stream
        # The tower comes before, and its backward pass after, what the language layers keep.
        passing = vision_passing(recipe, layout, images, kernels)
        forward = max(forward, passing - kept - output - (vision if recipe.modules.vision.freeze else 0))
        backward = max(backward, _vision_backward(recipe, layout, images, kernels) - kept - output)
        if learns or lora.train_embeddings:  # the embedding's gradient
            backward = max(backward, padded_vocabulary(language, tp) // tp * hidden * b + wide - kept - output)
    return Held(language=kept, vision=vision, output=output, forward=forward, backward=backward)


def _vision_backward(recipe: Recipe, layout: Layout, images: int, kernels: Kernels) -> int:
    """Return what the backward pass of a tower that learns needs on top: a recomputed layer."""
    vision = recipe.model.vision
    if recipe.modules.vision.freeze or not vision.gradient_checkpointing:
        return 0
    tensor, images = _share(recipe, "vision", layout, images)
    return vision_layer_kept(vision, tensor, images, kernels)
