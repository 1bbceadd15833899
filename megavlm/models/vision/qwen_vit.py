"""Qwen-VL's vision tower: OpenCLIP's ViT without class token, on Megatron-Core layers (arXiv 2308.12966).

Shape legend: N images, C colours, P patches of an image, W width of the tower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.config.schema import VisionConfig
from megavlm.models.context import BuildContext
from megavlm.models.positions import resize_table
from megavlm.parallel.specs import block_submodules, layer_modules

# OpenAI CLIP's statistics, in units of 1 (pixels / 255).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def transformer_config(vision: VisionConfig, context: BuildContext) -> TransformerConfig:
    """Return the tower's own TransformerConfig: TP like the language model, no PP, no SP."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.layernorm_epsilon,
        activation_func=F.gelu,  # the erf form; Megatron's fused bias-GELU is the tanh form, so it stays off
        bias_activation_fusion=False,
        add_bias_linear=True,
        add_qkv_bias=True,
        init_method_std=vision.init_method_std,
        **(recompute if vision.gradient_checkpointing else {}),
        **context.transformer_settings(),
    )


class QwenVisionTower(MegatronModule):
    """Images to patch features.

    Args:
        vision: the recipe's ``model.vision`` branch.
        context: layout, number type, layer implementation.
    """

    def __init__(self, vision: VisionConfig, context: BuildContext) -> None:
        config = transformer_config(vision, context)
        super().__init__(config=config)
        modules = layer_modules(transformer_engine=context.transformer_engine, causal=False)
        self.grid = vision.image_size // vision.patch_size
        self.conv1 = torch.nn.Conv2d(
            3, vision.hidden_size, vision.patch_size, stride=vision.patch_size, bias=False, dtype=context.dtype
        )
        # Kept at its own size and interpolated in every forward pass: a larger table could not be exported.
        self.positional_embedding = torch.nn.Parameter(
            torch.empty(vision.positional_grid**2, vision.hidden_size, dtype=context.dtype)
        )
        self.ln_pre = modules.norm(config=config, hidden_size=vision.hidden_size, eps=vision.layernorm_epsilon)
        self.transformer = TransformerBlock(
            config=config, spec=block_submodules(modules, vision.num_layers), post_layer_norm=False
        )
        if context.initialize:
            torch.nn.init.normal_(self.positional_embedding, std=vision.init_method_std)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Encode images.

        Args:
            images_NCHW: [N, 3, H, W], uint8 (0..255), or floating point where already normalised.

        Returns:
            [P, N, W] features, in the number type of the weights.
        """
        if images_NCHW.dtype is torch.uint8:
            # Not buffers: Megatron's Float16Module would round them to bf16.
            mean_C11, std_C11 = (torch.tensor(v, device=images_NCHW.device).view(3, 1, 1) for v in (_MEAN, _STD))
            images_NCHW = (images_NCHW.float() / 255.0 - mean_C11) / std_C11
        x_NWhw = self.conv1(images_NCHW.to(self.conv1.weight.dtype))
        x_PNW = x_NWhw.flatten(2).permute(2, 0, 1)
        x_PNW = x_PNW + resize_table(self.positional_embedding, self.grid).unsqueeze(1)
        return self.transformer(hidden_states=self.ln_pre(x_PNW).contiguous(), attention_mask=None)


def build(vision: VisionConfig, context: BuildContext) -> QwenVisionTower:
    """Build the tower (the function that every module of this folder has)."""
    return QwenVisionTower(vision, context)
