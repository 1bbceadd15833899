"""The families. Another is one class with its tables and one entry here."""

from __future__ import annotations

from megavlm.config.errors import UserError
from megavlm.families.family import Family
from megavlm.families.llama import LlamaFamily
from megavlm.families.llava import LlavaFamily
from megavlm.families.llava_original import LlavaApartFamily, LlavaOriginalFamily
from megavlm.families.projector import ProjectorFamily
from megavlm.families.qwen import CodeFuseFamily, QwenFamily, QwenTowerFamily, QwenVLFamily
from megavlm.families.vit import ClipFamily, SiglipFamily
from megavlm.weights.source import Source

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        ProjectorFamily(),
        QwenVLFamily(),
        CodeFuseFamily(),
        LlavaFamily(),
        LlavaOriginalFamily(),
        LlavaApartFamily(),
        QwenFamily(),
        LlamaFamily(),
        ClipFamily(),
        SiglipFamily(),
        QwenTowerFamily(),
    )
}


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
