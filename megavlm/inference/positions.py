"""Rotary angles and query scales of positions, also past the length that a model was trained with.

Qwen v1 in evaluation (``modeling_qwen.py``; both are inert up to the trained length): *dynamic NTK* widens the
rotary base by alpha ^ (d / (d - 2)) with alpha = max(2 ^ ceil(log2(L / trained) + 1) - 1, 1), decided when a prompt of
L tokens is read; *logn attention* multiplies the query at 1-based position i > trained by log(i) / log(trained).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megavlm.layers.segments import to_device
from megavlm.parallel.device import local_device


def ntk_alpha(length: int, trained: int) -> float:
    """Return dynamic NTK's alpha for a prompt of ``length`` tokens."""
    return float(max(2 ** math.ceil(math.log2(length / trained) + 1) - 1, 1)) if length else 1.0


class Positions:
    """The positions of some prompts and their answers.

    Args:
        language: a chunk of the language model.
        longest: positions of the longest prompt with its answer.
        prompt_lengths: tokens of each prompt.
        ntk_length: trained length that dynamic NTK goes by, or None for no widening.
        logn_length: trained length that logn attention goes by, or None for no scaling.
        own: [.., longest] of each prompt and its answer, where positions are not counted from 0; no length is then
            given.
    """

    def __init__(
        self,
        language: Any,
        longest: int,
        prompt_lengths: Sequence[int],
        *,
        ntk_length: int | None = None,
        logn_length: int | None = None,
        own: Sequence[NDArray[np.int64]] | None = None,
    ) -> None:
        # None of a language model whose layers know no positions.
        self._rotary, self._longest, self._own = getattr(language, "rotary_pos_emb", None), longest, own
        assert own is None or (ntk_length is None and logn_length is None)
        self._alphas = [ntk_alpha(length, ntk_length) if ntk_length else 1.0 for length in prompt_lengths]
        self._tables = {alpha: self._table(alpha) for alpha in set(self._alphas)} if own is None else {}
        self._scales: Tensor | None = None
        if logn_length is not None and longest > logn_length:
            positions = torch.arange(1, longest + 1, dtype=torch.float32)
            self._scales = (positions.log() / math.log(logn_length)).clamp(min=1.0).to(local_device())

    def _table(self, alpha: float) -> Tensor:
        """[longest, 1, 1, D] angles."""
        rotary = self._rotary
        if rotary is None:
            return torch.zeros(self._longest, 1, 1, 0, device=local_device())
        if alpha == 1.0:
            return rotary.get_emb(self._longest)
        inv_freq = rotary.inv_freq
        # inv_freq is base ^ (-2i/d): another base multiplies it by a power of the ratio.
        width = 2 * inv_freq.numel()
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=inv_freq.device) / width
        rotary.inv_freq = inv_freq / (alpha ** (width / (width - 2))) ** exponents
        try:
            return rotary.get_emb(self._longest)
        finally:
            rotary.inv_freq = inv_freq

    def of(self, spans: Sequence[tuple[int, range]]) -> tuple[Tensor, Tensor | None]:
        """Return the angles [T, 1, 1, D] and the query scales [T] (None for 1) of spans of prompts, one after another.

        Args:
            spans: index of a prompt, and its positions from 0.
        """
        if self._own is not None:
            parts = [self._own[i][..., span.start : span.stop] for i, span in spans]
            whole = np.concatenate(parts or [self._own[0][..., :0]], axis=-1)
            assert self._rotary is not None, "positions of their own are those of heads that are turned"
            # Not by a call: what the layers get of the module is replaced while answers are generated.
            return self._rotary.forward(to_device(torch.from_numpy(whole), local_device())), None
        if not spans:
            some = next(iter(self._tables.values()))
            return some[:0], None if self._scales is None else self._scales[:0]
        freqs = torch.cat([self._tables[self._alphas[i]][span.start : span.stop] for i, span in spans])
        if self._scales is None:
            return freqs, None
        return freqs, torch.cat([self._scales[span.start : span.stop] for _, span in spans])

    @staticmethod
    def padded(values: Tensor, length: int) -> Tensor:
        """Return ``values`` with zeros behind them, ``length`` in all."""
        missing = length - values.size(0)
        return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values
