"""Compare two towers and their connector with DeepSeek-VL-7B (Transformers) and MiniGemini, at any layout.

MiniGemini is in no Transformers. :class:`MiniGemini` is written from its authors' published code
(github.com/dvlab-research/MGM, ``mgm/model/mgm_arch.py``: ``unified_resampler``; ``openclip_encoder.py``:
``image_forward``), with Transformers' CLIP and ConvNeXt as towers. The weights are mapped by hand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from convolution_cases import DEPTHS, HEADS, LAYERS, NECK, SIDE, WIDTH, WIDTHS, convnext_map, hybrid_reference, sam_map
from megatron.core import parallel_state as mpu
from samples import recipe
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel
from transformers_cases import close, fill, gradients_of, load, qkv, same_gradients

from megavlm.config.architecture import CONNECTORS, VISION
from megavlm.config.schema import Recipe
from megavlm.models.build import build_context

IMAGES, EMBED, LOW = 3, 40, 24


class MiniGemini(nn.Module):
    """CLIP, ConvNeXt, patch-info mining, two linear layers; the features of CLIP's last layer but one."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=LOW, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=14,
                patch_size=7, hidden_act="quick_gelu",
            )
        )  # fmt: skip
        self.convnext: Any = ConvNextModel(
            ConvNextConfig(depths=DEPTHS, hidden_sizes=WIDTHS, num_stages=3, layer_scale_init_value=1.0)
        )
        sizes = {"query": LOW, "aux": sum(WIDTHS), "val": sum(WIDTHS)}
        self.uni = nn.ModuleDict({n: nn.Sequential(nn.LayerNorm(s), nn.Linear(s, LOW)) for n, s in sizes.items()})
        self.mm_projector = nn.Sequential(nn.Linear(LOW, EMBED), nn.GELU(), nn.Linear(EMBED, EMBED))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [N, P, E]."""
        small = F.interpolate(pixels, size=(14, 14), mode="bilinear", align_corners=False)
        images = self.clip(pixel_values=small, output_hidden_states=True).hidden_states[-2][:, 1:]
        maps = self.convnext(pixels, output_hidden_states=True).hidden_states[1:]
        size = maps[0].shape[-2:]
        maps = [F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in maps]
        aux = torch.cat(maps, dim=1).permute(0, 2, 3, 1)
        side, many = int(images.shape[1] ** 0.5), size[0] // int(images.shape[1] ** 0.5)
        aux = aux.reshape(len(aux), side, many, side, many, -1).permute(0, 1, 3, 2, 4, 5)
        aux = aux.reshape(len(aux), side**2, many**2, -1)
        query, key, value = self.uni["query"](images), self.uni["aux"](aux), self.uni["val"](aux)
        scores = query[:, :, None] @ (key.transpose(-1, -2) / key.shape[-1] ** 0.5)
        return self.mm_projector(images + (scores.softmax(-1) @ value).mean(2))


def vit_map(state: dict[str, Tensor], theirs: str, layers: int) -> dict[str, Tensor]:
    """Return the first tower's tensors in our names and layouts."""
    names = {"conv1": "embeddings.patch_embedding", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    one = {
        "positional_embedding": "embeddings.position_embedding.weight", "class_embedding": "embeddings.class_embedding",
    }  # fmt: skip
    out = {a: state[theirs + b] for a, b in one.items() if theirs + b in state}
    for i in range(layers):
        a, b = f"transformer.layers.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            out[f"{a}self_attention.linear_qkv.{kind}"] = qkv(state, f"{theirs}{b}self_attn.", kind, 2)
        names |= {a + "self_attention.linear_proj": b + "self_attn.out_proj", a + "mlp.linear_fc1": b + "mlp.fc1"}
        names |= {a + "mlp.linear_fc2": b + "mlp.fc2", a + "input_layernorm": b + "layer_norm1"}
        names[a + "pre_mlp_layernorm"] = b + "layer_norm2"
    both = {f"{a}.{kind}": f"{theirs}{b}.{kind}" for a, b in names.items() for kind in ("weight", "bias")}
    return out | {a: state[b] for a, b in both.items() if b in state}


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def deepseek_maps(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of towers and connector."""
    names = {"low": "vision_proj", "high": "high_res_vision_proj", "proj": "proj"}
    aligner = {f"{a}.{kind}": state[f"aligner.{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    high = _under("high.", sam_map(state, second=True))
    return _under("low.", vit_map(state, "vision_model.", 1)) | high, aligner


def minigemini_maps(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same of MiniGemini."""
    inside = {name.removeprefix("convnext."): value for name, value in state.items()}
    low = {name: value for name, value in vit_map(state, "clip.", 1).items() if "ln_post" not in name}
    names = {f"norms.{a}": f"uni.{b}.0" for a, b in (("query", "query"), ("key", "aux"), ("value", "val"))}
    names |= {f"linears.{a}": f"uni.{b}.1" for a, b in (("query", "query"), ("key", "aux"), ("value", "val"))}
    names |= {"layers.0": "mm_projector.0", "layers.1": "mm_projector.2"}
    connector = {f"{a}.{kind}": state[f"{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    return _under("low.", low) | _under("high.", convnext_map(inside)), connector


_LOW = {"hidden_size": LOW, "ffn_hidden_size": 40, "num_layers": 1, "num_attention_heads": 2, "patch_size": 7}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_vl_hybrid": {
        "vision": {
            **_LOW, "preset": "siglip_sam", "image_size": 21, "positional_grid": 3, "activation": "gelu",
            "high_image_size": SIDE, "high_patch_size": 4, "high_hidden_size": WIDTH, "high_num_layers": LAYERS,
            "high_num_attention_heads": HEADS, "high_ffn_hidden_size": 64, "high_window_size": 3,
            "high_global_layers": (1,), "high_neck_size": NECK, "high_output_grid": 3, "high_second_neck_layer": 1,
        },
        "connector": {"preset": "hybrid_split"}, "image": {"kind": "fit_pair"},
    },
    "minigemini": {
        "vision": {
            **_LOW, "preset": "clip_convnext", "image_size": 14, "positional_grid": 2, "activation": "quick_gelu",
            "high_image_size": SIDE, "high_depths": DEPTHS, "high_widths": WIDTHS, "high_feature_stages": (1, 2, 3),
        },
        "connector": {"preset": "patch_mining"}, "image": {"kind": "pad"},
    },
}  # fmt: skip
CASES = tuple(MODELS)
MODELS["minigemini_hd"] = {  # compared whole: tests/families/minigemini_models.py
    **MODELS["minigemini"],
    "vision": {**MODELS["minigemini"]["vision"], "high_image_size": 2 * SIDE, "low_tiles": 2, "low_whole": True},
}
MODELS["vary"] = {  # compared whole: tests/families/vary_models.py
    "vision": {
        **{key: value for key, value in MODELS["deepseek_vl_hybrid"]["vision"].items() if "second_neck" not in key},
        "preset": "clip_sam",
        "image_size": 14,
        "positional_grid": 2,
        "activation": "quick_gelu",
        "high_output_grid": 2,
    },
    "connector": {"preset": "two_linears"},
    "image": {"kind": "crop_squash"},
}
# Compared whole: tests/families/cobra_models.py.
MODELS["cobra"] = {
    "vision": {
        **_LOW, "preset": "dinov2_siglip", "image_size": 21, "positional_grid": 3, "high_image_size": 21,
        **{f"high_{key}": value for key, value in {**_LOW, "hidden_size": 32, "num_layers": 2}.items()},
        "high_positional_grid": 3,
    },
    "connector": {"preset": "mlp3x_gelu", "input_expansion": 4}, "image": {"kind": "squash_pair"},
}  # fmt: skip


def made_recipe(name: str, **vision: Any) -> Recipe:
    """Return the recipe of a case at this job's tensor-parallel size."""
    tree = MODELS[name]
    size = mpu.get_tensor_model_parallel_world_size()
    model = {"preset": "tiny", **tree, "vision": {**tree["vision"], **vision}, "language": {"hidden_size": EMBED}}
    return recipe(model=model, parallel={"tensor_model_parallel_size": size})


def built(made: Recipe) -> tuple[nn.Module, nn.Module]:
    """Return tower and connector of this rank."""
    context, model = build_context(made), made.model
    connector = CONNECTORS.find(model.connector.preset).build(model, context)
    return VISION.find(model.vision.preset).build(model.vision, context), connector


def compare(name: str) -> None:
    """Compare image tokens, and all gradients."""
    deepseek = name == "deepseek_vl_hybrid"
    reference: Any = hybrid_reference(3, 7, EMBED) if deepseek else MiniGemini()
    fill(reference)
    maps = deepseek_maps if deepseek else minigemini_maps
    tower, connector = built(made_recipe(name))
    for ours, mapped in zip((tower, connector), maps(dict(reference.named_parameters())), strict=True):
        load(ours, mapped)
    generator = torch.Generator().manual_seed(8)
    low, high = (torch.randn(IMAGES, 3, side, side, generator=generator) for side in (21, SIDE))
    if deepseek:
        expected = reference.get_image_features(low, high).pooler_output
        pixels = torch.cat([low.flatten(1), high.flatten(1)], dim=1)
    else:
        expected, pixels = reference(high), high
    got = connector(tower(pixels)).transpose(0, 1)
    close(got, expected, "tokens")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, mapped in zip((tower, connector), maps(gradients_of(reference)), strict=True):
        for silent in ("norms.key.bias", "linears.key.bias"):  # adds the same to all scores of a query: rounding alone
            if silent in mapped:
                gradient = dict(ours.named_parameters())[silent].grad
                assert gradient is not None and max(gradient.abs().max(), mapped[silent].abs().max()) < 1e-5
                gradient.fill_(1), mapped[silent].fill_(1)
        if "high.second_scale" in mapped:  # one number, the sum of many with either sign
            scale = ours.high.second_scale
            torch.testing.assert_close(scale.grad, mapped["high.second_scale"], rtol=1e-4, atol=0)
            scale.grad, mapped["high.second_scale"] = torch.ones(1), torch.ones(1)
        same_gradients(ours, mapped)
