"""Language models. One line here and one module with ``build`` add another."""

from megavlm.models.registry import LANGUAGE

_QWEN = "megavlm.models.language.qwen"

# Qwen v1: facts page A; the public config.json of Qwen-7B and Qwen-14B (their intermediate_size is twice the width).
LANGUAGE.register(
    "qwen_7b",
    _QWEN,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=128,
    vocab_size=151936,
    max_position_embeddings=8192,
)
LANGUAGE.register(
    "qwen_14b",
    _QWEN,
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=13696,
    num_attention_heads=40,
    num_query_groups=40,
    kv_channels=128,
    vocab_size=152064,
    max_position_embeddings=8192,
)
LANGUAGE.register(
    "tiny_qwen",
    _QWEN,
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
