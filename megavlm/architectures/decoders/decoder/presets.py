"""Published decoders: one row each, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any, NamedTuple


class DecoderSize(NamedTuple):
    """The sizes in a public ``config.json``."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int


_QWEN: dict[str, Any] = {"layer_names": "qwen"}
_QWEN_LONG = {"seq_length": 2048, "use_dynamic_ntk": True, "use_logn_attn": True}
_LLAMA: dict[str, Any] = {"norm_epsilon": 1e-5, "add_qkv_bias": False}
_QWEN2: dict[str, Any] = {"rotary_base": 1000000, "add_qkv_bias": True}
_QWEN3: dict[str, Any] = {"rotary_base": 1000000, "add_qkv_bias": False, "qk_layernorm": True}
# Whether the head is the embedding.
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

KINDS: dict[str, dict[str, Any]] = {
    "qwen": {"add_qkv_bias": True, "layer_names": "qwen"},
    "llama": {"add_qkv_bias": False},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"add_qkv_bias": False, "qk_layernorm": True},
    "glm4": {
        "add_qkv_bias": True,
        "post_layernorms": True,
        "rotary_percent": 0.5,
        "rotary_interleaved": True,
        "norm_epsilon": 1e-5,
        "layer_names": "glm",
    },
}
"""What a family fixes; the recipe of a converted checkpoint gives the sizes."""

SIZES: dict[str, tuple[DecoderSize, dict[str, Any]]] = {
    "tiny_qwen": (
        DecoderSize(4, 128, 352, 4, 4, 32, 512, 2048),
        {**_QWEN, "init_method_std": 0.08},  # about 1 / sqrt(width)
    ),
    # Qwen v1 (Qwen-7B, Qwen-14B; their intermediate_size is twice the width): facts page A.
    "qwen_7b": (DecoderSize(32, 4096, 11008, 32, 32, 128, 151936, 8192), {**_QWEN, **_QWEN_LONG}),
    "qwen_14b": (DecoderSize(40, 5120, 13696, 40, 40, 128, 152064, 8192), {**_QWEN, **_QWEN_LONG}),
    # Llama-2-*-hf; Vicuna v1.5 has the same shapes.
    "llama2_7b": (DecoderSize(32, 4096, 11008, 32, 32, 128, 32000, 4096), _LLAMA),
    "llama2_13b": (DecoderSize(40, 5120, 13824, 40, 40, 128, 32000, 4096), _LLAMA),
    # Mistral-7B-Instruct-v0.2, which has no window.
    "mistral_7b": (DecoderSize(32, 4096, 14336, 32, 8, 128, 32000, 32768), {"rotary_base": 1000000, **_LLAMA}),
    "yi_34b": (DecoderSize(60, 7168, 20480, 56, 8, 128, 64000, 4096), {"rotary_base": 5000000, **_LLAMA}),
    "llama3_8b": (DecoderSize(32, 4096, 14336, 32, 8, 128, 128256, 8192), {"rotary_base": 500000, **_LLAMA}),
    # Qwen2.5-*-Instruct.
    "qwen2_5_0_5b": (DecoderSize(24, 896, 4864, 14, 2, 64, 151936, 32768), _QWEN2 | _TIED),
    "qwen2_5_1_5b": (DecoderSize(28, 1536, 8960, 12, 2, 128, 151936, 32768), _QWEN2 | _TIED),
    "qwen2_5_3b": (DecoderSize(36, 2048, 11008, 16, 2, 128, 151936, 32768), _QWEN2 | _TIED),
    "qwen2_5_7b": (DecoderSize(28, 3584, 18944, 28, 4, 128, 152064, 32768), _QWEN2),
    "qwen2_5_14b": (DecoderSize(48, 5120, 13824, 40, 8, 128, 152064, 32768), _QWEN2 | _UNTIED),
    "qwen2_5_32b": (DecoderSize(64, 5120, 27648, 40, 8, 128, 152064, 32768), _QWEN2 | _UNTIED),
    "qwen2_5_72b": (DecoderSize(80, 8192, 29568, 64, 8, 128, 152064, 32768), _QWEN2 | _UNTIED),
    # Qwen3-*.
    "qwen3_0_6b": (DecoderSize(28, 1024, 3072, 16, 8, 128, 151936, 40960), _QWEN3 | _TIED),
    "qwen3_1_7b": (DecoderSize(28, 2048, 6144, 16, 8, 128, 151936, 40960), _QWEN3 | _TIED),
    "qwen3_4b": (DecoderSize(36, 2560, 9728, 32, 8, 128, 151936, 40960), _QWEN3 | _TIED),
    "qwen3_8b": (DecoderSize(36, 4096, 12288, 32, 8, 128, 151936, 40960), _QWEN3),
    "qwen3_14b": (DecoderSize(40, 5120, 17408, 40, 8, 128, 151936, 40960), _QWEN3 | _UNTIED),
    "qwen3_32b": (DecoderSize(64, 5120, 25600, 64, 8, 128, 151936, 40960), _QWEN3 | _UNTIED),
}
"""Sizes, and what else is not a default, by the public ``config.json`` of each."""
