"""ConvNeXt (arXiv 2201.03545) in plain convolutions, its blocks' linear layers cut over the tensor-parallel ranks.

Convolutions, norms and layer scale are whole on each of these ranks: what goes into them, and the gradient of what
comes out, is the same on all, and so is their gradient.

Shape legend: N images, P positions of a stage's map, C channels of it, W channels of all stages that are taken.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.architectures.context import BuildContext
from megavlm.architectures.pixels import Normaliser
from megavlm.architectures.towers.convnext.config import EXPANSION, ConvNextConfig
from megavlm.layers.convolution import channel_norm, convolve
from megavlm.layers.linear import column_linear, row_linear

_KERNEL = 7


class ConvNextBlock(MegatronModule):
    """Depthwise 7 x 7, norm, and an MLP of each position; what comes of it is scaled and added.

    Args:
        stage: which stage it is of, counted from 0.
        first: it is the stage's first one: in front of it the map is halved, except in the first stage.
        vision: the tower's branch.
        config: number type, tensor-parallel size and initial weights.
    """

    def __init__(self, stage: int, vision: ConvNextConfig, config: TransformerConfig, *, first: bool) -> None:
        super().__init__(config=config)
        width, dtype = vision.widths[stage], config.params_dtype
        self.downsample: Any = None
        if first and stage:
            before = vision.widths[stage - 1]
            parts = {
                "norm": channel_norm(before, config, vision.layernorm_epsilon),
                "conv": nn.Conv2d(before, width, 2, stride=2, dtype=dtype),
            }
            self.downsample = nn.ModuleDict(parts)
        self.depthwise = nn.Conv2d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width, dtype=dtype)
        self.norm = channel_norm(width, config, vision.layernorm_epsilon)
        init = config.init_method
        self.linear_fc1 = column_linear(width, EXPANSION * width, config=config, init_method=init)
        self.linear_fc2 = row_linear(EXPANSION * width, width, config=config, init_method=init)
        self.scale = nn.Parameter(torch.full((width,), vision.layer_scale_init, dtype=dtype))

    def forward(self, x_NPC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return [N, P, C] of a map of ``grid`` in front of the halving, if there is one."""
        if self.downsample is not None:
            x_NPC = convolve(self.downsample["conv"], self.downsample["norm"](x_NPC), grid)
            grid = grid[0] // 2, grid[1] // 2
        y_NPC = self.norm(convolve(self.depthwise, x_NPC, grid))
        return x_NPC + self.scale * self.linear_fc2(F.gelu(self.linear_fc1(y_NPC)[0]))[0]


class ConvNext(MegatronModule):
    """Images to features of positions.

    Args:
        vision: the tower's branch of the recipe.
        context: layout, number type, layer implementation.
    """

    def __init__(self, vision: ConvNextConfig, context: BuildContext) -> None:
        config = context.headless_config(
            "vision", vision.hidden_size, vision.init_method_std, num_layers=vision.num_layers
        )
        super().__init__(config=config)
        self.settings = vision
        self._normalise = Normaliser(vision.image_mean, vision.image_std)
        width = vision.widths[0]
        self.conv1 = nn.Conv2d(3, width, vision.patch_size, stride=vision.patch_size, dtype=context.dtype)
        self.ln_pre = channel_norm(width, config, vision.layernorm_epsilon)
        self._stages = [stage for stage, depth in enumerate(vision.depths) for _ in range(depth)]
        self.layers = nn.ModuleList(
            ConvNextBlock(stage, vision, config, first=number == 0 or self._stages[number - 1] != stage)
            for number, stage in enumerate(self._stages)
        )

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Encode images.

        Args:
            images_NCHW: [N, 3, H, W], uint8 (0..255), or floating point where already normalised.

        Returns:
            [P, N, W] features, in the number type of the weights: of the first stage that is taken the map, and behind
            its channels those of the others, stretched to it.
        """
        vision = self.settings
        pixels = self._normalise(images_NCHW, self.conv1.weight.dtype)
        side = vision.side_of(0)
        x_NPC = self.ln_pre(self.conv1(pixels).flatten(2).transpose(1, 2))
        taken = []
        for number, (block, stage) in enumerate(zip(self.layers, self._stages, strict=True)):
            halved = block.downsample is not None
            x_NPC = self._block(block, number, x_NPC, (side, side))
            side = side // 2 if halved else side
            if stage in vision.stages and (number + 1 == len(self._stages) or self._stages[number + 1] != stage):
                taken.append(self._stretched(x_NPC, side))
        features_NPW = taken[0] if len(taken) == 1 else torch.cat(taken, dim=-1)
        return features_NPW.transpose(0, 1).contiguous()

    def _block(self, block: nn.Module, number: int, x_NPC: Tensor, grid: tuple[int, int]) -> Tensor:
        def run(x: Tensor) -> Tensor:
            with get_fp8_context(self.config, number):  # nothing in bf16
                result: Tensor = block(x, grid)
            return result

        if self.settings.gradient_checkpointing and self.training and torch.is_grad_enabled():
            result: Tensor = tensor_parallel.checkpoint(run, False, x_NPC)
            return result
        return run(x_NPC)

    def _stretched(self, x_NPC: Tensor, side: int) -> Tensor:
        """Return a map at the size of the features': bilinear, in fp32."""
        wanted = self.settings.grid
        if (side, side) == wanted:
            return x_NPC

        def stretch(x_NCHW: Tensor) -> Tensor:
            return F.interpolate(x_NCHW.float(), size=wanted, mode="bilinear", align_corners=False).to(x_NCHW.dtype)

        return convolve(stretch, x_NPC, (side, side))


def build(vision: ConvNextConfig, context: BuildContext) -> ConvNext:
    """Build the tower (the function that every module of this folder has)."""
    return ConvNext(vision, context)
