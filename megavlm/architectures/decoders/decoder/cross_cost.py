"""The cost of layers that attend to pictures, where a model has such: read off ``megavlm/layers/cross.py``."""

from __future__ import annotations

from megavlm.architectures.cost import Kernels, Shards, Work
from megavlm.architectures.decoders.decoder.config import DecoderConfig
from megavlm.config.lora import CROSS_LINEARS, targets_of
from megavlm.config.schema import LoraConfig


def _widths(language: DecoderConfig, tensor: int) -> tuple[int, int, int]:
    """Return the widths of queries, of keys and of the MLP's inside, on one rank."""
    width = language.kv_channels
    heads, groups = language.num_attention_heads // tensor, language.num_query_groups // tensor
    return heads * width, groups * width, language.ffn_hidden_size // tensor


def beside_parameters(language: DecoderConfig, tensor: int) -> list[int]:
    """Return what a layer has for attention to features beside text (``layers/cross_beside.py``), on one rank."""
    if not language.feature_width:
        return []
    hidden, width = language.hidden_size, (language.cross_compute_hidden_size or 0) // tensor
    return [hidden, hidden * width, 2 * language.feature_width * width, width * hidden]


def cross_parameters(language: DecoderConfig, tensor: int) -> list[int]:
    """Return the elements of each parameter of one such layer on one rank."""
    hidden, (queries, keys, ffn) = language.hidden_size, _widths(language, tensor)
    norms = [hidden, hidden, language.kv_channels, language.kv_channels, 1, 1]
    return [*norms, hidden * queries, 2 * hidden * keys, queries * hidden, 2 * ffn * hidden, ffn * hidden]


def cross_work(language: DecoderConfig, tokens: float, features: float, pairs: float) -> Work:
    """Return the operations of a forward pass through one such layer; beside text, of that attention alone.

    Args:
        language: the model.
        tokens: of the text.
        features: of its pictures.
        pairs: of tokens and features that they see.
    """
    hidden, (queries, keys, ffn) = language.hidden_size, _widths(language, 1)
    if language.feature_width:
        width = language.cross_compute_hidden_size or 0
        made = 4 * tokens * hidden * width + 4 * features * language.feature_width * width
        return Work(products=made, attention=4 * width * pairs)
    products = 2 * tokens * hidden * (2 * queries + 3 * ffn) + 2 * features * hidden * 2 * keys
    return Work(products=products, attention=4 * queries * pairs)


def cross_kept(
    language: DecoderConfig, shards: Shards, tokens: int, features: float, kernels: Kernels, *, learns: bool
) -> int:
    """Return the bytes that one such layer keeps without recomputation, beside the features themselves.

    Beside text, those of that attention alone.
    """
    if language.feature_width:
        return _beside_kept(language, shards, tokens, features, kernels, learns=learns)
    b, (queries, keys, ffn) = kernels.number_bytes, _widths(language, shards.tensor)
    stream = (tokens // shards.tensor if shards.sequence_parallel else tokens) * language.hidden_size
    # Two norms of the stream: their input (in fp32 where plain), and what their weight multiplies; so of the heads'.
    norm = b if kernels.fused else 4 + b * int(learns)
    kept = 2 * stream * norm + (tokens * queries + features * keys) * norm
    kept += (2 * stream + tokens * (queries + ffn)) * b * int(learns)  # inputs of the linear layers
    kept += (tokens * queries + 2 * features * keys) * b  # queries, keys and values that meet
    kept += tokens * queries * b + tokens * (language.num_attention_heads // shards.tensor) * 4
    # What gates that learn multiply; gate and up.
    return int(kept + 2 * stream * b * int(learns) + 2 * tokens * ffn * b)


def cross_linear_parameters(language: DecoderConfig, tensor: int) -> list[int]:
    """Return the elements of a layer's five linear weights."""
    return sorted(cross_parameters(language, tensor))[-5:]


def _adapters(language: DecoderConfig, lora: LoraConfig, tensor: int) -> list[tuple[str, int, int]]:
    """Return each adapter of one such layer on one rank: its linear layer, and the elements of A and B."""
    assert lora.rank is not None
    hidden, (queries, keys, ffn) = language.hidden_size, _widths(language, tensor)
    shapes = {
        "linear_q": (hidden, queries), "linear_kv": (hidden, keys), "linear_proj": (queries, hidden),
        "linear_fc1": (hidden, ffn), "linear_fc2": (ffn, hidden),
    }  # fmt: skip
    own = [target.linear for target in targets_of(lora, language)]
    names = [one.partition(".")[2] for one in own if one in CROSS_LINEARS or one.startswith("mlp.")]
    return [(name, lora.rank * shapes[name][0], lora.rank * shapes[name][1]) for name in names]


def cross_adapter_parameters(language: DecoderConfig, lora: LoraConfig, tensor: int) -> list[int]:
    """Return the elements of each adapter parameter of one such layer on one rank."""
    return [elements for _, *both in _adapters(language, lora, tensor) for elements in both]


def cross_adapter_work(language: DecoderConfig, lora: LoraConfig, tokens: float, features: float) -> float:
    """Return the operations of a forward pass through the adapters of one such layer."""
    found = _adapters(language, lora, 1)
    return sum(2 * (features if name == "linear_kv" else tokens) * (low + up) for name, low, up in found)


def cross_adapters_kept(
    language: DecoderConfig, lora: LoraConfig, shards: Shards, tokens: int, features: float, kernels: Kernels
) -> int:
    """Return the bytes that the adapters of one such layer keep: what A and B multiply, but the features themselves."""
    assert lora.rank is not None
    b, (queries, keys, ffn) = kernels.number_bytes, _widths(language, shards.tensor)
    ranks = shards.tensor if shards.sequence_parallel else 1
    stream, dropped = tokens // ranks * language.hidden_size, int(lora.dropout > 0)
    read = {
        "linear_q": stream * (b + dropped), "linear_proj": tokens * queries * (b + dropped),
        "linear_fc1": stream * (b + dropped), "linear_fc2": tokens * ffn * (b + dropped),
        "linear_kv": features / ranks * language.hidden_size * dropped * (b + 1),
    }  # fmt: skip
    rows = {"linear_kv": features, "linear_q": tokens, "linear_fc1": tokens}
    names = [name for name, *_ in _adapters(language, lora, shards.tensor)]
    kept = sum(read[name] for name in set(names))
    kept += sum(rows.get(name, tokens // ranks) * lora.rank * b for name in names)
    return int(kept + names.count("linear_kv") * keys * lora.rank * b)  # the rows of each part's B, side by side


def _beside_kept(
    language: DecoderConfig, shards: Shards, tokens: int, features: float, kernels: Kernels, *, learns: bool
) -> int:
    """Return the bytes that attention to features beside text keeps."""
    b, width = kernels.number_bytes, (language.cross_compute_hidden_size or 0) // shards.tensor
    stream = (tokens // shards.tensor if shards.sequence_parallel else tokens) * language.hidden_size
    kept = float(stream * (b if kernels.fused else 4 + b * int(learns)))  # its norm
    kept += (stream + tokens * width) * b * int(learns)  # inputs of the linear layers
    kept += (tokens * width + 2 * features * width) * b  # queries, keys and values that meet
    kept += tokens * width * b + tokens * (language.num_attention_heads // shards.tensor) * 4
    return int(kept)
