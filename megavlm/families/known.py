"""The families of this package, and which of all that are registered a checkpoint is of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megavlm.config.errors import UserError
from megavlm.families.registry import FAMILIES

if TYPE_CHECKING:
    from megavlm.families.family import Family
    from megavlm.weights.source import Source

__all__ = ["FAMILIES", "detect", "register", "scattered"]

_OURS = (
    "megavlm.families.projector:ProjectorFamily",
    "megavlm.families.qwen:QwenVLFamily",
    "megavlm.families.qwen:CodeFuseFamily",
    "megavlm.families.vary:VaryFamily",
    "megavlm.families.llava:LlavaFamily",
    "megavlm.families.llava_next:LlavaNextFamily",
    "megavlm.families.llava_next:LlavaOnevisionFamily",
    "megavlm.families.internvl:InternVLFamily",
    "megavlm.families.internvl:InternVLChatFamily",
    "megavlm.families.qwen2_vl:Qwen2VLFamily",
    "megavlm.families.qwen2_vl:Qwen25VLFamily",
    "megavlm.families.qwen3_vl:Qwen3VLFamily",
    "megavlm.families.qwen3_vl:Qwen3VLMoeFamily",
    "megavlm.families.glm4v:Glm4vFamily",
    "megavlm.families.glm4v:Glm4vMoeFamily",
    "megavlm.families.llava_onevision1_5:LlavaOnevision15Family",
    "megavlm.families.minicpm_v:MiniCPMV1Family",
    "megavlm.families.minicpm_v:MiniCPMV2Family",
    "megavlm.families.minicpm_v:MiniCPMLlama3V25Family",
    "megavlm.families.paligemma:PaliGemmaFamily",
    "megavlm.families.blip2:Blip2Family",
    "megavlm.families.tinygpt_v:TinyGPTVFamily",
    "megavlm.families.minigpt:MiniGPT4Family",
    "megavlm.families.minigpt:MiniGPTv2Family",
    "megavlm.families.cobra:CobraFamily",
    "megavlm.families.gemma3_vl:Gemma3Family",
    "megavlm.families.mllama:MllamaFamily",
    "megavlm.families.deepseek_vl:DeepseekVLFamily",
    "megavlm.families.deepseek_vl:DeepseekVLOriginalFamily",
    "megavlm.families.deepseek_vl_hybrid:DeepseekVLHybridFamily",
    "megavlm.families.cogvlm:CogVLMFamily",
    "megavlm.families.chameleon:ChameleonFamily",
    "megavlm.families.cogagent:CogAgentFamily",
    "megavlm.families.idefics3:Idefics3Family",
    "megavlm.families.idefics3:SmolVLMFamily",
    "megavlm.families.tinyllava:TinyLlavaFamily",
    "megavlm.families.xtuner:HPTFamily",
    "megavlm.families.xtuner:XtunerFamily",
    "megavlm.families.intern_vit:InternViTFamily",
    "megavlm.families.llava_connectors:MobileVLMFamily",
    "megavlm.families.llava_connectors:DenseConnectorFamily",
    "megavlm.families.minigemini:MiniGeminiFamily",
    "megavlm.families.llava_original:LlavaOriginalFamily",
    "megavlm.families.llava_original:LlavaApartFamily",
    "megavlm.families.llava_like:BunnyFamily",
    "megavlm.families.llava_like:ImpFamily",
    "megavlm.families.llava_like:MiphaFamily",
    "megavlm.families.llava_like:LlavaPhiFamily",
    "megavlm.families.llava_like:AllavaFamily",
    "megavlm.families.moe_llava:MoeLlavaFamily",
    "megavlm.families.qwen:QwenFamily",
    "megavlm.families.llama:LlamaFamily",
    "megavlm.families.phi:PhiFamily",
    "megavlm.families.phi:Phi3Family",
    "megavlm.families.gemma:GemmaFamily",
    "megavlm.families.gemma3:Gemma3TextFamily",
    "megavlm.families.glm4:Glm4Family",
    "megavlm.families.glm4_moe:Glm4MoeFamily",
    "megavlm.families.deepseek_v2:DeepseekV2Family",
    "megavlm.families.stablelm:StableLMFamily",
    "megavlm.families.experts:Qwen3MoeFamily",
    "megavlm.families.experts:MixtralFamily",
    "megavlm.families.internlm2:InternLM2Family",
    "megavlm.families.minicpm:MiniCPMFamily",
    "megavlm.families.mamba:MambaFamily",
    "megavlm.families.t5:T5Family",
    "megavlm.families.vit:ClipFamily",
    "megavlm.families.vit:SiglipFamily",
    "megavlm.families.siglip2:Siglip2Family",
    "megavlm.families.dinov2:Dinov2Family",
    "megavlm.families.eva02:Eva02Family",
    "megavlm.families.qwen:QwenTowerFamily",
)
"""One line each, in the order in which they are asked whether a checkpoint is theirs."""


def register() -> None:
    """Register the families of this package."""
    for place in _OURS:
        FAMILIES.register(place)


def detect(source: Source) -> Family:
    """Return the family of a checkpoint.

    Raises:
        UserError: it is of none.
    """
    for family in FAMILIES.values():
        if family.detect(source):
            return family
    kind = source.config.get("model_type")
    what = (
        f"model_type {kind!r} of its config.json" if kind else "it has no config.json with a model_type, and its names"
    )
    known = "; ".join(f"{family.name} ({family.title})" for family in FAMILIES.values())
    raise UserError(f"{source.path}: {what} belongs to no family that is known here: {known}")


def scattered(directory: Path) -> tuple[Family | None, dict[str, Path]]:
    """Return the family that is published in pieces such as a directory has, and where each part lies."""
    for family in FAMILIES.values():
        parts = family.scattered(directory)
        if parts:
            return family, parts
    return None, {}
