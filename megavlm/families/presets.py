"""Whole models: a vision preset, a connector and a language preset, with what they adjust in each other."""

from megavlm.architectures.registry import MODELS

# Towers and language models of InternVL: arXiv 2412.05271, table 1 (2.5), 2504.10479, table 1 (3), 2508.18265, table 1
# (3.5), and the public config.json. Those on InternLM and on mixtures of experts are not among them.
_INTERNVL = {
    "2_5": {"1b": "0_5b", "4b": "3b", "38b": "32b", "78b": "72b"},
    "3": {"1b": "0_5b", "2b": "1_5b", "8b": "7b", "14b": "14b", "38b": "32b", "78b": "72b"},
    "3_5": {"1b": "0_6b", "2b": "1_7b", "4b": "4b", "8b": "8b", "14b": "14b", "38b": "32b"},
}


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
    for version, sizes in _INTERNVL.items():
        for size, language in sizes.items():
            qwen3 = version == "3_5"
            MODELS.register(
                f"internvl{version}_{size}",
                vision={"preset": "intern_vit_6b_448" if size in ("38b", "78b") else "intern_vit_300m_448"},
                connector={"preset": "pixel_shuffle"},
                # Its tokenizer's tokens and no more, where Qwen3's own table has room for the new ones.
                language={
                    "preset": f"{'qwen3' if qwen3 else 'qwen2_5'}_{language}",
                    "vocab_size": 151936 if qwen3 else 151674,
                    "tie_word_embeddings": False,
                },
                image={"kind": "dynamic_tiles"},
                template="internvl2_5",
            )
