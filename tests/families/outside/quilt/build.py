"""The modules.

Shape legend: N images, P patches of an image, W width of the tower, Q tokens of an image, E width of the decoder.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.architectures.context import BuildContext
from megavlm.architectures.decoders.decoder.build import build
from megavlm.config.schema import ModelConfig
from megavlm.layers.linear import column_linear
from quilt.config import PatchworkConfig, ScaledDecoderConfig


def _config(width: int, context: BuildContext, part: Any) -> TransformerConfig:
    heads = context.parallel.tensor_model_parallel_size  # there are none: any number will do
    return TransformerConfig(
        num_layers=1, hidden_size=width, num_attention_heads=heads, **context.transformer_settings(part)
    )


class Patchwork(MegatronModule):
    """[N, 3, H, W] pictures to [P, N, W]."""

    def __init__(self, vision: PatchworkConfig, context: BuildContext) -> None:
        config = _config(vision.hidden_size, context, "vision")
        super().__init__(config=config)
        self.settings = vision
        sizes = [3 * vision.patch_size**2] + [vision.hidden_size] * vision.num_layers
        self.position = nn.Parameter(torch.empty(vision.patches_per_image, vision.hidden_size, dtype=context.dtype))
        if context.initialize:
            nn.init.normal_(self.position, std=0.02)
        self.layers = nn.ModuleList(
            column_linear(size, vision.hidden_size, config=config, init_method=config.init_method, gather_output=True)
            for size in sizes
        )

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return one feature per patch."""
        if images_NCHW.dtype is torch.uint8:
            mean, std = (torch.tensor(x, device=images_NCHW.device).view(3, 1, 1) for x in self._moments())
            images_NCHW = (images_NCHW.float() / 255 - mean) / std
        side = self.settings.patch_size
        patches_NDP = F.unfold(images_NCHW.to(self.position.dtype), side, stride=side)
        x_PNW = self.layers[0](patches_NDP.permute(2, 0, 1).contiguous())[0] + self.position.unsqueeze(1)
        for layer in self.layers[1:]:
            x_PNW = x_PNW + layer(F.gelu(x_PNW))[0]
        return x_PNW

    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.settings.image_mean, self.settings.image_std


class Pool(MegatronModule):
    """[P, N, W] features to [Q, N, E] tokens."""

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        config = _config(model.language.hidden_size, context, "connector")
        super().__init__(config=config)
        self.grid, self.side = model.vision.grid, model.connector.side
        self.project = column_linear(
            model.vision.hidden_size, model.language.hidden_size, config=config, init_method=config.init_method,
            gather_output=True,
        )  # fmt: skip

    def forward(self, features_PNW: Tensor) -> Tensor:
        """Return the projected means of squares."""
        rows, columns = (n // self.side for n in self.grid)
        squares = features_PNW.unflatten(0, (rows, self.side, columns, self.side))
        output: Tensor = self.project(squares.mean((1, 3)).flatten(0, 1))[0]
        return output


class Gain(nn.Module):
    """A factor for each channel of an MLP's output."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
        # Each rank sees a part of the sequence then, and gradients are summed over them.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, _mlp: Any, _inputs: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Return the MLP's output, scaled (the hook that it has)."""
        return output[0] * self.weight, output[1]


def tower(vision: PatchworkConfig, context: BuildContext) -> Patchwork:
    """Build the tower."""
    return Patchwork(vision, context)


def connector(model: ModelConfig, context: BuildContext) -> Pool:
    """Build the connector."""
    return Pool(model, context)


def decoder(language: ScaledDecoderConfig, context: BuildContext, **stage: Any) -> Any:
    """Build a chunk of the language model: megavlm's decoder, with gains, and scaled logits."""
    model = build(language, context, **stage)
    for layer in model.decoder.layers:
        layer.mlp.gain = Gain(model.config)
        layer.mlp.register_forward_hook(layer.mlp.gain)
    if stage.get("post_process", True):
        model.output_layer.register_forward_hook(
            lambda _layer, _inputs, output: (output[0] / language.logits_scaling, output[1])
        )
    return model
