"""Decoder-only language models: Qwen v1, 2 and 3, and Llama."""

from megavlm.architectures.decoders.decoder import cost
from megavlm.architectures.decoders.decoder.config import DecoderConfig, products, rules
from megavlm.architectures.decoders.decoder.tables import targets
from megavlm.config.architecture import LANGUAGE, Architecture

DECODER = Architecture(
    name="decoder",
    config=DecoderConfig,
    build="megavlm.architectures.decoders.decoder.build:build",
    rules=rules,
    products=products,
    cost=cost,
    targets=targets,
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
    # The public config.json of Llama-2-13b-hf; Vicuna-13B v1.5 has the same shape.
    LANGUAGE.register(
        "llama2_13b",
        DECODER,
        num_layers=40,
        hidden_size=5120,
        ffn_hidden_size=13824,
        num_attention_heads=40,
        num_query_groups=40,
        kv_channels=128,
        vocab_size=32000,
        max_position_embeddings=4096,
        norm_epsilon=1e-5,
        add_qkv_bias=False,
    )
    # The public config.json of Mistral-7B-Instruct-v0.2, which has no window.
    LANGUAGE.register(
        "mistral_7b",
        DECODER,
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=32000,
        max_position_embeddings=32768,
        rotary_base=1000000,
        norm_epsilon=1e-5,
        add_qkv_bias=False,
    )
    # The public config.json of Yi-34B.
    LANGUAGE.register(
        "yi_34b",
        DECODER,
        num_layers=60,
        hidden_size=7168,
        ffn_hidden_size=20480,
        num_attention_heads=56,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=64000,
        max_position_embeddings=4096,
        rotary_base=5000000,
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
    _sizes()
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


# Layers, width, MLP, heads, key/value heads, rows of the embedding, whether the head is the embedding: the public
# config.json of Qwen2.5-*-Instruct and Qwen3-*.
_QWEN2_5 = {
    "0_5b": (24, 896, 4864, 14, 2, 151936, True),
    "1_5b": (28, 1536, 8960, 12, 2, 151936, True),
    "3b": (36, 2048, 11008, 16, 2, 151936, True),
    "14b": (48, 5120, 13824, 40, 8, 152064, False),
    "32b": (64, 5120, 27648, 40, 8, 152064, False),
    "72b": (80, 8192, 29568, 64, 8, 152064, False),
}
_QWEN3 = {
    "0_6b": (28, 1024, 3072, 16, 8, 151936, True),
    "1_7b": (28, 2048, 6144, 16, 8, 151936, True),
    "4b": (36, 2560, 9728, 32, 8, 151936, True),
    "14b": (40, 5120, 17408, 40, 8, 151936, False),
    "32b": (64, 5120, 25600, 64, 8, 151936, False),
}


def _sizes() -> None:
    """Register the other sizes of Qwen2.5 and Qwen3."""
    kinds = (("qwen2_5", _QWEN2_5, 32768), ("qwen3", _QWEN3, 40960))
    for name, sizes, positions in kinds:
        for size, (layers, width, ffn, heads, groups, rows, tied) in sizes.items():
            LANGUAGE.register(
                f"{name}_{size}",
                DECODER,
                num_layers=layers,
                hidden_size=width,
                ffn_hidden_size=ffn,
                num_attention_heads=heads,
                num_query_groups=groups,
                kv_channels=width // heads if name == "qwen2_5" else 128,
                vocab_size=rows,
                max_position_embeddings=positions,
                rotary_base=1000000,
                add_qkv_bias=name == "qwen2_5",
                qk_layernorm=name == "qwen3",
                tie_word_embeddings=tied,
            )
