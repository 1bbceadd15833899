"""Published decoders: one row each, by the name that a recipe calls them."""

from __future__ import annotations

import math
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
_COGAGENT = {"cross_hidden_size": 1024, "cross_compute_hidden_size": 1024}
_QWEN2: dict[str, Any] = {"rotary_base": 1000000, "add_qkv_bias": True}
_QWEN3: dict[str, Any] = {"rotary_base": 1000000, "add_qkv_bias": False, "qk_layernorm": True}
# Whether the head is the embedding.
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

_PHI: dict[str, Any] = {
    "normalization": "LayerNorm", "norm_epsilon": 1e-5, "add_qkv_bias": True, "add_bias_linear": True,
    "lm_head_bias": True, "gated_linear_unit": False, "activation": "gelu_tanh", "use_parallel_residual": True,
    "rotary_percent": 0.5, "layer_names": "phi",
}  # fmt: skip
_PHI3: dict[str, Any] = {**_LLAMA, "layer_names": "phi3"}
_GEMMA: dict[str, Any] = {
    "layernorm_zero_centered_gamma": True, "activation": "gelu_tanh", "add_qkv_bias": False, **_TIED,
}  # fmt: skip
_GEMMA3: dict[str, Any] = {
    **_GEMMA, "post_layernorms": True, "qk_layernorm": True, "query_pre_attn_scalar": 256.0,
    "rotary_base": 1000000, "rope_local_base_freq": 10000, "sliding_window_pattern": 6, "sliding_window": 1024,
}  # fmt: skip
_STABLELM: dict[str, Any] = {
    "normalization": "LayerNorm", "norm_epsilon": 1e-5, "rotary_percent": 0.25, "add_qkv_bias": True,
}  # fmt: skip
_INTERNLM2: dict[str, Any] = {**_LLAMA, "rotary_base": 1000000, "layer_names": "internlm2"}

_LLAMA3_1: dict[str, Any] = {
    **_LLAMA, "rotary_base": 500000, "rope_scaling": "llama3", "rope_scaling_factor": 8.0,
}  # fmt: skip
_QWEN3_MOE: dict[str, Any] = {"add_qkv_bias": False, "qk_layernorm": True, "num_moe_experts": 128, "moe_router_topk": 8}
_MIXTRAL: dict[str, Any] = {"norm_epsilon": 1e-5, "add_qkv_bias": False, "num_moe_experts": 8, "moe_router_topk": 2}

_GLM_MOE: dict[str, Any] = {
    "norm_epsilon": 1e-5, "add_qkv_bias": True, "rotary_percent": 0.5, "rotary_base": 1000000,
    "num_moe_experts": 128, "moe_router_topk": 8, "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}  # fmt: skip

_DEEPSEEK_V2: dict[str, Any] = {
    "add_qkv_bias": False, "rotary_interleaved": True, "rotary_percent": 1 / 3, "num_moe_experts": 64,
    "moe_router_topk": 6, "moe_router_pre_softmax": True, "kv_lora_rank": 512, "v_head_dim": 128,
}  # fmt: skip

_BY_8: dict[str, Any] = {"rope_scaling": "linear", "rope_scaling_factor": 8.0}

KINDS: dict[str, dict[str, Any]] = {
    "qwen": {"add_qkv_bias": True, "layer_names": "qwen"},
    "llama": {"add_qkv_bias": False},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"add_qkv_bias": False, "qk_layernorm": True},
    "mistral": {"add_qkv_bias": False},
    "phi": _PHI,
    "phi3": _PHI3,
    "gemma": _GEMMA,
    "gemma3_text": _GEMMA3,
    "stablelm": _STABLELM,
    "minicpm": {"add_qkv_bias": False, "tie_word_embeddings": True},
    "internlm2": _INTERNLM2,
    "glm4": {
        "add_qkv_bias": True,
        "post_layernorms": True,
        "rotary_percent": 0.5,
        "rotary_interleaved": True,
        "norm_epsilon": 1e-5,
        "layer_names": "glm",
    },
    "qwen3_moe": _QWEN3_MOE,
    "mixtral": _MIXTRAL,
    "glm4_moe": _GLM_MOE,
    "deepseek_v2": _DEEPSEEK_V2,
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
    # Qwen/Qwen-1_8B; its seq_length is from memory, and matters to answers past 8192 tokens alone.
    "qwen_1_8b": (
        DecoderSize(24, 2048, 5504, 16, 16, 128, 151936, 8192),
        {**_QWEN, **_QWEN_LONG, "seq_length": 8192},
    ),
    # Llama-2-*-hf; Vicuna v1.5 has the same shapes.
    "llama2_7b": (DecoderSize(32, 4096, 11008, 32, 32, 128, 32000, 4096), _LLAMA),
    "llama2_13b": (DecoderSize(40, 5120, 13824, 40, 40, 128, 32000, 4096), _LLAMA),
    # The language half of CogVLM: Vicuna-7B v1.5, and weights of their own for image tokens.
    "cogvlm_7b": (
        DecoderSize(32, 4096, 11008, 32, 32, 128, 32000, 2048),
        {**_LLAMA, "visual_expert": True, "image_positions": "shared"},
    ),
    # The language models of facebook/chameleon-7b and -30b (which the paper calls 34B).
    "chameleon_7b": (DecoderSize(32, 4096, 11008, 32, 32, 128, 65536, 4096), {**_LLAMA, "head_layernorm": True}),
    "chameleon_34b": (
        DecoderSize(48, 8192, 22016, 64, 8, 128, 65536, 4096),
        {**_LLAMA, "head_layernorm": True, "pre_layernorms": False, "post_layernorms": True},
    ),
    # The language half of CogAgent: CogVLM's, whose layers attend to a second tower's features too.
    "cogagent_7b": (
        DecoderSize(32, 4096, 11008, 32, 32, 128, 32000, 2048),
        {**_LLAMA, "visual_expert": True, "image_positions": "shared", **_COGAGENT},
    ),
    # Mistral-7B-Instruct-v0.2, which has no window.
    "mistral_7b": (DecoderSize(32, 4096, 14336, 32, 8, 128, 32000, 32768), {"rotary_base": 1000000, **_LLAMA}),
    "yi_34b": (DecoderSize(60, 7168, 20480, 56, 8, 128, 64000, 4096), {"rotary_base": 5000000, **_LLAMA}),
    "llama3_8b": (DecoderSize(32, 4096, 14336, 32, 8, 128, 128256, 8192), {"rotary_base": 500000, **_LLAMA}),
    # The language models of meta-llama/Llama-3.2-{11B,90B}-Vision-Instruct: Llama 3.1's, and layers that attend to
    # pictures; the embedding has 8 rows more than the output layer.
    "llama3_2_vision_11b": (
        DecoderSize(40, 4096, 14336, 32, 8, 128, 128264, 131072),
        {**_LLAMA3_1, "output_vocab_size": 128256, "cross_attention_layers": tuple(range(3, 40, 5))},
    ),
    "llama3_2_vision_90b": (
        DecoderSize(100, 8192, 28672, 64, 8, 128, 128264, 131072),
        {**_LLAMA3_1, "output_vocab_size": 128256, "cross_attention_layers": tuple(range(3, 100, 5))},
    ),
    # Yi-6B; TinyLlama-1.1B; MobileLLaMA; deepseek-llm-1.3b-base, -7b-base.
    "yi_6b": (DecoderSize(32, 4096, 11008, 32, 4, 128, 64000, 4096), {"rotary_base": 5000000, **_LLAMA}),
    "tinyllama_1_1b": (DecoderSize(22, 2048, 5632, 32, 4, 64, 32000, 2048), _LLAMA),
    "mobilellama_1_4b": (DecoderSize(24, 2048, 5632, 16, 16, 128, 32000, 2048), {**_LLAMA, "norm_epsilon": 1e-6}),
    "mobilellama_2_7b": (DecoderSize(32, 2560, 6912, 32, 32, 80, 32000, 2048), {**_LLAMA, "norm_epsilon": 1e-6}),
    "deepseek_llm_1_3b": (DecoderSize(24, 2048, 5632, 16, 16, 128, 102400, 16384), {**_LLAMA, "norm_epsilon": 1e-6}),
    "deepseek_llm_7b": (DecoderSize(30, 4096, 11008, 32, 32, 128, 102400, 4096), {**_LLAMA, "norm_epsilon": 1e-6}),
    # Mistral-7B-v0.1, whose window is shorter than what it is meant for.
    "mistral_7b_v0_1": (DecoderSize(32, 4096, 14336, 32, 8, 128, 32000, 32768), {**_LLAMA, "sliding_window": 4096}),
    # microsoft/phi-1_5, phi-2, Phi-3-mini-4k-instruct.
    "phi_1_5": (DecoderSize(24, 2048, 8192, 32, 32, 64, 51200, 2048), _PHI),
    "phi_2": (DecoderSize(32, 2560, 10240, 32, 32, 80, 51200, 2048), {**_PHI, "rotary_percent": 0.4}),
    "phi_3_mini_4k": (DecoderSize(32, 3072, 8192, 32, 32, 96, 32064, 4096), {**_PHI3, "sliding_window": 2047}),
    # google/gemma-2b; the multiplier is the root of 2048.
    "gemma_2b": (
        DecoderSize(18, 2048, 16384, 8, 1, 256, 256000, 8192),
        {**_GEMMA, "embedding_multiplier": math.sqrt(2048)},
    ),
    # google/gemma-3-1b-it; the language models of google/gemma-3-{4b,12b,27b}-it, stretched where there is no window.
    "gemma_3_1b": (
        DecoderSize(26, 1152, 6912, 4, 1, 256, 262144, 32768),
        {**_GEMMA3, "sliding_window": 512, "embedding_multiplier": math.sqrt(1152)},
    ),
    "gemma_3_4b": (
        DecoderSize(34, 2560, 10240, 8, 4, 256, 262208, 131072),
        {**_GEMMA3, **_BY_8, "embedding_multiplier": math.sqrt(2560)},
    ),
    "gemma_3_12b": (
        DecoderSize(48, 3840, 15360, 16, 8, 256, 262208, 131072),
        {**_GEMMA3, **_BY_8, "embedding_multiplier": math.sqrt(3840)},
    ),
    "gemma_3_27b": (
        DecoderSize(62, 5376, 21504, 32, 16, 128, 262208, 131072),
        {**_GEMMA3, **_BY_8, "embedding_multiplier": math.sqrt(5376), "query_pre_attn_scalar": 168.0},
    ),
    # THUDM/GLM-4-9B-0414.
    "glm_4_9b": (DecoderSize(40, 4096, 13696, 32, 2, 128, 151552, 32768), KINDS["glm4"]),
    # stabilityai/stablelm-2-1_6b.
    "stablelm_2_1_6b": (DecoderSize(24, 2048, 5632, 32, 32, 64, 100352, 4096), _STABLELM),
    # openbmb/MiniCPM-2B-sft-bf16: scale_emb 12, scale_depth 1.4, dim_model_base 256.
    "minicpm_2b": (
        DecoderSize(40, 2304, 5760, 36, 36, 64, 122753, 4096),
        {
            **_LLAMA,
            **_TIED,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 / math.sqrt(40),
            "logits_scaling": 2304 / 256,
        },
    ),
    # internlm/internlm2_5-1_8b, -7b, -20b: the language models of InternVL 2 and 2.5. The rotary base of the 20B
    # is unchecked.
    "internlm2_5_1_8b": (DecoderSize(24, 2048, 8192, 16, 8, 128, 92544, 32768), _INTERNLM2),
    "internlm2_5_7b": (DecoderSize(32, 4096, 14336, 32, 8, 128, 92544, 32768), _INTERNLM2),
    "internlm2_5_20b": (
        DecoderSize(48, 6144, 16384, 48, 8, 128, 92544, 32768),
        {**_INTERNLM2, "rotary_base": 50000000},
    ),
    # Qwen1.5-*: Qwen2's shapes, a head for each key and value up to 14B.
    "qwen1_5_0_5b": (DecoderSize(24, 1024, 2816, 16, 16, 64, 151936, 32768), _QWEN2 | _TIED),
    "qwen1_5_1_8b": (DecoderSize(24, 2048, 5504, 16, 16, 128, 151936, 32768), _QWEN2),
    "qwen1_5_4b": (DecoderSize(40, 2560, 6912, 20, 20, 128, 151936, 32768), {**_QWEN2, "rotary_base": 5000000}),
    "qwen1_5_7b": (DecoderSize(32, 4096, 11008, 32, 32, 128, 151936, 32768), _QWEN2),
    "qwen1_5_14b": (DecoderSize(40, 5120, 13696, 40, 40, 128, 152064, 32768), _QWEN2),
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
    # Qwen3-30B-A3B, -235B-A22B: the width of an MLP is that of layers without experts, of which there are none.
    "qwen3_30b_a3b": (
        DecoderSize(48, 2048, 6144, 32, 4, 128, 151936, 40960),
        {**_QWEN3_MOE, "moe_ffn_hidden_size": 768, "rotary_base": 1000000},
    ),
    "qwen3_235b_a22b": (
        DecoderSize(94, 4096, 12288, 64, 4, 128, 151936, 40960),
        {**_QWEN3_MOE, "moe_ffn_hidden_size": 1536, "rotary_base": 1000000},
    ),
    # zai-org/GLM-4.5-Air: a layer with an MLP, then experts and one that gets every token.
    "glm_4_5_air": (
        DecoderSize(46, 4096, 10944, 96, 8, 128, 151552, 131072),
        {**_GLM_MOE, "moe_ffn_hidden_size": 1408, "moe_shared_expert_intermediate_size": 1408}
        | {"moe_layer_freq": (0, *(1,) * 45)},
    ),
    # mistralai/Mixtral-8x7B-Instruct-v0.1.
    "mixtral_8x7b": (DecoderSize(32, 4096, 14336, 32, 8, 128, 32000, 32768), {**_MIXTRAL, "rotary_base": 1000000}),
}
"""Sizes, and what else is not a default, by the public ``config.json`` of each."""
