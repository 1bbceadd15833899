"""Whole models of the GLM-V line."""

from __future__ import annotations

from megavlm.config.architecture import MODELS

# zai-org/GLM-4.5V and GLM-4.6V, whose language models are of GLM-4.5-Air's shape: positions, and the base they turn by.
_GLM4V_MOE = {"glm4_5v_106b": (65536, 10000), "glm4_6v_106b": (131072, 500000)}


def register() -> None:
    """Register GLM-4.1V, GLM-4.5V and GLM-4.6V."""
    MODELS.register(
        "glm4_1v_9b",
        vision={"preset": "glm4v_vit_660m"},
        connector={"preset": "downsample_merger"},
        language={"preset": "glm_4_9b", "max_position_embeddings": 65536, "rotary_sections": [8, 12, 12]},
        # As its preprocessor_config.json, which counts two frames: 8 to 6144 tokens.
        image={"kind": "native", "min_pixels": 6272, "max_pixels": 4816896, "enlarge_to_block": True},
        video={"kind": "glm4v"},
        template="glm4v",
    )
    for name, (positions, base) in _GLM4V_MOE.items():
        MODELS.register(
            name,
            vision={"preset": "glm4v_vit_660m"},
            connector={"preset": "downsample_merger", "ffn_hidden_size": 10944},
            language={
                "preset": "glm_4_5_air",
                "max_position_embeddings": positions,
                "rotary_base": base,
                "rotary_sections": [8, 12, 12],
            },
            # As GLM-4.1V's preprocessor_config.json.
            image={"kind": "native", "min_pixels": 6272, "max_pixels": 4816896, "enlarge_to_block": True},
            video={"kind": "none" if name == "glm4_6v_106b" else "glm4v"},  # 4.6V's frames are chosen otherwise
            template="glm4_5v",
        )
