"""Compare towers for pictures of any size with Transformers' of the same weights, at any tensor-parallel size.

RICE (LLaVA-OneVision-1.5) is in no Transformers: :class:`Rice` is written from its published definition
(EvolvingLMMs-Lab/LLaVA-OneVision-1.5, ``modeling_rice``: a class token with a rotary row of its own for each picture).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from samples import recipe
from torch import Tensor, nn
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionConfig, Glm4vVisionModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionConfig, Qwen3VLVisionModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionConfig, Siglip2VisionModel
from transformers_cases import close, fill, gradients_of, load, qkv, same_gradients

from megavlm.config.architecture import CONNECTORS, VISION
from megavlm.config.schema import ModelConfig, Recipe
from megavlm.models.build import build_context

PATCH, WIDTH, HEADS, LAYERS, FFN, EMBED = 4, 48, 4, 3, 64, 40
GRID = torch.tensor([[1, 4, 6], [1, 2, 2], [2, 6, 4], [1, 10, 14], [1, 8, 8]])
"""Frames, rows and columns of pictures; windows are 6 patches wide, which divide some of these sides."""


@dataclass(frozen=True)
class PackedTower:
    """Transformers' classes and what they are told; our preset and what it is told."""

    config: Any
    model: Any
    theirs: dict[str, Any]
    ours: dict[str, Any]
    connector: dict[str, Any] | None = None


_SIGLIP2 = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "patch_size": PATCH}
_SIZES = {"depth": LAYERS, "num_heads": HEADS, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
PACKED = {
    "qwen2-vl": PackedTower(
        Qwen2VLVisionConfig,
        Qwen2VisionTransformerPretrainedModel,
        {"embed_dim": WIDTH, "hidden_size": EMBED, "mlp_ratio": 2},
        {"preset": "qwen2_vl_vit", "ffn_hidden_size": 2 * WIDTH},
        {"preset": "patch_merger"},
    ),
    "qwen2.5-vl": PackedTower(
        Qwen2_5_VLVisionConfig,
        Qwen2_5_VisionTransformerPretrainedModel,
        {
            "hidden_size": WIDTH, "out_hidden_size": EMBED, "intermediate_size": FFN, "window_size": 6 * PATCH,
            "fullatt_block_indexes": [1],
        },
        {"preset": "qwen2_5_vl_vit", "ffn_hidden_size": FFN, "window_size": 6 * PATCH, "full_attention_layers": [1]},
        {"preset": "patch_merger", "normalization": "RMSNorm"},
    ),
    "qwen3-vl": PackedTower(
        Qwen3VLVisionConfig,
        Qwen3VLVisionModel,
        {
            "hidden_size": WIDTH, "out_hidden_size": EMBED, "intermediate_size": FFN, "num_position_embeddings": 49,
            "deepstack_visual_indexes": [],
        },
        {
            "preset": "qwen2_vl_vit", "ffn_hidden_size": FFN, "activation": "gelu_tanh", "positional_grid": 7,
            "conv_bias": True,
        },
    ),
    "glm-4.1v": PackedTower(
        Glm4vVisionConfig,
        Glm4vVisionModel,
        {"hidden_size": WIDTH, "out_hidden_size": FFN, "intermediate_size": 80, "image_size": 7 * PATCH},
        {
            "preset": "qwen2_5_vl_vit", "ffn_hidden_size": FFN, "window_size": None, "positional_grid": 7,
            "positional_interpolation": "bicubic", "conv_bias": True, "add_bias_linear": False, "add_qkv_bias": False,
            "pre_layernorm": True, "post_layernorm": True, "layernorm_epsilon": 1e-5,
        },
    ),
    # Tables of 7 x 7 that are made smaller along one side of a picture and larger along the other.
    "siglip2": PackedTower(
        Siglip2VisionConfig,
        Siglip2VisionModel,
        {"hidden_size": WIDTH, "intermediate_size": FFN, "num_patches": 49, "vision_use_head": False},
        {
            "preset": "siglip2_naflex_vit", "ffn_hidden_size": FFN, "positional_grid": 7, "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        },
    ),
    "rice": PackedTower(
        None,
        None,
        {},
        {
            "preset": "qwen2_vl_vit", "ffn_hidden_size": FFN, "activation": "gelu", "temporal_patch_size": 1,
            "class_token": True, "pre_layernorm": True, "layernorm_epsilon": 1e-5,
        },
    ),
}  # fmt: skip


class Rice(nn.Module):
    """LLaVA-OneVision-1.5's tower, one picture at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, stride=PATCH, bias=False)})
        self.class_embedding = nn.Parameter(torch.empty(WIDTH))
        self.class_pos_emb = nn.Parameter(torch.empty(1, WIDTH // HEADS // 2))
        self.pre_layernorm = nn.LayerNorm(WIDTH, eps=1e-5)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(WIDTH, eps=1e-5), "norm2": nn.LayerNorm(WIDTH, eps=1e-5),
                    "attn": nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)}),
                    "mlp": nn.ModuleDict({"fc1": nn.Linear(WIDTH, FFN), "fc2": nn.Linear(FFN, WIDTH)}),
                }
            )
            for _ in range(LAYERS)
        )  # fmt: skip

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        """Return [P, W]."""
        parts, start = [], 0
        for t, h, w in grid.tolist():
            for _ in range(t):
                parts.append(self._one(patches[start : start + h * w], h, w))
                start += h * w
        return torch.cat(parts)

    def _one(self, patches: Tensor, h: int, w: int) -> Tensor:
        x = self.patch_embed["proj"](patches.view(-1, 3, PATCH, PATCH)).flatten(1)
        x = self.pre_layernorm(torch.cat([self.class_embedding[None], x]))
        at = [(2 * i + a, 2 * j + b) for i in range(h // 2) for j in range(w // 2) for a in range(2) for b in range(2)]
        dim = WIDTH // HEADS
        inverse = 1.0 / 10000 ** (torch.arange(0, dim // 2, 2).float() / (dim // 2))
        turned = (torch.tensor(at)[:, :, None].float() * inverse).flatten(1)
        angles = torch.cat([self.class_pos_emb, turned]).repeat(1, 2)[:, None]
        cos, sin = angles.cos(), angles.sin()

        def turn(y: Tensor) -> Tensor:
            first, second = y.chunk(2, -1)
            return y * cos + torch.cat([-second, first], -1) * sin

        for block in self.blocks:
            q, k, v = block["attn"]["qkv"](block["norm1"](x)).view(len(x), 3, HEADS, dim).unbind(1)
            seen = F.scaled_dot_product_attention(*(y.transpose(0, 1) for y in (turn(q), turn(k), v)))
            x = x + block["attn"]["proj"](seen.transpose(0, 1).flatten(1))
            x = x + block["mlp"]["fc2"](F.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return x[1:]


def by_head(blocks: Tensor) -> Tensor:
    """Return [Q; K; V] as Megatron's [q, k, v] of one head after the other."""
    return blocks.unflatten(0, (3, HEADS, -1)).transpose(0, 1).flatten(0, 2)


def tower_map(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Transformers' tensors of a tower in our names and layouts."""
    names = {
        "patch_embed.weight": "patch_embed.proj.weight", "patch_embed.bias": "patch_embed.proj.bias",
        "positional_embedding": "pos_embed.weight", "class_embedding": "class_embedding",
    }  # fmt: skip
    if "embeddings.patch_embedding.weight" in state:
        return siglip2_map(state)
    glm = "embeddings.position_embedding.weight" in state
    names |= {"positional_embedding": "embeddings.position_embedding.weight"} if glm else {}
    out = {}
    if "class_pos_emb" in state:
        out["class_rotary"] = state["class_pos_emb"][0]
    for kind in ("weight", "bias"):
        names |= {f"ln_pre.{kind}": f"{'post_conv' if glm else 'pre_'}_layernorm.{kind}".replace("__", "_")}
        names |= {f"ln_post.{kind}": f"post_layernorm.{kind}"}
        for i in range(LAYERS):
            mine, theirs = f"transformer.layers.{i}.", f"blocks.{i}."
            if f"{theirs}attn.qkv.{kind}" in state:
                out[f"{mine}self_attention.linear_qkv.{kind}"] = by_head(state[f"{theirs}attn.qkv.{kind}"])
            if f"{theirs}mlp.gate_proj.{kind}" in state:
                both = [state[f"{theirs}mlp.{name}_proj.{kind}"] for name in ("gate", "up")]
                out[f"{mine}mlp.linear_fc1.{kind}"] = torch.cat(both)
            for a, b in (
                ("self_attention.linear_proj", "attn.proj"), ("mlp.linear_fc1", "mlp.fc1"),
                ("mlp.linear_fc2", "mlp.fc2"), ("mlp.linear_fc2", "mlp.down_proj"), ("input_layernorm", "norm1"),
                ("pre_mlp_layernorm", "norm2"), ("mlp.linear_fc1", "mlp.linear_fc1"),
                ("mlp.linear_fc2", "mlp.linear_fc2"),
            ):  # fmt: skip
                if f"{theirs}{b}.{kind}" in state:
                    out[f"{mine}{a}.{kind}"] = state[f"{theirs}{b}.{kind}"]
    return out | {mine: state[theirs] for mine, theirs in names.items() if theirs in state}


def siglip2_map(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of SigLIP 2, whose patches are colour by colour here."""
    colours = state["embeddings.patch_embedding.weight"].view(WIDTH, PATCH, PATCH, 3).permute(0, 3, 1, 2)
    out = {
        "patch_embed.weight": colours, "patch_embed.bias": state["embeddings.patch_embedding.bias"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
    }  # fmt: skip
    for kind in ("weight", "bias"):
        out[f"ln_post.{kind}"] = state[f"post_layernorm.{kind}"]
        for i in range(LAYERS):
            mine, theirs = f"transformer.layers.{i}.", f"encoder.layers.{i}."
            out[f"{mine}self_attention.linear_qkv.{kind}"] = qkv(state, theirs + "self_attn.", kind, HEADS)
            for a, b in (
                ("self_attention.linear_proj", "self_attn.out_proj"), ("mlp.linear_fc1", "mlp.fc1"),
                ("mlp.linear_fc2", "mlp.fc2"), ("input_layernorm", "layer_norm1"), ("pre_mlp_layernorm", "layer_norm2"),
            ):  # fmt: skip
                out[f"{mine}{a}.{kind}"] = state[f"{theirs}{b}.{kind}"]
    return out


def merger_map(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Transformers' tensors of a merger in our names."""
    names = {"norm": "merger.ln_q", "linear_1": "merger.mlp.0", "linear_2": "merger.mlp.2"}
    both = {f"{a}.{kind}": f"{b}.{kind}" for a, b in names.items() for kind in ("weight", "bias")}
    return {mine: state[theirs] for mine, theirs in both.items() if theirs in state}


def made_recipe(name: str) -> Recipe:
    """Return the recipe of a case at this job's tensor-parallel size."""
    case = PACKED[name]
    size = mpu.get_tensor_model_parallel_world_size()
    vision = {
        "patch_size": PATCH, "hidden_size": WIDTH, "num_layers": LAYERS, "num_attention_heads": HEADS, "image_size": 32,
        **case.ours,
    }  # fmt: skip
    made = recipe(
        model={
            "preset": "tiny", "vision": vision, "connector": case.connector or {"preset": "patch_merger"},
            "language": {"hidden_size": EMBED}, "image": {"kind": "native"},
        },
        parallel={"tensor_model_parallel_size": size},
    )  # fmt: skip
    return made


def model_of(name: str) -> ModelConfig:
    """Return the model of a case."""
    return made_recipe(name).model


def built(name: str) -> tuple[nn.Module, nn.Module | None, nn.Module]:
    """Return our tower and, where there is one, connector of this rank, and the reference, with equal weights."""
    case = PACKED[name]
    sizes = _SIGLIP2 if case.model is Siglip2VisionModel else _SIZES
    reference = Rice() if case.model is None else case.model(case.config(**sizes, **case.theirs))
    fill(reference)
    made = made_recipe(name)
    context = build_context(made)
    ours = VISION.find(made.model.vision.preset).build(made.model.vision, context)
    load(ours, tower_map(dict(reference.named_parameters())))
    connector = None
    if case.connector is not None:
        connector = CONNECTORS.find("patch_merger").build(made.model, context)
        load(connector, merger_map(dict(reference.named_parameters())))
    return ours, connector, reference


def patches(name: str) -> Tensor:
    """Return [P, F] normalised patches of all pictures."""
    frames = PACKED[name].ours.get("temporal_patch_size", 2)
    shape = int(GRID.prod(1).sum()), 3 * frames * PATCH**2
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


def features_of(reference: nn.Module, pixels: Tensor) -> Tensor:
    """Return [P, W] of the reference's layers, in the order of the patches."""
    if isinstance(reference, Rice):
        return reference(pixels, GRID)
    if isinstance(reference, Siglip2VisionModel):
        return siglip2_features(reference, pixels)
    if isinstance(reference, Glm4vVisionModel):
        kept = []
        hook = reference.post_layernorm.register_forward_hook(lambda *a: kept.append(a[-1]))
        frames = [[1, h, w] for t, h, w in GRID.tolist() for _ in range(t)]  # it mistakes frames for pictures
        reference(pixels, torch.tensor(frames))
        hook.remove()
        return kept[0]
    return reference(pixels, GRID).last_hidden_state


def siglip2_features(reference: Siglip2VisionModel, pixels: Tensor) -> Tensor:
    """Return [P, W]: each frame row by row and padded, as its processor makes it, and back to blocks of 2 x 2."""
    frames = [(h, w) for t, h, w in GRID.tolist() for _ in range(t)]
    longest = max(h * w for h, w in frames)
    shown, masks, orders = [], [], []
    for part, (h, w) in zip(pixels.split([h * w for h, w in frames]), frames, strict=True):
        at = [(2 * i + a) * w + 2 * j + b for i in range(h // 2) for j in range(w // 2) for a in (0, 1) for b in (0, 1)]
        orders.append(torch.tensor(at))
        # Colours come last in a patch.
        rows = part.view(-1, 3, PATCH, PATCH).permute(0, 2, 3, 1).flatten(1)[orders[-1].argsort()]
        shown.append(F.pad(rows, (0, 0, 0, longest - h * w)))
        masks.append(torch.arange(longest) < h * w)
    out = reference(
        pixel_values=torch.stack(shown),
        pixel_attention_mask=torch.stack(masks).int(),
        spatial_shapes=torch.tensor(frames),
    ).last_hidden_state
    return torch.cat([one[order] for one, order in zip(out, orders, strict=True)])


def compare_packed(name: str) -> None:
    """Compare features, or tokens where Transformers' merger is ours, and all gradients."""
    ours, connector, reference = built(name)
    pixels = patches(name)
    got = ours(pixels, GRID)
    assert got.shape == (len(pixels), 1, WIDTH)
    if connector is None:
        expected = features_of(reference, pixels)
    else:
        got, expected = connector(got), reference(pixels, GRID).pooler_output
    close(got.squeeze(1), expected, "features")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    (got.squeeze(1) * weights).sum().backward()
    (expected * weights).sum().backward()
    same_gradients(ours, tower_map(gradients_of(reference)))
    if connector is not None:
        same_gradients(connector, merger_map(gradients_of(reference)))
