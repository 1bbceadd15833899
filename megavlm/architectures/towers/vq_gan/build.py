"""VQ-GAN's encoder and its codebook (arXiv 2012.09841), as Chameleon has them (arXiv 2405.09818).

Written from ``ChameleonVQVAE`` of Transformers 5; names of parameters are those of its modules. It is whole on each
rank that has it, and never trained.

Shape legend: N images, C channels, H x W positions of a map, P positions of the last map, K codes, Z width of a code.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.architectures.context import BuildContext
from megavlm.architectures.pixels import Normaliser
from megavlm.architectures.towers.vq_gan.config import EPSILON, GROUPS, VQGANConfig

_AT_ONCE = 4
"""Pictures: a map of 512 x 512 positions has 128 channels."""


def _norm(channels: int, dtype: torch.dtype) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=EPSILON, dtype=dtype)


class ResidualBlock(nn.Module):
    """Norm, SiLU and a 3 x 3 convolution, twice; a 1 x 1 convolution beside it where the width changes."""

    def __init__(self, before: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = _norm(before, dtype)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1, dtype=dtype)
        self.norm2 = _norm(width, dtype)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, dtype=dtype)
        self.nin_shortcut = nn.Conv2d(before, width, 1, dtype=dtype) if before != width else None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return [N, C, H, W]."""
        y_NCHW = self.conv1(F.silu(self.norm1(x_NCHW)))
        y_NCHW = self.conv2(F.silu(self.norm2(y_NCHW)))
        return (x_NCHW if self.nin_shortcut is None else self.nin_shortcut(x_NCHW)) + y_NCHW


class AttentionBlock(nn.Module):
    """All positions of a map attend to all, with one head."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = _norm(width, dtype)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1, dtype=dtype) for _ in range(4))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return [N, C, H, W]."""
        normed = self.norm(x_NCHW)
        query, key, value = (one(normed).flatten(2).transpose(1, 2).contiguous() for one in (self.q, self.k, self.v))
        seen_NPC = F.scaled_dot_product_attention(query, key, value)
        return x_NCHW + self.proj_out(seen_NPC.transpose(1, 2).unflatten(2, x_NCHW.shape[2:]))


class Halving(nn.Module):
    """A 3 x 3 convolution of every second position, with zeros on the right and below."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, dtype=dtype)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return [N, C, H / 2, W / 2]."""
        halved: Tensor = self.conv(F.pad(x_NCHW, (0, 1, 0, 1)))
        return halved


class Encoder(nn.Module):
    """Pixels to latents."""

    def __init__(self, vision: VQGANConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, vision.base_width, 3, padding=1, dtype=dtype)
        self.down = nn.ModuleList()
        before, last = vision.base_width, len(vision.widths) - 1
        for level, width in enumerate(vision.widths):
            sizes = [before, *[width] * vision.blocks_per_level]
            pairs = itertools.pairwise(sizes)
            parts = nn.ModuleDict({"block": nn.ModuleList(ResidualBlock(one, other, dtype) for one, other in pairs)})
            if level < last:
                parts["downsample"] = Halving(width, dtype)
            self.down.append(parts)
            before = width
        self.mid = nn.ModuleDict(
            {
                "block_1": ResidualBlock(before, before, dtype),
                "attn_1": AttentionBlock(before, dtype),
                "block_2": ResidualBlock(before, before, dtype),
            }
        )
        self.norm_out = _norm(before, dtype)
        self.conv_out = nn.Conv2d(before, vision.latent_width, 3, padding=1, dtype=dtype)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return [N, latent_width, H, W] of the last map."""
        x_NCHW = self.conv_in(pixels_NCHW)
        for level in self.down:
            assert isinstance(level, nn.ModuleDict)
            blocks = level["block"]
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x_NCHW = block(x_NCHW)
            if "downsample" in level:
                x_NCHW = level["downsample"](x_NCHW)
        for part in self.mid.values():
            x_NCHW = part(x_NCHW)
        latents: Tensor = self.conv_out(F.silu(self.norm_out(x_NCHW)))
        return latents


class VQGAN(MegatronModule):
    """Images to codes.

    Args:
        vision: the tower's branch of the recipe.
        context: layout, number type, layer implementation.
    """

    def __init__(self, vision: VQGANConfig, context: BuildContext) -> None:
        config = TransformerConfig(
            num_layers=vision.num_layers,
            hidden_size=vision.hidden_size,
            num_attention_heads=1,
            **context.transformer_settings("vision"),
        )
        super().__init__(config=config)
        self.settings = vision
        self._normalise = Normaliser(vision.image_mean, vision.image_std)
        self.encoder = Encoder(vision, context.dtype)
        self.quant_conv = nn.Conv2d(vision.latent_width, vision.code_width, 1, dtype=context.dtype)
        self._order_K = torch.tensor(vision.code_order, device="cpu") if vision.code_order else None
        self.codebook = nn.Embedding(vision.num_codes, vision.code_width, dtype=context.dtype)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Encode images.

        Args:
            images_NCHW: [N, 3, H, W], uint8 (0..255), or floating point where already normalised.

        Returns:
            [P, N, 1] int64: which tokens of pictures the rows of the codebook are that are nearest (``code_order``).
        """
        codes_PN1 = torch.cat([self._codes(part) for part in images_NCHW.split(_AT_ONCE)], dim=1)
        return codes_PN1 if self._order_K is None else self._order_K.to(codes_PN1.device)[codes_PN1]

    def _codes(self, images_NCHW: Tensor) -> Tensor:
        pixels = self._normalise(images_NCHW, self.quant_conv.weight.dtype)
        latents_NZHW = self.quant_conv(self.encoder(pixels))
        # In fp32: of 8192 distances, bf16 tells few apart.
        latents_NPZ = latents_NZHW.flatten(2).transpose(1, 2).float()
        book_KZ = self.codebook.weight.float()
        # What is the same for all codes of a position is left out of its distances.
        distances_NPK = book_KZ.square().sum(1) - 2 * (latents_NPZ @ book_KZ.T)
        return distances_NPK.argmin(-1).T.unsqueeze(-1).contiguous()


def build(vision: VQGANConfig, context: BuildContext) -> VQGAN:
    """Build the tower (the function that every module of this folder has)."""
    return VQGAN(vision, context)
