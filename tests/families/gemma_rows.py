"""The rows of PaliGemma and Gemma 3 in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemma_models import (
    GEMMA3_FILES,
    PALIGEMMA_FILES,
    PictureSource,
    PrefixSource,
    gemma3,
    gemma3_answers,
    paligemma,
    paligemma_answers,
)
from whole import ALL, Lack, Published, Stage, WholeFamily

_SFT = Stage(ALL, 5e-5, 50, 32, 4096, 256, warmup=10, decay=0.033, least=5e-6, adam=(0.9, 0.95, 1e-8, 1))
_LORA = replace(_SFT, trains=("language",), lr=2e-4, least=2e-5, lora=(32, 32))


def gemma_rows(
    paligemma_class: Any, gemma3_class: Any, header: str, targets: tuple[str, ...], planner: Mapping[str, float]
) -> dict[str, WholeFamily]:
    """Return the rows; arguments are what rows share: what builds the classes, ``headers``, ``lora``, ``planner``."""
    return {
        "paligemma": WholeFamily(
            checkpoints=("paligemma", "paligemma_hub"),
            template="paligemma",
            image={"kind": "squash"},
            source=PrefixSource("paligemma", paligemma, files=PALIGEMMA_FILES),
            uneven=PrefixSource(
                "paligemma",
                lambda: paligemma({"num_key_value_heads": 1}, {"num_attention_heads": 5, "intermediate_size": 75}),
                files=PALIGEMMA_FILES,
            ),
            others=Lack("it is published with one tower and one language model, in three sizes of pictures"),
            answers=paligemma_answers,
            lora=targets,
            # google/paligemma-3b-{pt,mix}-{224,448,896}.
            presets={
                "paligemma_3b_224": Published(2_923_466_480),
                "paligemma_3b_448": Published(2_924_351_216),
                "paligemma_3b_896": Published(2_927_890_160),
            },
            built=paligemma_class,
            recipes={
                f"paligemma_3b_{size}/transfer": Stage(ALL, 1e-5, 468, 32, 128 + tokens, tokens, warmup=23, decay=0.03)
                for size, tokens in ((224, 256), (448, 1024), (896, 4096))
            },
            headers=header,
            # What of a sample is answer is not known to the planner.
            planner={**planner, "operations": 0.05},
        ),
        "gemma3": WholeFamily(
            checkpoints=("gemma3", "gemma3_hub"),
            template="gemma3",
            image={"kind": "squash", "resample": "bilinear"},
            source=PictureSource("gemma3", gemma3, files=GEMMA3_FILES),
            uneven=PictureSource(
                "gemma3",
                lambda: gemma3({"num_key_value_heads": 1}, {"num_attention_heads": 5, "intermediate_size": 75}),
                files=GEMMA3_FILES,
            ),
            others={"16 tokens, a longer window": PictureSource(
                "gemma3", lambda: gemma3({"sliding_window": 24}, tokens=16), files=GEMMA3_FILES
            )},
            answers=gemma3_answers,
            lora=targets,
            # google/gemma-3-{4b,12b,27b}-it.
            presets={
                "gemma3_4b": Published(4_300_079_472),
                "gemma3_12b": Published(12_187_325_040),
                "gemma3_27b": Published(27_432_406_640),
            },
            built=gemma3_class,
            recipes={
                f"gemma3_{size}/{stage}": one
                for size in ("4b", "12b", "27b")
                for stage, one in (("sft", _SFT), ("lora", _LORA))
            },
            headers=header,
            # What pictures see of themselves, and masks, are not known to the planner.
            planner={**planner, "operations": 0.05, "activations": 0.1},
        ),
    }  # fmt: skip
