"""What attention in windows attends to, and what its masks keep; a part of ``cost.py``."""

from __future__ import annotations

from megavlm.architectures.decoders.decoder.config import DecoderConfig, with_all_keys


def layers_in_window(language: DecoderConfig) -> int:
    """Return the layers that attend in a window: all but every so manieth."""
    if language.sliding_window is None:
        return 0
    every = language.sliding_window_pattern
    return language.num_layers - (language.num_layers // every if every else 0)


def masks_kept(language: DecoderConfig, tokens: int, number_bytes: int) -> int:
    """Return the bytes of masks that attention in windows keeps, of an average layer and one sample of all tokens.

    It goes on by a window of queries, which see that window and the one before (``megavlm.layers.attention``); torch
    keeps the mask of each step as numbers of the queries' type.
    """
    window = language.sliding_window or 0
    if tokens <= window or not layers_in_window(language):
        return 0
    pairs = window * window + (tokens - window) * (2 * window - 1)
    return pairs * number_bytes * layers_in_window(language) // language.num_layers


@with_all_keys
def attended(language: DecoderConfig, tokens: float, squared_lengths: float) -> float:
    """Return the sum of squares that attention of an average layer is worth: less than that of lengths, with a window.

    A segment of L positions has L^2 / 2 pairs, and L W - W^2 / 2 within a window of W. The segments are taken to be of
    one length, that of the segment of an average position. Of one that is all prefix there are L^2 pairs; how much of a
    sample is answer is not known here, and of those that have prefixes it is the smaller part.
    """
    if language.attention_mask == "prefix":
        return 2 * squared_lengths
    window, inside = language.sliding_window or 0, layers_in_window(language)
    if not inside or squared_lengths <= tokens * window:
        return squared_lengths
    narrow = tokens * (2 * window - window * window * tokens / squared_lengths)
    return (inside * narrow + (language.num_layers - inside) * squared_lengths) / language.num_layers
