"""Presets of families whose checkpoints are in their authors' own layouts; the others: :mod:`megavlm.families.presets`.

Names as their authors have them, sizes from the public ``config.json`` files.
"""

from __future__ import annotations

import math
from typing import Any

from megavlm.config.architecture import MODELS

CLIP: dict[str, Any] = {"preset": "clip_vit_l_14_336"}
"""CLIP-L/336 without its last layer."""
SIGLIP: dict[str, Any] = {"preset": "siglip_so400m_14_384", "num_layers": 26, "post_layernorm": False}
"""SigLIP-SO400M/384 without its last layer."""

# tinyllava/TinyLLaVA-1.5B, -2.0B, -3.1B, -Gemma-SigLIP-2.4B, Zhang199/TinyLLaVA-Qwen2-0.5B-SigLIP, -Qwen2.5-3B-SigLIP:
# the language model, the template, and by what features are multiplied. SigLIP's first patch is dropped.
_TINYLLAVA: dict[str, tuple[str, str, float]] = {
    "1_5b": ("tinyllama_1_1b", "vicuna_v1", 1.0),
    "2_0b": ("stablelm_2_1_6b", "vicuna_v1_endoftext", 1.0),
    "3_1b": ("phi_2", "vicuna_v1_endoftext", 1.0),
    "gemma_2_4b": ("gemma_2b", "vicuna_v1_gemma", math.sqrt(2048)),
    "qwen2_0_5b": ("qwen2_5_0_5b", "vicuna_v1_endoftext", 1.0),  # Qwen2 and Qwen2.5 are of one shape
    "qwen2_5_3b": ("qwen2_5_3b", "vicuna_v1_endoftext", 1.0),
}
# mtgv/MobileVLM-{1.7B,3B} and MobileVLM_V2-{1.7B,3B,7B}: the language model, and the projector.
_MOBILEVLM = {
    "1_7b": ("mobilellama_1_4b", "ldpnet"),
    "3b": ("mobilellama_2_7b", "ldpnet"),
    "v2_1_7b": ("mobilellama_1_4b", "ldpnetv2"),
    "v2_3b": ("mobilellama_2_7b", "ldpnetv2"),
    "v2_7b": ("llama2_7b", "ldpnetv2"),
}
# HuanjinYao/DenseConnector-v1.5-{7B,8B} on SigLIP, and what its scripts train on CLIP: tower, language model, template.
_DENSE = {
    "7b": (SIGLIP, "llama2_7b", "vicuna_v1"),
    "8b": (SIGLIP, "llama3_8b", "llama_3"),
    "clip_7b": (CLIP, "llama2_7b", "vicuna_v1"),
}
# YanweiLi/MGM-{2B,7B,13B,8B,34B,8x7B}, and -HD of all but the first: the language model, the template, and by what
# features are multiplied. Rows of the embedding are those of the language models: its scripts add no tokens.
_MINIGEMINI: dict[str, tuple[str, str, float]] = {
    "2b": ("gemma_2b", "mgm_gemma", math.sqrt(2048)),
    "7b": ("llama2_7b", "vicuna_v1", 1.0),
    "13b": ("llama2_13b", "vicuna_v1", 1.0),
    "8b": ("llama3_8b", "mgm_llama_3", 1.0),
    "34b": ("yi_34b", "chatml_direct", 1.0),
    "8x7b": ("mixtral_8x7b", "mgm_mistral", 1.0),
}
_HD: dict[str, Any] = {"high_image_size": 1536, "low_tiles": 2, "low_whole": True}
# HyperGAI/HPT1_5-Air-Llama-3-8B-Instruct-multimodal and HPT1_5-Edge: SigLIP's table of 27 x 27 seen at 448 pixels.
_HPT = {"air": ("llama3_8b", "hpt_llama_3"), "edge": ("phi_3_mini_4k", "phi_3")}
# THUDM/cogvlm-{base-224,base-490,chat,grounding-generalist}-hf: the side of pictures, the template.
_COGVLM = {
    "base_224": (224, "cogvlm_base"),
    "base_490": (490, "cogvlm_base"),
    "chat": (490, "cogvlm"),
    "grounding_generalist": (490, "cogvlm_base"),
}
# THUDM/cogagent-{chat,vqa}-hf: the template ("Which --version to use", README.md of THUDM/CogVLM @ f7283b2c).
_COGAGENT = {"chat": "cogagent", "vqa": "cogvlm"}

# Vision-CAIR/MiniGPT-4's checkpoints (README.md @ d94738a7). Vicuna v0 is LLaMA 1: Llama 2's shape, another epsilon.
_LLAMA_1 = {"norm_epsilon": 1e-6, "max_position_embeddings": 2048}
_MINIGPT: dict[str, tuple[dict[str, Any], str]] = {
    "minigpt4_7b": ({"preset": "llama2_7b", **_LLAMA_1}, "minigpt4"),
    "minigpt4_13b": ({"preset": "llama2_13b", **_LLAMA_1}, "minigpt4"),
    "minigpt4_llama_2_7b": ({"preset": "llama2_7b"}, "minigpt4_llama_2"),
    "minigpt_v2_7b": ({"preset": "llama2_7b"}, "minigpt_v2"),
}
# Tyrannosaurus/TinyGPT-V (README.md of DLYuanGod/TinyGPT-V @ 83f6189b): pictures of stages 1 to 3, and of stage 4.
_TINYGPT_V = {"tinygpt_v_224": 224, "tinygpt_v": 448}


def register() -> None:
    """Register them."""
    _register_of_the_blip_line()
    _register_pali3()
    for name, (language, projector) in _MOBILEVLM.items():
        MODELS.register(
            f"mobilevlm_{name}",
            vision=CLIP,
            connector={"preset": projector},
            language={"preset": language},
            image={"kind": "pad"},
            template="vicuna_v1",
        )
    for name, (tower, language, template) in _DENSE.items():
        layers = 23 if tower is CLIP else 26
        MODELS.register(
            f"dense_connector_{name}",
            vision={**tower, "feature_layers": list(range(layers + 1))},
            connector={"preset": "dense_dci"},
            language={"preset": language},
            image={"kind": "pad"},
            template=template,
        )
    # han1997/cobra, cobra+3b.
    MODELS.register(
        "cobra_3b",
        vision={"preset": "cobra_dinov2_siglip", "image_size": 384},
        connector={"preset": "mlp3x_gelu", "input_expansion": 4},
        language={"preset": "mamba_2_8b", "max_position_embeddings": 2816},  # 2048 of text, and a picture
        image={"kind": "squash_pair"},
        template="zephyr",
    )
    # xtuner/llava-phi-3-mini-xtuner.
    MODELS.register(
        "llava_phi3_mini",
        vision=CLIP,
        connector={"preset": "mlp2x_gelu"},
        language={"preset": "phi_3_mini_4k"},
        image={"kind": "pad"},
        template="phi_3",
    )
    for name, (language, template) in _HPT.items():
        MODELS.register(
            f"hpt_1_5_{name}",
            vision={**SIGLIP, "image_size": 448},
            connector={"preset": "mlp2x_gelu"},
            language={"preset": language},
            image={"kind": "squash"},
            template=template,
        )
    for size, (language, template, scale) in _MINIGEMINI.items():
        for name, own in (("", {}), ("_hd", _HD)) if size != "2b" else (("", {}),):
            MODELS.register(
                f"minigemini_{size}{name}",
                vision={"preset": "minigemini_clip_convnext", **own},
                connector={"preset": "patch_mining", "output_multiplier": scale},
                language={"preset": language},
                image={"kind": "pad"},
                template=template,
            )
    # Haoran-megvii/Vary-toy, whose files were not read: rows are those of Qwen-VL's tokenizer, which the code's ids of
    # marks (151857 to 151859) are of and which its trainer resizes to (Ucas-HaoranWei/Vary-toy @ c6e40597).
    MODELS.register(
        "vary_toy",
        vision={"preset": "vary_clip_sam"},
        connector={"preset": "two_linears"},
        language={"preset": "qwen_1_8b", "vocab_size": 151860},
        image={"kind": "crop_squash"},
        template="vary",
    )
    for size, (language, template, scale) in _TINYLLAVA.items():
        MODELS.register(
            f"tinyllava_{size}",
            vision=SIGLIP,
            connector={"preset": "mlp2x_gelu", "drop_first_feature": True, "output_multiplier": scale},
            language={"preset": language},
            image={"kind": "squash"},
            template=template,
        )


def _register_pali3() -> None:
    """Register PaLI-3 (arXiv 2310.09199), whose parts' shapes are unchecked; no weights exist."""
    MODELS.register(
        "pali3_5b",
        vision={"preset": "siglip_g_14_224"},
        connector={"preset": "linear"},
        language={"preset": "t5_xl"},
        template="pali3",
    )


def _register_of_the_blip_line() -> None:
    """Register MiniGPT-4, MiniGPT-v2, CogVLM, CogAgent and Chameleon."""
    # facebook/chameleon-7b and -30b: tokens 4 to 8195 are those of pictures.
    for size in ("7b", "34b"):
        MODELS.register(
            f"chameleon_{size}",
            vision={"preset": "chameleon_vq_gan"},
            connector={"preset": "codes"},
            language={"preset": f"chameleon_{size}", "image_tokens": (4, 8196)},
            image={"kind": "crop", "resample": "lanczos"},
            template="chameleon",
        )
    for name, template in _COGAGENT.items():
        MODELS.register(
            f"cogagent_{name}",
            vision={"preset": "cogagent_eva02_pair", "high_to": "layers"},
            connector={"preset": "glu"},
            language={"preset": "cogagent_7b"},
            image={"kind": "squash_pair"},
            template=template,
        )
    for name, (side, template) in _COGVLM.items():
        MODELS.register(
            f"cogvlm_{name}",
            vision={"preset": f"eva02_clip_e_14_{side}"},
            connector={"preset": "glu"},
            language={"preset": "cogvlm_7b"},
            image={"kind": "squash"},
            template=template,
        )
    for name, (language, template) in _MINIGPT.items():
        queries = template == "minigpt4"
        MODELS.register(
            name,
            vision={
                "preset": f"eva01_clip_g_14_{448 if template == 'minigpt_v2' else 224}",
                "post_layernorm_epsilon": 1e-5,
                "class_feature": queries,
            },
            # What its code trains of the Q-Former is the layer behind it.
            connector={"preset": "q_former", "trained": "projection"} if queries else {"preset": "concat_row"},
            language=language,
            image={"kind": "squash"},
            template=template,
        )
    for name, side in _TINYGPT_V.items():
        MODELS.register(
            name,
            vision={
                "preset": "eva01_clip_g_14_224", "image_size": side, "post_layernorm_epsilon": 1e-5,
                "class_feature": True,
            },
            connector={"preset": "q_former", "trained": "projection", "projection_hidden_size": 4096},
            language={
                "preset": "phi_2", "qk_layernorm": True, "attention_branch_norm": True, "layer_names": "phi_fused",
            },
            image={"kind": "squash"},
            template="tinygpt_v",
        )  # fmt: skip
