"""Vision transformers on pictures of any size: Qwen2-VL's tower (arXiv 2409.12191), Qwen2.5-VL's (2502.13923), others.

Shape legend: V pictures, P patches of all of them, F numbers of a patch, W width of the tower, D width of a head,
T = P and a class token for each frame where there are these, else P; 1 stands for the batch dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.activations import quick_gelu
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.architectures.context import BuildContext
from megavlm.architectures.towers.packed_vit import geometry
from megavlm.architectures.towers.packed_vit.config import PackedViTConfig
from megavlm.layers import rotary  # noqa: F401 - has Megatron-Core take one angle per position of a pack
from megavlm.layers.activation import BiasActivationMLP, gelu_tanh
from megavlm.layers.segments import packed_segments, to_device
from megavlm.layers.specs import LayerKind, block_submodules, layer_modules

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


def transformer_config(vision: PackedViTConfig, context: BuildContext) -> TransformerConfig:
    """Return the tower's own TransformerConfig: TP like the language model, no PP, no SP."""
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        normalization=vision.normalization,
        layernorm_epsilon=vision.layernorm_epsilon,
        activation_func=_ACTIVATIONS[vision.activation],
        gated_linear_unit=vision.gated_mlp,
        bias_activation_fusion=False,  # Megatron's GELU is the tanh form, whatever is asked for
        add_bias_linear=vision.add_bias_linear,
        add_qkv_bias=vision.add_qkv_bias,
        init_method_std=vision.init_method_std,
        **context.transformer_settings("vision"),
    )


class PatchEmbedding(nn.Module):
    """Flat patches [P, F] to [P, W]: a convolution that meets each patch once, with a convolution's weight."""

    def __init__(self, vision: PackedViTConfig, dtype: torch.dtype, *, initialize: bool) -> None:
        super().__init__()
        side, frames = vision.patch_size, vision.temporal_patch_size
        shape = (vision.hidden_size, 3, *((frames,) if frames > 1 else ()), side, side)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(vision.hidden_size, dtype=dtype)) if vision.conv_bias else None
        if initialize:
            nn.init.normal_(self.weight, std=vision.init_method_std)

    def forward(self, patches_PF: Tensor) -> Tensor:
        """Return [P, W]."""
        return F.linear(patches_PF, self.weight.flatten(1), self.bias)


class _Places(NamedTuple):
    """What the layers are told of where patches lie."""

    whole: PackedSeqParams
    windows: PackedSeqParams | None
    angles: Tensor | None
    """[T, 1, 1, D] fp32 rotary angles."""
    order: Tensor | None
    """[blocks] in the order of the windows; None where they stay in their own."""
    back: Tensor | None
    """Its inverse."""
    class_rows: Tensor | None
    """[T] rows of the class tokens (the first ones) and patches, one after the other, in their order."""


class PackedVisionTransformer(MegatronModule):
    """Patches of pictures of any size to features, one for each patch.

    Args:
        vision: the recipe's ``model.vision`` branch.
        context: layout, number type, layer implementation.
    """

    def __init__(self, vision: PackedViTConfig, context: BuildContext) -> None:
        config = transformer_config(vision, context)
        super().__init__(config=config)
        kind = LayerKind("full", head_dim=vision.hidden_size // vision.num_attention_heads)
        modules = layer_modules(kind, transformer_engine=context.transformer_engine)
        width, dtype = vision.hidden_size, context.dtype

        def norm() -> nn.Module:
            return modules.norm(config=config, hidden_size=width, eps=vision.layernorm_epsilon)

        self.settings = vision
        self._group = mpu.get_tensor_model_parallel_group()  # that of now: a part may be built as on one rank
        self._made: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self.patch_embed = PatchEmbedding(vision, dtype, initialize=context.initialize)
        self.positional_embedding: Any = None
        if vision.positional_grid is not None:
            self.positional_embedding = nn.Parameter(torch.empty(vision.positional_grid**2, width, dtype=dtype))
        self.class_embedding: Any = None
        self.class_rotary: Any = None
        if vision.class_token:
            self.class_embedding = nn.Parameter(torch.empty(width, dtype=dtype))
            self.class_rotary = nn.Parameter(torch.empty(kind.head_dim // 2, dtype=dtype))
        self.ln_pre = norm() if vision.pre_layernorm else None
        self.transformer = TransformerBlock(
            config=config, spec=block_submodules([modules] * vision.num_layers), post_layer_norm=False
        )
        for layer in self.transformer.layers:
            BiasActivationMLP.take_over(layer.mlp)
        self.ln_post = norm() if vision.post_layernorm else None
        if context.initialize:
            for parameter in (self.positional_embedding, self.class_embedding, self.class_rotary):
                if parameter is not None:
                    nn.init.normal_(parameter, std=vision.init_method_std)

    def empty(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the pixels and the grid of a picture of one block, for micro-batches without pictures."""
        side = self.settings.spatial_merge_size
        pixels = torch.zeros(side**2, self.settings.patch_values, dtype=torch.uint8, device=device)
        return pixels, torch.tensor([[1, side, side]])

    def forward(self, patches_PF: Tensor, grid_V3: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            patches_PF: [P, F], uint8 (0..255), or floating point where already normalised; block by block.
            grid_V3: [V, 3] int64 on the host: frames, rows and columns of patches of each picture.

        Returns:
            [P, 1, W] features in the order of the patches, in the number type of the weights; with R
            ``deepstack_layers`` [P, 1, (1 + R) * W], those of the last layer and of these side by side.

        Raises:
            ValueError: the grid is not that of the patches.
        """
        vision = self.settings
        shown = geometry.pictures(grid_V3.numpy(), vision.spatial_merge_size)
        if (total := sum(geometry.frame_lengths(shown))) != patches_PF.size(0):
            raise ValueError(f"{patches_PF.size(0)} patches, but pictures of {total}")
        places = self._places(shown, patches_PF.device)
        x_TW = self.patch_embed(self._normalise(patches_PF))
        if places.class_rows is not None:
            frames = places.whole.cu_seqlens_q.numel() - 1
            x_TW = torch.cat([self.class_embedding.expand(frames, -1), x_TW])[places.class_rows]
        if self.ln_pre is not None:
            x_TW = self.ln_pre(x_TW)
        if self.positional_embedding is not None:
            x_TW = x_TW + self._interpolated(shown)
        taken = self._layers(self._moved(x_TW, places.order).unsqueeze(1), places)
        x_TW = self._moved(torch.cat(taken, dim=-1).squeeze(1) if len(taken) > 1 else taken[0].squeeze(1), places.back)
        if places.class_rows is not None:
            x_TW = x_TW[places.class_rows.argsort()[places.whole.cu_seqlens_q.numel() - 1 :]]
        x_P1W = x_TW.unsqueeze(1)
        return x_P1W if self.ln_post is None else self.ln_post(x_P1W)

    def _layers(self, x_T1W: Tensor, places: _Places) -> list[Tensor]:
        """Run the layers, each on whole pictures or on windows; return the last one's output, and those of levels."""
        taken: dict[int, Tensor] = {}
        recompute = self.settings.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for number, layer in enumerate(self.transformer.layers):
            windowed = places.windows is not None and number not in self.settings.full_attention_layers
            packed = places.windows if windowed else places.whole

            def run(
                x: Tensor, angles: Tensor | None, layer: Any = layer, number: int = number, packed: Any = packed
            ) -> Tensor:
                with get_fp8_context(self.config, number):  # nothing in bf16
                    return layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=packed)[
                        0
                    ]

            if recompute:
                x_T1W = tensor_parallel.checkpoint(run, False, x_T1W, places.angles)
            else:
                x_T1W = run(x_T1W, places.angles)
            if number in self.settings.deepstack_layers:
                taken[number] = x_T1W
        return [x_T1W, *(taken[number] for number in self.settings.deepstack_layers)]

    def _places(self, shown: list[geometry.Picture], device: torch.device) -> _Places:
        vision = self.settings
        lengths = geometry.frame_lengths(shown)
        place_P2 = geometry.coordinates(shown, vision.spatial_merge_size)
        windows, order, back, class_rows = None, None, None, None
        if vision.window is not None:
            found = geometry.windows(shown, vision.spatial_merge_size, vision.window)
            order, back = (to_device(torch.from_numpy(one), device) for one in (found.order, np.argsort(found.order)))
            block = vision.spatial_merge_size**2
            place_P2 = place_P2.reshape(-1, block, 2)[found.order].reshape(-1, 2)
            windows = _segments(found.lengths, device)
        angles_PD = None
        if vision.rotary_base is not None:
            angles_PD = self._angles(to_device(torch.from_numpy(np.ascontiguousarray(place_P2)), device))
        if vision.class_token:
            assert angles_PD is not None
            frames, firsts = len(lengths), np.cumsum([0, *lengths[:-1]])
            rows = np.insert(np.arange(sum(lengths)) + frames, firsts, np.arange(frames))
            class_rows = to_device(torch.from_numpy(rows), device)
            # Each rank turns its own heads, so each has a part of the gradient.
            own_D = copy_to_tensor_model_parallel_region(self.class_rotary, self._group).float().repeat(2)
            angles_PD = torch.cat([own_D.expand(frames, -1), angles_PD])[class_rows]
            lengths = [length + 1 for length in lengths]
        angles_T11D = None if angles_PD is None else angles_PD[:, None, None, :]
        return _Places(_segments(lengths, device), windows, angles_T11D, order, back, class_rows)

    def _moved(self, x_TW: Tensor, order: Tensor | None) -> Tensor:
        """Return patches with their blocks in another order."""
        if order is None:
            return x_TW
        return x_TW.unflatten(0, (-1, self.settings.spatial_merge_size**2))[order].flatten(0, 1)

    def _angles(self, place_P2: Tensor) -> Tensor:
        """[P, D] fp32 rotary angles: row and column have half of each half of a head."""
        _, _, inverse = self._constants(place_P2.device)
        turned = place_P2[:, :, None].float() * inverse
        return turned.flatten(1).repeat(1, 2)

    def _interpolated(self, shown: list[geometry.Picture]) -> Tensor:
        """[P, W] of the learned table, one row of it after the other: all at once would take K times the memory."""
        vision, table = self.settings, self.positional_embedding
        if vision.positional_interpolation == "bicubic_antialias":
            return self._resized(shown)
        found = geometry.taps(
            shown, vision.spatial_merge_size, vision.positional_grid or 0, vision.positional_interpolation
        )
        index_KP, weight_KP1 = (
            to_device(torch.from_numpy(np.ascontiguousarray(one.T)), table.device)
            for one in (found.index, found.weight)
        )
        total: Tensor | None = None
        for index, weight in zip(index_KP, weight_KP1, strict=True):
            part = table.float()[index] * weight[:, None]
            total = part if total is None else total + part
        assert total is not None
        return total.to(table.dtype)

    def _resized(self, shown: list[geometry.Picture]) -> Tensor:
        """[P, W] of the learned table, resized for each size of a picture: rows first, and then columns."""
        vision, table = self.settings, self.positional_embedding
        side, m = vision.positional_grid or 0, vision.spatial_merge_size
        table_GGW = table.float().unflatten(0, (side, side))
        made: dict[tuple[int, int], Tensor] = {}
        for picture in shown:
            _, rows, columns = picture
            if (rows, columns) in made:
                continue
            down_hG, across_wG = (
                to_device(torch.from_numpy(geometry.antialiased(length, side)), table.device)
                for length in (rows, columns)
            )
            resized_hGW = (down_hG @ table_GGW.flatten(1)).unflatten(1, (side, -1))
            resized_PW = torch.matmul(across_wG, resized_hGW).flatten(0, 1).to(table.dtype)
            if m > 1:
                resized_PW = resized_PW[to_device(torch.from_numpy(geometry.reading_order(picture, m)), table.device)]
            made[rows, columns] = resized_PW
        return torch.cat([made[rows, columns] for frames, rows, columns in shown for _ in range(frames)])

    def _normalise(self, patches_PF: Tensor) -> Tensor:
        """Return the patches in the number type of the weights, normalised where they are uint8."""
        if patches_PF.dtype is torch.uint8:
            mean_C1, std_C1, _ = self._constants(patches_PF.device)
            pixels_PCX = patches_PF.unflatten(1, (3, -1)).float() / 255.0
            patches_PF = ((pixels_PCX - mean_C1) / std_C1).flatten(1)
        return patches_PF.to(self.patch_embed.weight.dtype)

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation [3, 1] and inverse frequencies [D / 4] in fp32, made once for each device.

        Not buffers: Megatron's Float16Module would round them to bf16.
        """
        if device not in self._made:
            vision = self.settings
            mean_C1, std_C1 = (
                torch.tensor(value).view(3, 1).to(device) for value in (vision.image_mean, vision.image_std)
            )
            half = vision.hidden_size // vision.num_attention_heads // 2
            at = torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half
            inverse = 1.0 / ((vision.rotary_base or 1.0) ** at)
            self._made[device] = mean_C1, std_C1, inverse.to(device)
        return self._made[device]


def _segments(lengths: list[int], device: torch.device) -> PackedSeqParams:
    return packed_segments(np.cumsum([0, *lengths], dtype=np.int64).astype(np.int32), device)


def build(vision: PackedViTConfig, context: BuildContext) -> PackedVisionTransformer:
    """Build the tower (the function that every module of this folder has)."""
    return PackedVisionTransformer(vision, context)
