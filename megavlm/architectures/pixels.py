"""Pixels as towers that convolve take them: uint8 of a picture, normalised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normaliser:
    """Pixels minus a mean, over a deviation, for each colour.

    Args:
        mean: of red, green and blue from 0 to 1.
        std: the same.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._values = mean, std
        # Not buffers: Megatron's Float16Module would round them to bf16.
        self._made: tuple[Tensor, Tensor] | None = None

    def __call__(self, images_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [N, 3, H, W] in ``dtype``: normalised where they are uint8, else as they are."""
        if images_NCHW.dtype is torch.uint8:
            mean_C11, std_C11 = self._on(images_NCHW.device)
            images_NCHW = (images_NCHW.float() / 255.0 - mean_C11) / std_C11
        return images_NCHW.to(dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[3, 1, 1] fp32 each, made once: to copy them to the device in every micro-batch is to wait for it."""
        if self._made is None or self._made[0].device != device:
            mean, std = (torch.tensor(one).view(3, 1, 1).to(device) for one in self._values)
            self._made = mean, std
        return self._made
