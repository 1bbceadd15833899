"""A vision transformer on square images: Qwen-VL's, CLIP's, SigLIP's and InternViT."""

from typing import Any

from megavlm.architectures.towers.vit import cost
from megavlm.architectures.towers.vit.config import ViTConfig, products, rules
from megavlm.config.architecture import VISION, Architecture

VIT = Architecture(
    name="vit",
    config=ViTConfig,
    build="megavlm.architectures.towers.vit.build:build",
    rules=rules,
    products=products,
    cost=cost,
)

_HALF = (0.5, 0.5, 0.5)
_CLIP: dict[str, Any] = {"class_token": True, "layernorm_epsilon": 1e-5}
_SIGLIP: dict[str, Any] = {
    "layernorm_epsilon": 1e-6,
    "activation": "gelu_tanh",
    "conv_bias": True,
    "pre_layernorm": False,
    "post_layernorm": True,
    "image_mean": _HALF,
    "image_std": _HALF,
}
_INTERN: dict[str, Any] = {
    "class_token": True,
    "conv_bias": True,
    "pre_layernorm": False,
    "layer_scale": True,
    "layernorm_epsilon": 1e-6,
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}


def register() -> None:
    """Register the towers that a recipe may call it by."""
    # What an architecture fixes; the recipe of a converted checkpoint gives the sizes (and a CLIP's activation).
    VISION.register("clip_vit", VIT, **_CLIP)
    VISION.register("siglip_vit", VIT, **_SIGLIP)
    VISION.register("intern_vit", VIT, **_INTERN)

    # Qwen-VL's tower (OpenCLIP ViT-bigG without class token): facts page B; arXiv 2308.12966.
    VISION.register(
        "openclip_vit_bigg",
        VIT,
        image_size=448,
        patch_size=14,
        hidden_size=1664,
        num_layers=48,
        num_attention_heads=16,
        ffn_hidden_size=8192,
        positional_grid=16,
    )
    # openai/clip-vit-large-patch14-336 as LLaVA-1.5 uses it: the features of the last layer but one, so 23 of 24 run.
    VISION.register(
        "clip_vit_l_14_336",
        VIT,
        image_size=336,
        patch_size=14,
        hidden_size=1024,
        num_layers=23,
        num_attention_heads=16,
        ffn_hidden_size=4096,
        positional_grid=24,
        activation="quick_gelu",
        **_CLIP,
    )
    # google/siglip-so400m-patch14-384 without its pooling head; 27 patches of 14 leave 6 of 384 pixels out.
    VISION.register(
        "siglip_so400m_14_384",
        VIT,
        image_size=384,
        patch_size=14,
        hidden_size=1152,
        num_layers=27,
        num_attention_heads=16,
        ffn_hidden_size=4304,
        positional_grid=27,
        **_SIGLIP,
    )
    # OpenGVLab/InternViT-300M-448px-V2_5 and InternViT-6B-448px-V2_5 (their public config.json), as InternVL 2.5, 3 and
    # 3.5 have them; the 6B without the last three of its 48 layers.
    VISION.register(
        "intern_vit_300m_448",
        VIT,
        image_size=448,
        patch_size=14,
        hidden_size=1024,
        num_layers=24,
        num_attention_heads=16,
        ffn_hidden_size=4096,
        positional_grid=32,
        **_INTERN,
    )
    VISION.register(
        "intern_vit_6b_448",
        VIT,
        image_size=448,
        patch_size=14,
        hidden_size=3200,
        num_layers=45,
        num_attention_heads=25,
        ffn_hidden_size=12800,
        positional_grid=32,
        normalization="RMSNorm",
        add_qkv_bias=False,
        qk_norm="width",
        **_INTERN,
    )
    VISION.register(
        "tiny_vit",
        VIT,
        image_size=64,
        patch_size=8,
        hidden_size=96,
        num_layers=3,
        num_attention_heads=4,
        ffn_hidden_size=384,
        positional_grid=8,
        init_method_std=0.1,  # about 1 / sqrt(width): with 0.02, so narrow a tower passes little on and learns late
    )
