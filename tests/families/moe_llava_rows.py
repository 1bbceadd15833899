"""The row of MoE-LLaVA in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llava_like_models import EPOCH, LlavaLike
from moe_llava_models import EXPERTS, MOE_LLAVA, SOURCES, DeepspeedMoE, QwenText
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PhiConfig,
    PhiForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    StableLmConfig,
    StableLmForCausalLM,
)
from whole import Lack, Published, Stage, WholeFamily

from megavlm.config.schema import ModelConfig
from megavlm.families.known import FAMILIES
from megavlm.families.public_towers import TOWERS

_COUNTS = {
    "moe_llava_stablelm_1_6b_4e": 3_200_124_928, "moe_llava_stablelm_1_6b_4e_384": 3_325_105_216,
    "moe_llava_qwen_1_8b_4e": 3_364_126_720,
    "moe_llava_phi2_2_7b_4e": 5_609_680_896, "moe_llava_phi2_2_7b_4e_384": 5_734_726_720,
}  # fmt: skip
"""Parameters in the shape of the public checkpoint; from the definition."""
_FIRST = Stage(("connector",), 1e-3, 558_000 // 256, 256, 2048, 576, template="llava_plain_no_bos")


def _stages(preset: str) -> dict[str, Stage]:
    tokens = 728 if preset.endswith("384") else 576
    second = Stage(("connector", "language"), 2e-5, 964_000 // 128, 128, 2048, tokens, f"{preset}/pretrain")
    # It begins with what `megavlm upcycle` makes of stage 2.
    third = Stage(("language",), 2e-5, 665_000 // 128, 128, 2048, tokens)
    first = replace(_FIRST, tokens=tokens)
    return {f"{preset}/pretrain": first, f"{preset}/sft": second, f"{preset}/moe": third}


def _built(model: ModelConfig) -> tuple[nn.Module, list[nn.Module]]:
    """Return a preset's model in the shape of its public checkpoint, and what of it is not built here."""
    tree = FAMILIES["moe_llava"].config(model, {})
    back: dict[str, Any] = {theirs: ours for ours, theirs in EPOCH.items()}
    own = {back.get(key, key): value for key, value in tree.items() if key not in ("vision_config.json", "model_type")}
    if tree["model_type"] == "moe_llava_phi":
        text: Any = PhiForCausalLM(PhiConfig(**own))
        text.lm_head.bias = None
    elif tree["model_type"] == "moe_llava_qwen":
        text = QwenText(own)
    else:
        text = StableLmForCausalLM(StableLmConfig(**own))
    for layer in tree["moe"]["moe_layers_idx"]:
        text.model.layers[layer].mlp = DeepspeedMoE(text.model.layers[layer].mlp, own["hidden_size"], EXPERTS, layer)
    clip = bool(model.vision.class_token)
    shape = TOWERS["openai/clip-vit-large-patch14-336" if clip else "google/siglip-so400m-patch14-384"]
    keys = {key: value for key, value in shape.items() if key != "model_type"}
    tower: Any = CLIPVisionModel(CLIPVisionConfig(**keys)) if clip else SiglipVisionModel(SiglipVisionConfig(**keys))
    head = [tower.head] if hasattr(tower, "head") else []
    one = LlavaLike(text, tower, {"model_type": "moe_llava"})
    return one, [tower.post_layernorm, *tower.encoder.layers[model.vision.num_layers :], *head]


def moe_llava_rows(header: str, targets: tuple[str, ...], planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the row; arguments are what rows share."""
    row = WholeFamily(
        checkpoints=tuple(MOE_LLAVA),
        template=Lack("without a tokenizer; with one: test_moe_llava.py"),
        image={"kind": "pad"},
        source=SOURCES["stablelm"],
        uneven=Lack("one mechanism with bunny, whose tower has three heads there"),
        # Phi, whose experts have biases and are not cut: at one process and two stages, test_moe_llava.py.
        others={"siglip": SOURCES["siglip"], "qwen": SOURCES["qwen"]},
        answers=Lack("convert check cannot run: Transformers has no class for it; answers: `source`"),
        lora=targets,
        presets={
            name: Published(count, refused=dict.fromkeys((2, 4, 8), "experts with biases") if "phi2" in name else {})
            for name, count in _COUNTS.items()
        },
        built=_built,
        recipes={name: stage for preset in _COUNTS for name, stage in _stages(preset).items()},
        headers=header,
        planner=planner,
    )
    return {"moe_llava": row}
