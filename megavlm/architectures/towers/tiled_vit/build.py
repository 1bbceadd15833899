"""Llama 3.2 Vision's tower (arXiv 2407.21783, section 7; Transformers' ``MllamaVisionModel``).

All tiles of a picture, those that it does not fill too, are one sequence of ``max_num_tiles`` times a tile's positions.
What holds a picture attends to all of it, to padding too; padding attends to what holds a picture. (So the published
masks have it: they shut out padding from padding alone.) Here what holds a picture stands in front of its padding, so
that this asks for no mask.

Shape legend: V pictures, P patches of all of them, F numbers of a patch, T tiles of a picture with those that are
padding, L positions of a tile with padding, Q features of a tile, R features of all pictures, W width of the tower, K
layers whose outputs are taken in between; 1 stands for the batch dimension.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.architectures.context import BuildContext
from megavlm.architectures.towers.tiled_vit.config import TiledViTConfig
from megavlm.layers.activation import BiasActivationMLP
from megavlm.layers.attention import TorchAttention
from megavlm.layers.cross import attend
from megavlm.layers.scale import GatedSum
from megavlm.layers.segments import packed_segments, segment_lengths, to_device
from megavlm.layers.specs import LayerKind, block_submodules, layer_modules

_OUTER_EPSILON = 1e-5
"""Of the norms in front of and behind the layers, whatever ``norm_eps`` says."""


class _PlainColumn(ColumnParallelLinear):
    """Without a bias, which the MLP's layers have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": False})


class _PlainRow(RowParallelLinear):
    """Without a bias, which the MLP's layers have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": False})


class TilesAttention(TorchAttention):
    """Attention of pictures, in each of which ``shown`` positions in front hold it and the others are padding."""

    def _packed(
        self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, causal: bool, packed: PackedSeqParams
    ) -> Tensor:
        assert not causal
        told: Any = packed
        lengths, shown = segment_lengths(packed), told.shown
        if self.takes_kernel(query_TND):
            rows, cuts_q, cuts_k, longest, most = told.calls
            return self.kernel(
                query_TND, key_TGD[rows], value_TGD[rows], cuts_q, cuts_k, longest, most, (-1, -1)
            )  # not run on a GPU
        parts = []
        for query, key, value, count in zip(
            query_TND.split(lengths), key_TGD.split(lengths), value_TGD.split(lengths), shown, strict=True
        ):
            parts.append(attend(query[:count], key, value, self.softmax_scale))
            parts.append(attend(query[count:], key[:count], value[:count], self.softmax_scale))
        return torch.cat(parts)


class _TilePlaces(NamedTuple):
    """Where the positions of some pictures lie."""

    ratios: Tensor
    """[V] row of each picture in the learned tables."""
    patches: Tensor
    """[P] where each patch goes among [V * T * (Q - 1)]."""
    order: Tensor
    """[V * T * L]: those that hold a picture in front, picture by picture."""
    shown: Tensor
    """[R] of these, those that hold one."""
    packed: PackedSeqParams


def _config(vision: TiledViTConfig, context: BuildContext, layers: int) -> TransformerConfig:
    """Return the TransformerConfig of a block: TP like the language model, no PP, no SP."""
    return TransformerConfig(
        num_layers=layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.layernorm_epsilon,
        activation_func=F.gelu,
        bias_activation_fusion=False,  # Megatron's GELU is the tanh form, whatever is asked for
        init_method_std=vision.init_method_std,
        **context.transformer_settings("vision"),
    )


def _block(vision: TiledViTConfig, context: BuildContext, layers: int) -> TransformerBlock:
    kind = LayerKind("full", head_dim=vision.hidden_size // vision.num_attention_heads)
    linears = {"linear_qkv": _PlainColumn, "linear_proj": _PlainRow}
    modules = layer_modules(kind, transformer_engine=context.transformer_engine, linears=linears)
    modules.layer.submodules.self_attention.submodules.core_attention = TilesAttention
    block = TransformerBlock(
        config=_config(vision, context, layers), spec=block_submodules([modules] * layers), post_layer_norm=False
    )
    for layer in block.layers:
        BiasActivationMLP.take_over(layer.mlp)
    return block


class _TilePatches(nn.Module):
    """Flat patches [P, F] to [P, W], with a convolution's weight."""

    def __init__(self, vision: TiledViTConfig, dtype: torch.dtype) -> None:
        super().__init__()
        side = vision.patch_size
        self.weight = nn.Parameter(torch.empty(vision.hidden_size, 3, side, side, dtype=dtype))

    def forward(self, patches_PF: Tensor) -> Tensor:
        """Return [P, W]."""
        return F.linear(patches_PF, self.weight.flatten(1))


class TiledVisionTransformer(MegatronModule):
    """Pictures of whole tiles to features, a class token's and one for each patch of each tile.

    Args:
        vision: the recipe's ``model.vision`` branch.
        context: layout, number type, layer implementation.
    """

    def __init__(self, vision: TiledViTConfig, context: BuildContext) -> None:
        config = _config(vision, context, vision.num_layers)
        super().__init__(config=config)
        self.settings = vision
        self._made: dict[torch.device, tuple[Tensor, Tensor]] = {}
        width, tiles, rows = vision.hidden_size, vision.max_num_tiles, len(vision.ratios) + 1

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=context.dtype))

        def gate() -> nn.Parameter:
            return nn.Parameter(torch.zeros(1, dtype=context.dtype))

        self.patch_embed = _TilePatches(vision, context.dtype)
        self.class_embedding = table(width)
        self.positional_embedding = table(vision.tile_features, width)
        self.positional_gate = gate()
        self.tile_positions = table(rows, tiles * vision.tile_features * width)
        self.pre_tile, self.pre_tile_gate = table(rows, tiles * width), gate()
        self.post_tile, self.post_tile_gate = table(rows, tiles * width), gate()
        norm = layer_modules(LayerKind("full"), transformer_engine=context.transformer_engine).norm
        self.ln_pre = norm(config=config, hidden_size=width, eps=_OUTER_EPSILON)
        self.transformer = _block(vision, context, vision.num_layers)
        self.ln_post = norm(config=config, hidden_size=width, eps=_OUTER_EPSILON)
        self.global_transformer = _block(vision, context, vision.num_global_layers)
        for layer in self.global_transformer.layers:
            layer.self_attn_bda = GatedSum(layer.config, math.pi / 4)
            layer.mlp_bda = GatedSum(layer.config, math.pi / 4)
        if context.initialize:
            for parameter in (self.class_embedding, self.positional_embedding):
                nn.init.normal_(parameter, std=width**-0.5)
            for parameter in (self.patch_embed.weight, self.tile_positions, self.pre_tile, self.post_tile):
                nn.init.normal_(parameter, std=vision.init_method_std)

    def empty(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the pixels and the grid of a picture of one tile, for micro-batches without pictures."""
        vision, side = self.settings, self.settings.patches_per_side
        pixels = torch.zeros(side**2, vision.patch_values, dtype=torch.uint8, device=device)
        return pixels, torch.tensor([[1, side, side]])

    def forward(self, patches_PF: Tensor, grid_V3: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            patches_PF: [P, F], uint8 (0..255), or floating point where already normalised; row by row of a picture.
            grid_V3: [V, 3] int64 on the host: 1, rows and columns of patches of each picture: whole tiles.

        Returns:
            [R, 1, (1 + K) * W] features of each picture's tiles: behind the gated layers, and beside them of
            each channel those of the layers in between.

        Raises:
            ValueError: the grid is not that of the patches, or of no known proportions.
        """
        vision = self.settings
        places = self._places(grid_V3, patches_PF)
        pictures, tiles, width = len(grid_V3), vision.max_num_tiles, vision.hidden_size
        x_PW = self.patch_embed(self._normalise(patches_PF))
        x_XW = x_PW.new_zeros(pictures * tiles * (vision.tile_features - 1), width).index_copy(0, places.patches, x_PW)
        x_VTPW = x_XW.view(pictures, tiles, -1, width)
        x_VTPW = x_VTPW + self._of_tiles(self.pre_tile, self.pre_tile_gate, places.ratios)
        x_VTQW = torch.cat([self.class_embedding.expand(pictures, tiles, 1, width), x_VTPW], dim=2)
        gate = self.positional_gate.tanh()
        x_VTQW = x_VTQW + (1 - gate) * self.positional_embedding
        x_VTQW = x_VTQW + gate * self.tile_positions[places.ratios].view(x_VTQW.shape)
        x_VTLW = F.pad(self.ln_pre(x_VTQW), (0, 0, 0, vision.padded_features - vision.tile_features))
        x, taken = self._layers(self.transformer, x_VTLW.flatten(0, 2)[places.order].unsqueeze(1), places)
        x = self.ln_post(x)
        post_VTLW = self._of_tiles(self.post_tile, self.post_tile_gate, places.ratios).expand(x_VTLW.shape)
        x = x + post_VTLW.flatten(0, 2)[places.order].unsqueeze(1)
        x, _ = self._layers(self.global_transformer, x, places)
        between = [torch.stack([one[places.shown] for one in taken], dim=-1).flatten(-2)] if taken else []
        return torch.cat([x[places.shown], *between], dim=-1)

    def _of_tiles(self, table: Tensor, gate: Tensor, ratios_V: Tensor) -> Tensor:
        """Return [V, T, 1, W] of a learned table."""
        vision = self.settings
        return table[ratios_V].view(-1, vision.max_num_tiles, 1, vision.hidden_size) * gate.tanh()

    def _layers(self, block: TransformerBlock, x: Tensor, places: _TilePlaces) -> tuple[Tensor, list[Tensor]]:
        """Run the layers; return the last one's output, and of the tower's first ones those in between."""
        vision, taken = self.settings, dict[int, Tensor]()
        recompute = vision.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for number, layer in enumerate(block.layers):

            def run(x: Tensor, layer: Any = layer) -> Tensor:
                found: Tensor = layer(hidden_states=x, attention_mask=None, packed_seq_params=places.packed)[0]
                return found

            x = tensor_parallel.checkpoint(run, False, x) if recompute else run(x)
            if block is self.transformer and number in vision.intermediate_layers:
                taken[number] = x
        between = vision.intermediate_layers if block is self.transformer else ()
        return x, [taken[number] for number in between]

    def _places(self, grid_V3: Tensor, patches_PF: Tensor) -> _TilePlaces:
        vision, device = self.settings, patches_PF.device
        side, tiles, inside = vision.patches_per_side, vision.max_num_tiles, vision.patches_per_side**2
        length, features = vision.padded_features, vision.tile_features
        ratios, patches, order, shown = [], [], [], []
        for number, grid in enumerate(grid_V3.tolist()):
            frames, high, wide = grid
            ratio = vision.tiles_of(grid)
            if frames != 1 or high % side or wide % side or ratio not in vision.ratios:
                raise ValueError(
                    f"a picture of {high} x {wide} patches is of no known number of tiles of {side} x {side}"
                )
            ratios.append(vision.ratios.index(ratio) + 1)
            place = np.arange(math.prod(ratio) * inside).reshape(ratio[0], ratio[1], side, side)
            patches.append(number * tiles * inside + place.transpose(0, 2, 1, 3).ravel())
            position = np.arange(tiles * length).reshape(tiles, length)
            holds = (position // length < math.prod(ratio)) & (position % length < features)
            order.append(number * tiles * length + np.concatenate([position[holds], position[~holds]]))
            shown.append(int(holds.sum()))
        if (total := sum(map(len, patches))) != patches_PF.size(0):
            raise ValueError(f"{patches_PF.size(0)} patches, but pictures of {total}")
        each = tiles * length
        borders = np.arange(len(shown) + 1, dtype=np.int32) * each
        packed: Any = packed_segments(borders, device)
        packed.shown = shown
        starts = np.arange(len(shown)) * each

        def on_device(values: Any, kind: Any = np.int64) -> Tensor:
            return to_device(torch.from_numpy(np.ascontiguousarray(values, kind)), device)

        if device.type == "cuda":  # of one call for all: pictures, and their padding
            keys = [row for start, count in zip(starts, shown, strict=True) for row in (
                np.arange(start, start + each), np.arange(start, start + count))]  # fmt: skip
            queries = [part for count in shown for part in (count, each - count)]
            packed.calls = (
                on_device(np.concatenate(keys)), on_device(np.cumsum([0, *queries]), np.int32),
                on_device(np.cumsum([0, *map(len, keys)]), np.int32), max(queries), each,
            )  # fmt: skip
        held = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, shown, strict=True)])
        return _TilePlaces(
            on_device(ratios),
            on_device(np.concatenate(patches)),
            on_device(np.concatenate(order)),
            on_device(held),
            packed,
        )

    def _normalise(self, patches_PF: Tensor) -> Tensor:
        """Return the patches in the number type of the weights, normalised where they are uint8."""
        if patches_PF.dtype is torch.uint8:
            mean_C1, std_C1 = self._constants(patches_PF.device)
            pixels_PCX = patches_PF.unflatten(1, (3, -1)).float() / 255.0
            patches_PF = ((pixels_PCX - mean_C1) / std_C1).flatten(1)
        return patches_PF.to(self.patch_embed.weight.dtype)

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation [3, 1] in fp32, made once for each device: Float16Module would round buffers to bf16."""
        if device not in self._made:
            vision = self.settings
            mean_C1, std_C1 = (
                torch.tensor(value).view(3, 1).to(device) for value in (vision.image_mean, vision.image_std)
            )
            self._made[device] = mean_C1, std_C1
        return self._made[device]


def build(vision: TiledViTConfig, context: BuildContext) -> TiledVisionTransformer:
    """Build the tower (the function that every module of this folder has)."""
    return TiledVisionTransformer(vision, context)
