"""Whole models, and the presets of a recipe filled in.

Packages other than this one register what they bring through the entry-point group ``megavlm.presets``: each entry
point names a function that is called without arguments (CONTRIBUTING.md, "Add a family"). Nothing here imports torch.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from megavlm.architectures import known as known_architectures
from megavlm.config.architecture import BRANCHES, MODELS, Preset, Registry
from megavlm.config.errors import UserError
from megavlm.data.media import plan_kinds
from megavlm.data.templates import find_template, is_checkpoint
from megavlm.families import known, presets_glm, presets_original
from megavlm.families.llava_like_presets import register_llava_like


def load_presets() -> None:
    """Register architectures, families and presets of this package, and of installed packages that bring some, once."""
    if MODELS.names():
        return
    known_architectures.register()
    known.register()
    register()
    plan_kinds()
    for entry in entry_points(group="megavlm.presets"):
        entry.load()()


def expand_presets(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the raw recipe ``tree`` with the values of the presets that its ``model`` branch names filled in.

    What the tree sets itself wins over the preset. The input is not changed.

    Raises:
        UserError: an unknown preset; the message starts with the key.
    """
    load_presets()
    model = tree.get("model")
    if not isinstance(model, dict):
        return tree
    if isinstance(model.get("template"), str) and not is_checkpoint(model["template"]):
        find_template(model["template"])
    whole: dict[str, Any] = {}
    if isinstance(model.get("preset"), str):
        whole = _find(MODELS, model["preset"], "model.preset").values
    expanded = dict(model)
    for branch, registry in BRANCHES.items():
        own = model.get(branch, {})
        if not isinstance(own, dict):
            continue
        values = {**whole.get(branch, {}), **own}
        if values.get("preset") != whole.get(branch, {}).get("preset"):
            values = dict(own)  # another preset than the whole model's: its adjustments do not apply
        if isinstance(values.get("preset"), str):
            values = {**_find(registry, values["preset"], f"model.{branch}.preset").values, **values}
        expanded[branch] = values
    for plan in ("image", "video"):
        expanded |= _plan(plan, whole, model)
    if "template" in whole:
        expanded.setdefault("template", whole["template"])
    return {**tree, "model": expanded}


def _plan(name: str, preset: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Return the branch of an image or film plan: the whole model's adjustments are for its own kind of plan.

    Its films go with its pictures: a stage that shows pictures in another way takes none, unless it says which.
    """
    whole, own = preset.get(name, {}), model.get(name, {})
    if not whole or not isinstance(own, dict):
        return {}
    if not _same_kind(own, whole) or (
        name == "video" and not own and not _same_kind(model.get("image"), preset["image"])
    ):
        return {name: own} if own else {}
    return {name: {**whole, **own}}


def _same_kind(own: Any, whole: dict[str, Any]) -> bool:
    return not isinstance(own, dict) or own.get("kind", whole.get("kind")) == whole.get("kind")


def _find(registry: Registry, name: str, key: str) -> Preset:
    try:
        return registry.find(name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


# Towers and language models of InternVL: arXiv 2412.05271, table 1 (2.5), 2504.10479, table 1 (3), 2508.18265, table 1
# (3.5), and the public config.json. Those on InternLM and on mixtures of experts are not among them.
_INTERNVL = {
    "2_5": {"1b": "0_5b", "4b": "3b", "38b": "32b", "78b": "72b"},
    "3": {"1b": "0_5b", "2b": "1_5b", "8b": "7b", "14b": "14b", "38b": "32b", "78b": "72b"},
    "3_5": {"1b": "0_6b", "2b": "1_7b", "4b": "4b", "8b": "8b", "14b": "14b", "38b": "32b"}
    | {"30b_a3b": "30b_a3b", "241b_a28b": "235b_a22b"},
}


# LLaVA-1.6 in Transformers' form (llava-hf/llava-v1.6-*-hf, llava-hf/llama3-llava-next-8b-hf): the language model, the
# rows of its embedding with two tokens more, padded to 64, and the template.
_LLAVA_NEXT = {
    "1_6_vicuna_7b": ("llama2_7b", 32064, "vicuna_v1"),
    "1_6_vicuna_13b": ("llama2_13b", 32064, "vicuna_v1"),
    "1_6_mistral_7b": ("mistral_7b", 32064, "mistral"),
    "1_6_34b": ("yi_34b", 64064, "chatml_direct"),
    "next_llama3_8b": ("llama3_8b", 128320, "llama_3"),
}
# LLaVA-OneVision (llava-hf/llava-onevision-qwen2-*-ov-hf; arXiv 2408.03326): Qwen2, whose shapes are Qwen2.5's, with
# three tokens more, padded to 64.
_ONEVISION = {"0_5b": 152000, "7b": 152128, "72b": 152128}


def _register_llava_tiles() -> None:
    """Register LLaVA-1.6 and LLaVA-OneVision."""
    for name, (language, rows, template) in _LLAVA_NEXT.items():
        MODELS.register(
            f"llava_{name}",
            vision={"preset": "clip_vit_l_14_336"},
            connector={"preset": "mlp2x_gelu"},
            language={"preset": language, "vocab_size": rows},
            image={"kind": "anyres"},
            template=template,
        )
    for size, rows in _ONEVISION.items():
        MODELS.register(
            f"llava_onevision_{size}",
            # The features of its 26th layer, in front of the norm behind them.
            vision={"preset": "siglip_so400m_14_384", "num_layers": 26, "post_layernorm": False},
            connector={"preset": "mlp2x_gelu"},
            language={"preset": f"qwen2_5_{size}", "vocab_size": rows},
            image={"kind": "anyres_max", "max_tiles": 9},
            video={"kind": "llava_onevision"},
            template="qwen2",
        )


def _register_paligemma() -> None:
    """Register PaliGemma: google/paligemma-3b-{pt,mix}-*, whose table has 64 rows behind its tokens."""
    for size in (224, 448, 896):
        MODELS.register(
            f"paligemma_3b_{size}",
            vision={"preset": f"siglip_so400m_14_{size}"},
            connector={"preset": "linear"},
            language={"preset": "gemma_2b", "vocab_size": 257216, "attention_mask": "prefix"},
            template="paligemma",
        )


def _register_mllama() -> None:
    """Register Llama 3.2 Vision: meta-llama/Llama-3.2-{11B,90B}-Vision-Instruct."""
    for size in ("11b", "90b"):
        MODELS.register(
            f"llama3_2_vision_{size}",
            vision={"preset": "mllama_vit_h_560"},
            connector={"preset": "linear"},
            language={"preset": f"llama3_2_vision_{size}"},
            image={"kind": "canvas_tiles", "resample": "bilinear"},
            template="mllama",
        )


def _register_minicpm_v() -> None:
    """Register MiniCPM-V: openbmb/MiniCPM-V, openbmb/MiniCPM-V-2, openbmb/MiniCPM-Llama3-V-2_5."""
    MODELS.register(
        "minicpm_v",
        # timm's, whose GELU is exact; that 1.0 lacks the last layer too is unchecked.
        vision={
            "preset": "siglip_so400m_14_384",
            "image_size": 448,
            "num_layers": 26,
            "activation": "gelu",
            "positional_antialias": True,
        },
        connector={"preset": "resampler", "num_queries": 64, "head_dim": 128},
        language={"preset": "minicpm_2b", "tie_word_embeddings": False},
        template="minicpm",
    )
    MODELS.register(
        "minicpm_v_2",
        vision={"preset": "minicpm_v_2_vit_400m"},
        connector={"preset": "minicpm_v_2_resampler"},
        # Whose head has rows of its own there.
        language={"preset": "minicpm_2b", "tie_word_embeddings": False},
        image={"kind": "slices"},
        template="minicpm",
    )
    MODELS.register(
        "minicpm_llama3_v_2_5",
        vision={"preset": "minicpm_v_2_5_vit_420m"},
        connector={"preset": "resampler_2d"},
        language={"preset": "llama3_8b"},
        image={"kind": "slices"},
        template="minicpm_llama_3",
    )


def _register_gemma3() -> None:
    """Register Gemma 3 with pictures: google/gemma-3-{4b,12b,27b}-it."""
    for size in ("4b", "12b", "27b"):
        MODELS.register(
            f"gemma3_{size}",
            vision={"preset": "siglip_so400m_14_896"},
            connector={"preset": "gemma3_pool"},
            language={"preset": f"gemma_3_{size}", "attention_mask": "images"},
            image={"resample": "bilinear"},  # as its preprocessor_config.json
            template="gemma3",
        )


def _register_deepseek_vl() -> None:
    """Register DeepSeek-VL, whose SigLIP has erf GELU: deepseek-ai/deepseek-vl-{1.3b,7b}-{base,chat}."""
    MODELS.register(
        "deepseek_vl_1_3b",
        # google/siglip-large-patch16-384, all layers and the norm behind them.
        vision={
            "preset": "siglip_vit", "image_size": 384, "patch_size": 16, "hidden_size": 1024, "num_layers": 24,
            "num_attention_heads": 16, "ffn_hidden_size": 4096, "positional_grid": 24, "activation": "gelu",
        },
        connector={"preset": "mlp2x_gelu"},
        language={"preset": "deepseek_llm_1_3b"},
        image={"kind": "fit"},
        template="deepseek",
    )  # fmt: skip
    # deepseek-community/deepseek-vl-7b-{base,chat}.
    MODELS.register(
        "deepseek_vl_7b",
        vision={"preset": "deepseek_vl_hybrid"},
        connector={"preset": "hybrid_split"},
        language={"preset": "deepseek_llm_7b"},
        image={"kind": "fit_pair"},
        template="deepseek",
    )


# HuggingFaceTB/SmolVLM-{256M,500M}-Instruct, SmolVLM-Instruct, and SmolVLM2 of the same sizes: SmolLM2-135M, -360M and
# -1.7B, each with rows of its own for the tokens of pictures and a head of its own; the tower, and patches of a token.
_SIGLIP_B_512 = {
    "preset": "siglip_vit", "image_size": 512, "patch_size": 16, "hidden_size": 768, "num_layers": 12,
    "num_attention_heads": 12, "ffn_hidden_size": 3072, "positional_grid": 32,
}  # fmt: skip
_SMOLLM2 = {"preset": "llama", "norm_epsilon": 1e-5, "kv_channels": 64}
_SMOLVLM: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "256m": (_SIGLIP_B_512, 16, {
        "num_layers": 30, "hidden_size": 576, "ffn_hidden_size": 1536, "num_attention_heads": 9, "num_query_groups": 3,
        "vocab_size": 49280, "max_position_embeddings": 8192, "rotary_base": 100000,
    }),
    "500m": (_SIGLIP_B_512, 16, {
        "num_layers": 32, "hidden_size": 960, "ffn_hidden_size": 2560, "num_attention_heads": 15,
        "num_query_groups": 5, "vocab_size": 49280, "max_position_embeddings": 8192, "rotary_base": 100000,
    }),
    # The number of its positions is from memory, unchecked.
    "2_2b": ({"preset": "siglip_so400m_14_384"}, 9, {
        "num_layers": 24, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32,
        "num_query_groups": 32, "vocab_size": 49155, "max_position_embeddings": 16384, "rotary_base": 273768,
    }),
}  # fmt: skip


def _register_idefics3() -> None:
    """Register Idefics3 and SmolVLM."""
    for size, (vision, patches, language) in _SMOLVLM.items():
        MODELS.register(
            f"smolvlm_{size}",
            vision=vision,
            connector={"preset": "concat_square", "patches": patches, "add_bias_linear": False},
            language={**_SMOLLM2, **language},
            image={"kind": "split_tiles", "resample": "lanczos"},
            template="smolvlm",
        )
    # HuggingFaceM4/Idefics3-8B-Llama3: Llama 3.1's shape with three tokens more, its rotary base not stretched
    # (unchecked), and SigLIP-SO400M at 364.
    MODELS.register(
        "idefics3_8b_llama3",
        vision={"preset": "siglip_so400m_14_384", "image_size": 364, "positional_grid": 26},
        connector={"preset": "concat_square", "patches": 4, "add_bias_linear": False},
        language={"preset": "llama3_8b", "vocab_size": 128259, "max_position_embeddings": 131072},
        image={"kind": "split_tiles", "resample": "lanczos"},
        template="idefics3",
    )


# MM1 (arXiv 2403.09611), dense: the sizes of its language models were not published; LLaMA's of about these numbers of
# parameters stand for them (OpenLLaMA-3B, LLaMA-7B, -33B). No weights exist.
_MM1: dict[str, dict[str, Any]] = {
    "3b": {
        "num_layers": 26,
        "hidden_size": 3200,
        "ffn_hidden_size": 8640,
        "num_attention_heads": 32,
        "kv_channels": 100,
    },
    "7b": {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 11008,
        "num_attention_heads": 32,
        "kv_channels": 128,
    },
    "30b": {
        "num_layers": 60,
        "hidden_size": 6656,
        "ffn_hidden_size": 17920,
        "num_attention_heads": 52,
        "kv_channels": 128,
    },
}


# MM1's with experts (arXiv 2403.09611, section 3.4, from memory): how many, and in every so manieth layer; top 2.
_MM1_MOE = {"3b": (64, 2), "7b": (32, 4)}


def _register_mm1() -> None:
    """Register MM1's shape: ViT-H at 378 (CLIP, DFN's), a C-Abstractor of 144 tokens, a Llama, some with experts."""
    experts = {
        f"{size}_moe": {**_MM1[size], "num_moe_experts": count, "moe_layer_freq": every}
        for size, (count, every) in _MM1_MOE.items()
    }
    for size, language in (_MM1 | experts).items():
        MODELS.register(
            f"mm1_{size}",
            vision={
                "preset": "clip_vit", "image_size": 378, "patch_size": 14, "hidden_size": 1280, "num_layers": 32,
                "num_attention_heads": 16, "ffn_hidden_size": 5120, "positional_grid": 27, "activation": "gelu",
            },
            # Without positions of its own, which would be others at another size of pictures.
            connector={"preset": "c_abstractor", "output_grid": 12, "position_embedding": False},
            language={
                "preset": "llama", "norm_epsilon": 1e-6, "num_query_groups": language["num_attention_heads"],
                "vocab_size": 32000, "max_position_embeddings": 4096, **language,
            },
            template="vicuna_v1",
        )  # fmt: skip


# Qwen/Qwen2-VL-*-Instruct and Qwen/Qwen2.5-VL-*-Instruct: sizes of Qwen2 (which are those of Qwen2.5), and the number
# of its positions.
_QWEN2_VL = {
    "qwen2_vl": ({"2b": "1_5b", "7b": "7b", "72b": "72b"}, "LayerNorm", 32768),
    "qwen2_5_vl": ({"3b": "3b", "7b": "7b", "32b": "32b", "72b": "72b"}, "RMSNorm", 128000),
}
_QWEN2_VL_TOWERS = {"qwen2_vl": "qwen2_vl_vit_675m", "qwen2_5_vl": "qwen2_5_vl_vit_670m"}


def _register_qwen2_vl() -> None:
    """Register Qwen2-VL and Qwen2.5-VL."""
    for version, (sizes, norm, positions) in _QWEN2_VL.items():
        for size, language in sizes.items():
            wide = version == "qwen2_5_vl" and size in ("32b", "72b")
            MODELS.register(
                f"{version}_{size}",
                vision={"preset": "qwen2_5_vl_vit_675m" if wide else _QWEN2_VL_TOWERS[version]},
                connector={"preset": "patch_merger", "normalization": norm},
                language={
                    "preset": f"qwen2_5_{language}",
                    "max_position_embeddings": positions,
                    "rotary_sections": [16, 24, 24],
                },
                # As their preprocessor_config.json: 4 to 16384 tokens.
                image={"kind": "native", "min_pixels": 3136, "max_pixels": 12845056},
                # The same file says it of films: of each frame.
                video={"kind": "qwen2_vl", "min_pixels": 3136, "max_pixels": 12845056}
                | ({"tokens_per_second": 2.0} if version == "qwen2_5_vl" else {}),
                template="qwen2_vl",
            )


# Qwen/Qwen3-VL-*-Instruct, dense: the sizes of Qwen3, whose 2B is its 1.7B; the tower.
_QWEN3_VL = {"2b": ("1_7b", "300m"), "4b": ("4b", "300m"), "8b": ("8b", "410m"), "32b": ("32b", "410m")}
# And with experts: those of Qwen3-30B-A3B and -235B-A22B, with the larger tower.
_QWEN3_VL |= {size: (size, "410m") for size in ("30b_a3b", "235b_a22b")}


def _register_qwen3_vl() -> None:
    """Register Qwen3-VL."""
    for size, (language, tower) in _QWEN3_VL.items():
        MODELS.register(
            f"qwen3_vl_{size}",
            vision={"preset": f"qwen3_vl_vit_{tower}"},
            connector={"preset": "patch_merger"},
            language={
                "preset": f"qwen3_{language}",
                "max_position_embeddings": 262144,
                "rotary_base": 5000000,
                "rotary_sections": [24, 20, 20],
                "rotary_sections_interleaved": True,
            },
            # As its preprocessor_config.json: 64 to 16384 tokens.
            image={"kind": "native", "min_pixels": 65536, "max_pixels": 16777216},
            # As its video_preprocessor_config.json.
            video={"kind": "qwen3_vl", "min_pixels": 4096, "total_pixels": 25165824},
            template="qwen3_vl",
        )


# lmms-lab/LLaVA-OneVision-1.5-{4B,8B}-Instruct: Qwen3-4B-Instruct-2507 and Qwen3-8B, whose positions they keep. Both
# are trained with a head of their own (EvolvingLMMs-Lab/LLaVA-OneVision-1.5, llavaov_1_5_config.py: untied).
_ONEVISION_1_5 = {"4b": (262144, 5000000), "8b": (40960, 1000000)}


def _register_llava_onevision1_5() -> None:
    """Register LLaVA-OneVision-1.5."""
    for size, (positions, base) in _ONEVISION_1_5.items():
        MODELS.register(
            f"llava_onevision1_5_{size}",
            vision={"preset": "rice_vit_300m"},
            connector={"preset": "patch_merger", "layernorm_epsilon": 1e-5},
            language={
                "preset": f"qwen3_{size}",
                "max_position_embeddings": positions,
                "rotary_base": base,
                "tie_word_embeddings": False,
            },
            # As ds/merge_model.py writes the processor: that of Qwen2.5-VL, with at most 1600 x 1600 pixels.
            image={"kind": "native", "min_pixels": 3136, "max_pixels": 2560000},
            video={"kind": "qwen2_vl", "min_pixels": 3136, "max_pixels": 2560000},
            template="qwen2_vl",
        )


def register() -> None:
    """Register the whole models that a recipe may name."""
    register_llava_like()
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
    # LLaVA-1.5 in Transformers' form (llava-hf/llava-1.5-*-hf): Vicuna's 32000 tokens, two more, and padding.
    for size in ("7b", "13b"):
        MODELS.register(
            f"llava_1_5_{size}",
            vision={"preset": "clip_vit_l_14_336"},
            connector={"preset": "mlp2x_gelu"},
            language={"preset": f"llama2_{size}", "vocab_size": 32064},
            image={"kind": "pad"},  # as its authors train it; a converted checkpoint has its own processor's
            template="vicuna_v1",
        )
    _register_llava_tiles()
    _register_paligemma()
    _register_mllama()
    _register_gemma3()
    _register_deepseek_vl()
    _register_idefics3()
    _register_mm1()
    _register_minicpm_v()
    _register_qwen2_vl()
    _register_qwen3_vl()
    presets_glm.register()
    _register_llava_onevision1_5()
    presets_original.register()
    for version, sizes in _INTERNVL.items():
        for size, language in sizes.items():
            qwen3, large = version == "3_5", size in ("38b", "78b", "241b_a28b")
            MODELS.register(
                f"internvl{version}_{size}",
                vision={"preset": "intern_vit_6b_448" if large else "intern_vit_300m_448"},
                connector={"preset": "pixel_shuffle"},
                # Its tokenizer's tokens and no more, where Qwen3's own table has room for the new ones.
                language={
                    "preset": f"{'qwen3' if qwen3 else 'qwen2_5'}_{language}",
                    "vocab_size": 151936 if qwen3 else 151674,
                    "tie_word_embeddings": False,
                },
                image={"kind": "dynamic_tiles"},
                video={"kind": "internvl"},
                template="internvl2_5",
            )
