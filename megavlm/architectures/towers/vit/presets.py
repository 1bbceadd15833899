"""Published vision transformers: one row each, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any, NamedTuple


class ViTSize(NamedTuple):
    """The sizes in a public ``config.json``; a tower has as many layers as are run for its features."""

    image_size: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    ffn_hidden_size: int
    positional_grid: int


_HALF = (0.5, 0.5, 0.5)

KINDS: dict[str, dict[str, Any]] = {
    "clip_vit": {"class_token": True, "layernorm_epsilon": 1e-5},
    "siglip_vit": {
        "layernorm_epsilon": 1e-6,
        "activation": "gelu_tanh",
        "conv_bias": True,
        "pre_layernorm": False,
        "post_layernorm": True,
        "image_mean": _HALF,
        "image_std": _HALF,
    },
    "intern_vit": {
        "class_token": True,
        "conv_bias": True,
        "pre_layernorm": False,
        "layer_scale": True,
        "layernorm_epsilon": 1e-6,
        "image_mean": (0.485, 0.456, 0.406),
        "image_std": (0.229, 0.224, 0.225),
    },
    "dinov2_vit": {
        "class_token": True,
        "register_tokens": 4,
        "positional_antialias": True,
        "conv_bias": True,
        "pre_layernorm": False,
        "layer_scale": True,
        "layer_scale_init": 1.0,
        "layernorm_epsilon": 1e-6,
        "image_mean": (0.485, 0.456, 0.406),
        "image_std": (0.229, 0.224, 0.225),
    },
    # EVA01-CLIP's giant without its own last norm, with the one that BLIP-2 puts behind it (ln_vision); MiniGPT-v2 too.
    "eva01_vit": {
        "class_token": True,
        "conv_bias": True,
        "pre_layernorm": False,
        "post_layernorm": True,
        "layernorm_epsilon": 1e-6,
        "key_bias": False,
    },
    "eva02_vit": {
        "class_token": True,
        "conv_bias": True,
        "pre_layernorm": False,
        "layernorm_epsilon": 1e-6,
        "activation": "silu",
        "gated_mlp": True,
        "mlp_norm": True,
        "attention_norm": True,
        "key_bias": False,
        "rotary_base": 10000.0,
        "rotary_grid": 16,
    },
    # EVA02-CLIP-E/14+ as CogVLM has it: plain layers, whose norms stand behind attention and MLP.
    "eva02_e_vit": {
        "class_token": True,
        "conv_bias": True,
        "pre_layernorm": False,
        "layernorm_epsilon": 1e-6,
        "branch_norms": "behind",
    },
}
"""What a family fixes; the recipe of a converted checkpoint gives the sizes (and a CLIP's activation)."""

_CLIP, _SIGLIP, _INTERN = KINDS["clip_vit"], KINDS["siglip_vit"], KINDS["intern_vit"]
_DINOV2, _EVA01, _EVA02 = KINDS["dinov2_vit"], KINDS["eva01_vit"], KINDS["eva02_vit"]
_EVA02_E = KINDS["eva02_e_vit"]
_SWIGLU = {**_DINOV2, "activation": "silu", "gated_mlp": True}

SIZES: dict[str, tuple[ViTSize, dict[str, Any]]] = {
    # About 1 / sqrt(width): with the usual 0.02, so narrow a tower passes little on and learns late.
    "tiny_vit": (ViTSize(64, 8, 96, 3, 4, 384, 8), {"init_method_std": 0.1}),
    # Qwen-VL's tower (OpenCLIP ViT-bigG without class token): facts page B; arXiv 2308.12966.
    "openclip_vit_bigg": (ViTSize(448, 14, 1664, 48, 16, 8192, 16), {}),
    # openai/clip-vit-large-patch14-336 as LLaVA-1.5 uses it: the features of the last layer but one, so 23 of 24 run.
    "clip_vit_l_14_336": (ViTSize(336, 14, 1024, 23, 16, 4096, 24), {**_CLIP, "activation": "quick_gelu"}),
    # openai/clip-vit-large-patch14, likewise.
    "clip_vit_l_14_224": (ViTSize(224, 14, 1024, 23, 16, 4096, 16), {**_CLIP, "activation": "quick_gelu"}),
    # google/siglip-{base-patch16-224,large-patch16-384} without their pooling heads, as all that follow.
    "siglip_base_16_224": (ViTSize(224, 16, 768, 12, 12, 3072, 14), _SIGLIP),
    "siglip_large_16_384": (ViTSize(384, 16, 1024, 24, 16, 4096, 24), _SIGLIP),
    # google/siglip-so400m-patch14-384 without its pooling head; 27 patches of 14 leave 6 of 384 pixels out.
    "siglip_so400m_14_384": (ViTSize(384, 14, 1152, 27, 16, 4304, 27), _SIGLIP),
    # google/siglip-so400m-patch14-224 and -896 as PaliGemma and Gemma 3 have them, and PaliGemma's at 448.
    "siglip_so400m_14_224": (ViTSize(224, 14, 1152, 27, 16, 4304, 16), _SIGLIP),
    "siglip_so400m_14_448": (ViTSize(448, 14, 1152, 27, 16, 4304, 32), _SIGLIP),
    "siglip_so400m_14_896": (ViTSize(896, 14, 1152, 27, 16, 4304, 64), _SIGLIP),
    # PaLI-3's SigLIP ViT-G/14 (arXiv 2310.09199): the shape is that of G/14 in big_vision's models/vit.py
    # (arXiv 2106.04560, table 2). Its weights were not published.
    "siglip_g_14_224": (ViTSize(224, 14, 1664, 48, 16, 8192, 16), _SIGLIP),
    # google/siglip2-{base,large,so400m,giant-opt}-patch16-*; those of 14 pixels a patch are SigLIP's in shape.
    "siglip2_base_16_224": (ViTSize(224, 16, 768, 12, 12, 3072, 14), _SIGLIP),
    "siglip2_large_16_384": (ViTSize(384, 16, 1024, 24, 16, 4096, 24), _SIGLIP),
    "siglip2_so400m_14_384": (ViTSize(384, 14, 1152, 27, 16, 4304, 27), _SIGLIP),
    "siglip2_so400m_16_384": (ViTSize(384, 16, 1152, 27, 16, 4304, 24), _SIGLIP),
    "siglip2_so400m_16_512": (ViTSize(512, 16, 1152, 27, 16, 4304, 32), _SIGLIP),
    "siglip2_giant_16_384": (ViTSize(384, 16, 1536, 40, 16, 6144, 24), _SIGLIP),
    # facebook/dinov2-with-registers-{base,large,giant}: the layer before the last and no norm, on 384 pixels, as
    # Prismatic and Cobra take it (of timm's, block number len - 2); the table is that of 518.
    "dinov2_reg4_base_14": (ViTSize(384, 14, 768, 11, 12, 3072, 37), _DINOV2),
    "dinov2_reg4_large_14": (ViTSize(384, 14, 1024, 23, 16, 4096, 37), _DINOV2),
    "dinov2_reg4_giant_14": (ViTSize(384, 14, 1536, 39, 24, 4096, 37), _SWIGLU),
    # BLIP-2's eva_vit_g.pth (LAVIS, lavis/models/eva_vit.py, create_eva_vit_g): the last of 40 layers is left out; at
    # 448 pixels, with the table of 224 stretched, MiniGPT-v2's.
    "eva01_clip_g_14_224": (ViTSize(224, 14, 1408, 39, 16, 6144, 16), _EVA01),
    "eva01_clip_g_14_448": (ViTSize(448, 14, 1408, 39, 16, 6144, 16), _EVA01),
    # timm/eva02_large_patch14_clip_336 as Bunny takes it: the last of 24 layers is left out.
    "eva02_clip_l_14_336": (ViTSize(336, 14, 1024, 23, 16, 2730, 24), _EVA02),
    # THUDM/cogvlm-base-224-hf and -490-hf: the last of 64 layers is left out in their files; tables of either size.
    "eva02_clip_e_14_224": (ViTSize(224, 14, 1792, 63, 16, 15360, 16), _EVA02_E),
    "eva02_clip_e_14_490": (ViTSize(490, 14, 1792, 63, 16, 15360, 35), _EVA02_E),
    # OpenGVLab/InternViT-300M-448px-V2_5 and InternViT-6B-448px-V2_5, as InternVL 2.5, 3 and 3.5 have them; the 6B
    # without the last three of its 48 layers.
    "intern_vit_300m_448": (ViTSize(448, 14, 1024, 24, 16, 4096, 32), _INTERN),
    "intern_vit_6b_448": (
        ViTSize(448, 14, 3200, 45, 25, 12800, 32),
        {**_INTERN, "normalization": "RMSNorm", "add_qkv_bias": False, "qk_norm": "width"},
    ),
}
"""Sizes, and what else is not a default."""
