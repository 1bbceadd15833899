"""The row of MiniGemini in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minigemini_models import MINIGEMINI, MiniGeminiSource
from spliced_rows import BY_LANGUAGE, COUNTED, NO_CLASS, staged
from whole import Published, Stage, WholeFamily

# 1.2M captions and 1.5M instructions (arXiv 2403.18814, section 4.1), one epoch each.
_ALIGN = Stage(("connector",), 1e-3, 4687, 256, 2048, 576, template="llava_plain")
_SFT = Stage(("connector", "language"), 2e-5, 11_718, 128, 2048, 576)
_TWICE: dict[str, Any] = {"lr": 1e-5, "connector": 2.0}
_STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "2b": ({"template": None}, {}),
    "7b": ({}, {}),
    "13b": ({}, {}),
    "8b": ({"template": None}, {}),
    "34b": ({"template": "llava_plain_no_bos"}, _TWICE),
    "8x7b": ({}, _TWICE),
}
"""What of the two stages is another than Vicuna's."""


def minigemini_rows(header: str, llama: tuple[str, ...], planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the row; arguments are what rows share: ``headers``, ``lora``, ``planner``."""
    recipes: dict[str, Stage] = {}
    for size, (first, second) in _STAGES.items():
        stages = replace(_ALIGN, **first), replace(_SFT, **second)
        recipes |= staged(f"minigemini_{size}", ("pretrain", "sft"), stages)
        if size != "2b":
            large = replace(stages[1], length=4096, tokens=2880, after=f"minigemini_{size}/pretrain")
            recipes[f"minigemini_{size}_hd/sft"] = large
    odd: dict[str, Any] = {"vision_keys": {"num_attention_heads": 3, "intermediate_size": 75}}
    return {
        "minigemini": WholeFamily(
            checkpoints=tuple(MINIGEMINI),
            template=BY_LANGUAGE,
            image={"kind": "pad", "resample": "bicubic"},
            source=MiniGeminiSource(hd=True),
            uneven=MiniGeminiSource(text_keys={"num_key_value_heads": 1}, **odd),
            others={
                "one rendering each": MiniGeminiSource(),
                "gemma, features multiplied": MiniGeminiSource("gemma"),
                "mixtral": MiniGeminiSource("mixtral"),
            },
            answers=NO_CLASS,
            lora=llama,
            presets={
                f"minigemini_{size}{name}": Published(count)
                for size, count in COUNTS.items()
                for name in (("", "_hd") if size != "2b" else ("",))
            },
            built=COUNTED,
            recipes=recipes,
            headers=header,
            planner=planner,
        ),
    }


COUNTS = {
    "2b": 3_006_567_872, "7b": 7_253_495_232, "13b": 13_541_431_744, "8b": 8_545_340_864, "34b": 34_941_751_744,
    "8x7b": 47_217_872_320,
}  # fmt: skip
"""Of the parts' classes, by test_minigemini.py; layers behind the features, and ConvNeXt's head, are not built."""
