"""The families. Another is one class with its tables and one entry here."""

from __future__ import annotations

from megavlm.checkpoint.hf.families.llama import LlamaFamily
from megavlm.checkpoint.hf.families.llava import LlavaFamily
from megavlm.checkpoint.hf.families.qwen import (
    CodeFuseFamily,
    ProjectorFamily,
    QwenFamily,
    QwenTowerFamily,
    QwenVLFamily,
)
from megavlm.checkpoint.hf.families.vit import ClipFamily, SiglipFamily
from megavlm.checkpoint.hf.family import Family
from megavlm.checkpoint.hf.source import Source
from megavlm.config.errors import UserError

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        QwenVLFamily(),
        CodeFuseFamily(),
        LlavaFamily(),
        QwenFamily(),
        LlamaFamily(),
        ClipFamily(),
        SiglipFamily(),
        QwenTowerFamily(),
        ProjectorFamily(),
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
