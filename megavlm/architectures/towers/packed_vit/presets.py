"""Published vision transformers on pictures of any size, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any

_SECOND: dict[str, Any] = {"patch_size": 14, "activation": "quick_gelu", "layernorm_epsilon": 1e-6}
_SECOND_AND_HALF: dict[str, Any] = {
    "patch_size": 14,
    "normalization": "RMSNorm",
    "activation": "silu",
    "gated_mlp": True,
    "layernorm_epsilon": 1e-6,
    "window_size": 112,
}

_THIRD: dict[str, Any] = {
    "patch_size": 16,
    "activation": "gelu_tanh",
    "layernorm_epsilon": 1e-6,
    "conv_bias": True,
    "positional_grid": 48,
    "image_size": 512,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}

_GLM: dict[str, Any] = {
    "patch_size": 14,
    "normalization": "RMSNorm",
    "activation": "silu",
    "gated_mlp": True,
    "layernorm_epsilon": 1e-5,
    "conv_bias": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "positional_grid": 24,
    "positional_interpolation": "bicubic",
    "pre_layernorm": True,
    "post_layernorm": True,
    "image_size": 336,
}

_RICE: dict[str, Any] = {
    "patch_size": 14,
    "temporal_patch_size": 1,
    "activation": "gelu",
    "layernorm_epsilon": 1e-5,
    "class_token": True,
    "pre_layernorm": True,
}

_SIGLIP: dict[str, Any] = {
    "patch_size": 14,
    "temporal_patch_size": 1,
    "spatial_merge_size": 1,
    "layernorm_epsilon": 1e-6,
    "conv_bias": True,
    "rotary_base": None,
    "post_layernorm": True,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
_MINICPM_2: dict[str, Any] = {
    # timm 0.9.10's, whose GELU is exact.
    **_SIGLIP, "activation": "gelu", "positional_grid": 27, "positional_interpolation": "bicubic_antialias",
}  # fmt: skip
_MINICPM_2_5: dict[str, Any] = {
    **_SIGLIP, "activation": "gelu_tanh", "positional_grid": 70, "positional_interpolation": "bucketed_line",
}  # fmt: skip
_NAFLEX: dict[str, Any] = {
    **_SIGLIP,
    "patch_size": 16,
    "activation": "gelu_tanh",
    "positional_grid": 16,
    "positional_interpolation": "antialias",
    "image_size": 256,
}

KINDS: dict[str, dict[str, Any]] = {
    "qwen2_vl_vit": _SECOND, "qwen2_5_vl_vit": _SECOND_AND_HALF, "qwen3_vl_vit": _THIRD,
    "glm4v_vit": _GLM,
    "rice_vit": _RICE,
    "minicpm_v_2_vit": _MINICPM_2,
    "minicpm_v_2_5_vit": _MINICPM_2_5,
    "siglip2_naflex_vit": _NAFLEX,
}  # fmt: skip
"""What a family fixes; the recipe of a converted checkpoint gives the sizes."""

_SO400M = {"hidden_size": 1152, "num_attention_heads": 16, "ffn_hidden_size": 4304}
_WIDTH = {"hidden_size": 1280, "num_layers": 32, "num_attention_heads": 16}

SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    # Qwen/Qwen2-VL-{2B,7B,72B}-Instruct: one tower, with mlp_ratio 4.
    "qwen2_vl_vit_675m": ("qwen2_vl_vit", {**_WIDTH, "ffn_hidden_size": 5120}),
    # Qwen/Qwen2.5-VL-{3B,7B}-Instruct.
    "qwen2_5_vl_vit_670m": (
        "qwen2_5_vl_vit", {**_WIDTH, "ffn_hidden_size": 3420, "full_attention_layers": (7, 15, 23, 31)},
    ),
    # Qwen/Qwen2.5-VL-{32B,72B}-Instruct, whose MLP is wider by 36.
    "qwen2_5_vl_vit_675m": (
        "qwen2_5_vl_vit", {**_WIDTH, "ffn_hidden_size": 3456, "full_attention_layers": (7, 15, 23, 31)},
    ),
    # Qwen/Qwen3-VL-{2B,4B}-Instruct, and {8B,32B}.
    "qwen3_vl_vit_300m": (
        "qwen3_vl_vit",
        {"hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16, "ffn_hidden_size": 4096}
        | {"deepstack_layers": (5, 11, 17)},
    ),
    "qwen3_vl_vit_410m": (
        "qwen3_vl_vit",
        {"hidden_size": 1152, "num_layers": 27, "num_attention_heads": 16, "ffn_hidden_size": 4304}
        | {"deepstack_layers": (8, 16, 24)},
    ),
    # zai-org/GLM-4.1V-9B-{Base,Thinking}: its MLP is as wide as the language model.
    "glm4v_vit_660m": (
        "glm4v_vit", {"hidden_size": 1536, "num_layers": 24, "num_attention_heads": 12, "ffn_hidden_size": 4096},
    ),
    # lmms-lab/LLaVA-OneVision-1.5-{4B,8B}-Instruct: RICE (arXiv 2507.20025), large.
    "rice_vit_300m": (
        "rice_vit",
        {"hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16, "ffn_hidden_size": 4096},
    ),
    # openbmb/MiniCPM-V-2: SigLIP-SO400M without its last layer; openbmb/MiniCPM-Llama3-V-2_5: with it.
    "minicpm_v_2_vit_400m": ("minicpm_v_2_vit", {**_SO400M, "num_layers": 26}),
    "minicpm_v_2_5_vit_420m": ("minicpm_v_2_5_vit", {**_SO400M, "num_layers": 27}),
    # google/siglip2-{base,so400m}-patch16-naflex, without their pooling heads.
    "siglip2_base_16_naflex": (
        "siglip2_naflex_vit",
        {"hidden_size": 768, "num_layers": 12, "num_attention_heads": 12, "ffn_hidden_size": 3072},
    ),
    "siglip2_so400m_16_naflex": (
        "siglip2_naflex_vit",
        {"hidden_size": 1152, "num_layers": 27, "num_attention_heads": 16, "ffn_hidden_size": 4304},
    ),
}  # fmt: skip
"""By kind, and what the kind does not say."""
