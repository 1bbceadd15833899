"""Decoder-only language models: Qwen v1, 2 and 3, and Llama."""

from megavlm.architectures.decoders.decoder import cost
from megavlm.architectures.decoders.decoder.config import DecoderConfig, products, rules
from megavlm.config.architecture import LANGUAGE, Architecture

DECODER = Architecture(
    name="decoder",
    config=DecoderConfig,
    build="megavlm.architectures.decoders.decoder.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the language models that a recipe may call it by."""
    # What an architecture fixes; the recipe of a converted checkpoint gives the sizes.
    LANGUAGE.register("qwen", DECODER, add_qkv_bias=True, layer_names="qwen")
    LANGUAGE.register("llama", DECODER, add_qkv_bias=False)
    LANGUAGE.register("qwen2", DECODER, add_qkv_bias=True)
    LANGUAGE.register("qwen3", DECODER, add_qkv_bias=False, qk_layernorm=True)

    # Qwen v1: facts page A; the public config.json of Qwen-7B and Qwen-14B (intermediate_size is twice the width).
    LANGUAGE.register(
        "qwen_7b",
        DECODER,
        layer_names="qwen",
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=32,
        kv_channels=128,
        vocab_size=151936,
        max_position_embeddings=8192,
        seq_length=2048,
        use_dynamic_ntk=True,
        use_logn_attn=True,
    )
    LANGUAGE.register(
        "qwen_14b",
        DECODER,
        layer_names="qwen",
        num_layers=40,
        hidden_size=5120,
        ffn_hidden_size=13696,
        num_attention_heads=40,
        num_query_groups=40,
        kv_channels=128,
        vocab_size=152064,
        max_position_embeddings=8192,
        seq_length=2048,
        use_dynamic_ntk=True,
        use_logn_attn=True,
    )
    # The public config.json of Llama-2-7b-hf; Vicuna-7B v1.5 has the same shape.
    LANGUAGE.register(
        "llama2_7b",
        DECODER,
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=32,
        kv_channels=128,
        vocab_size=32000,
        max_position_embeddings=4096,
        norm_epsilon=1e-5,
        add_qkv_bias=False,
    )
    # The public config.json of Meta-Llama-3-8B.
    LANGUAGE.register(
        "llama3_8b",
        DECODER,
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=128256,
        max_position_embeddings=8192,
        rotary_base=500000,
        norm_epsilon=1e-5,
        add_qkv_bias=False,
    )
    # The public config.json of Qwen2.5-7B-Instruct and Qwen3-8B.
    LANGUAGE.register(
        "qwen2_5_7b",
        DECODER,
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        kv_channels=128,
        vocab_size=152064,
        max_position_embeddings=32768,
        rotary_base=1000000,
        add_qkv_bias=True,
    )
    LANGUAGE.register(
        "qwen3_8b",
        DECODER,
        num_layers=36,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rotary_base=1000000,
        add_qkv_bias=False,
        qk_layernorm=True,
    )
    LANGUAGE.register(
        "tiny_qwen",
        DECODER,
        layer_names="qwen",
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=352,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=32,
        vocab_size=512,
        max_position_embeddings=2048,
        init_method_std=0.08,  # about 1 / sqrt(width)
    )
