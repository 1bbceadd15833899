"""Presets of the systems that kept LLaVA's layout: Bunny, Imp, Mipha, LLaVA-Phi, ALLaVA (:mod:`.llava_like`).

Towers end with the layer whose features are taken: 26 of SigLIP's 27, 23 of CLIP's 24.
"""

from __future__ import annotations

import math
from typing import Any

from megavlm.config.architecture import MODELS
from megavlm.families.presets_original import CLIP, SIGLIP

_S2: dict[str, Any] = {**SIGLIP, "image_size": 1152, "s2_scales": [384, 768, 1152]}
_EVA: dict[str, Any] = {"preset": "eva02_clip_l_14_336"}

# Bunny's language model, the rows of its embedding, which its loader cuts to what the tokenizer has (builder.py:
# resize_token_embeddings), and the template. 50295 is read in the config.json of BAAI/Bunny-v1_0-3B; the rest are the
# numbers of tokens of the public tokenizers, unchecked.
_PHI: dict[str, Any] = {"vocab_size": 50295, "lm_head_bias": False}
_BUNNY: dict[str, tuple[str, dict[str, Any], str]] = {
    "phi_1_5": ("phi_1_5", _PHI, "vicuna_v1_endoftext"),
    "phi_2": ("phi_2", _PHI, "vicuna_v1_endoftext"),  # Bunny-v1.0-3B
    "stablelm_2": ("stablelm_2_1_6b", {"vocab_size": 100289}, "vicuna_v1_endoftext"),
    "qwen1_5_1_8b": ("qwen1_5_1_8b", {"vocab_size": 151646}, "vicuna_v1_endoftext"),  # Bunny-v1.0-2B-zh
    "minicpm": ("minicpm_2b", {}, "vicuna_v1"),  # Bunny-v1.0-3B-zh
    "phi_3": ("phi_3_mini_4k", {"vocab_size": 32011}, "vicuna_v1_endoftext_bos"),  # Bunny-v1.0-4B
    "llama_3_8b": ("llama3_8b", {}, "vicuna_v1_end_of_text"),  # Bunny-Llama-3-8B-V
}
# BoyaWu10/bunny-{phi-1.5,stablelm-2,phi-2}-eva-lora.
_BUNNY_EVA = ("phi_1_5", "stablelm_2", "phi_2")
_BUNNY_1_1 = ("phi_3", "llama_3_8b")  # Bunny-v1.1-4B, Bunny-v1.1-Llama-3-8B-V

# MILVLG/imp-v1-3b, Imp-v1.5-3B-Phi2, Imp-v1.5-2B-Qwen1.5, Imp-v1.5-4B-Phi3: its loader cuts nothing.
_IMP = {
    "v1_3b": ("phi_2", "imp_phi2"), "v1_5_3b": ("phi_2", "imp_phi2"), "v1_5_2b": ("qwen1_5_1_8b", "imp_qwen2"),
    "v1_5_4b": ("phi_3_mini_4k", "imp_phi3"),
}  # fmt: skip
# zhumj34/Mipha-3B, and the paper's two smaller ones.
_MIPHA = {
    "1_6b": ("phi_1_5", "vicuna_v1_endoftext", 1.0), "2_4b": ("gemma_2b", "vicuna_v1_gemma", math.sqrt(2048)),
    "3b": ("phi_2", "vicuna_v1_endoftext", 1.0),
}  # fmt: skip


# LanguageBind/MoE-LLaVA-{StableLM-1.6B,Phi2-2.7B,Qwen-1.8B}-4e, and -384 on SigLIP, which there is none of on Qwen:
# four experts in every second layer.
_MOE_LLAVA: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm_1_6b": ("stablelm_2_1_6b", {}), "phi2_2_7b": ("phi_2", {"lm_head_bias": False}),
    "qwen_1_8b": ("qwen_1_8b", {}),
}  # fmt: skip


def register_llava_like() -> None:
    """Register them."""
    for name, (language, own, template) in _BUNNY.items():
        # As bunny_minicpm.py multiplies words, so pictures.
        connector = {"preset": "mlp2x_gelu", **({"output_multiplier": 12.0} if name == "minicpm" else {})}
        for version, tower, known in (("", SIGLIP, _BUNNY), ("_v1_1", _S2, _BUNNY_1_1), ("_eva", _EVA, _BUNNY_EVA)):
            if name not in known:
                continue
            MODELS.register(
                f"bunny{version}_{name}",
                vision=tower,
                connector=connector,
                language={"preset": language, **own},
                image={"kind": "pad"},
                template=template,
            )
    for name, (language, template) in _IMP.items():
        MODELS.register(
            f"imp_{name}",
            vision=SIGLIP,
            connector={"preset": "mlp2x_gelu"},
            language={"preset": language},
            template=template,
        )
    for name, (language, template, scale) in _MIPHA.items():
        MODELS.register(
            f"mipha_{name}",
            vision=SIGLIP,
            connector={"preset": "mlp2x_gelu", "output_multiplier": scale},
            language={"preset": language},
            image={"kind": "pad"},
            template=template,
        )
    MODELS.register(
        "llava_phi_3b",
        vision=CLIP,
        connector={"preset": "mlp2x_gelu"},
        language={"preset": "phi_2"},
        image={"kind": "pad"},
        template="vicuna_v1_endoftext",
    )
    # FreedomIntelligence/ALLaVA-3B and -Longer, which is trained for twice as long; ALLaVA-StableLM2-1_6B.
    for name, language, own in (("3b", "phi_2", {"lm_head_bias": False}), ("stablelm_2", "stablelm_2_1_6b", {})):
        MODELS.register(
            f"allava_{name}",
            vision=CLIP,
            connector={"preset": "mlp2x_gelu"},
            language={"preset": language, **own},
            image={"kind": "pad"},
            template="allava",
        )
    for name, (language, own) in _MOE_LLAVA.items():
        for tower, ending in ((CLIP, ""), (SIGLIP, "_384"))[: 1 if name == "qwen_1_8b" else 2]:
            MODELS.register(
                f"moe_llava_{name}_4e{ending}",
                vision=tower,
                connector={"preset": "mlp2x_gelu", "drop_first_feature": tower is SIGLIP},
                language={"preset": language, **own, "num_moe_experts": 4, "moe_layer_freq": 2},
                image={"kind": "pad"},
                template="vicuna_v1_endoftext",
            )
