"""The cost of layers that attend to pictures, where a model has such: read off ``megavlm/layers/cross.py``."""

from __future__ import annotations

from megavlm.architectures.cost import Kernels, Shards, Work
from megavlm.architectures.decoders.decoder.config import DecoderConfig


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
    # What the gates multiply; gate and up.
    return int(kept + 2 * stream * b + 2 * tokens * ffn * b)


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
