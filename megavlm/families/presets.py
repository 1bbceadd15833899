"""Whole models: a vision preset, a connector and a language preset, with what they adjust in each other."""

from megavlm.architectures.registry import MODELS


def register() -> None:
    """Register the whole models that a recipe may name."""
    MODELS.register(
        "tiny",
        vision={"preset": "tiny_vit"},
        connector={"preset": "resampler", "num_queries": 16, "head_dim": 32, "init_method_std": 0.1},
        language={"preset": "tiny_qwen"},
    )
    MODELS.register(
        "qwen_vl_7b",
        vision={"preset": "openclip_vit_bigg"},
        connector={"preset": "resampler"},
        language={"preset": "qwen_7b"},
    )
    MODELS.register(
        "codefuse_vl_14b",
        vision={"preset": "openclip_vit_bigg"},
        connector={"preset": "resampler"},
        language={"preset": "qwen_14b"},
    )
    # LLaVA-1.5-7B in Transformers' form (llava-hf/llava-1.5-7b-hf): Vicuna's 32000 tokens, two more, and padding.
    MODELS.register(
        "llava_1_5_7b",
        vision={"preset": "clip_vit_l_14_336"},
        connector={"preset": "mlp2x_gelu"},
        language={"preset": "llama2_7b", "vocab_size": 32064},
    )
