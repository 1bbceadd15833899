"""The rows of DeepSeek-VL in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from deepseek_models import DEEPSEEK_FILES, HYBRID_FILES, deepseek_answers, deepseek_hybrid, deepseek_vl
from family_cases import _TEXT
from transformers import LlamaConfig
from whole import ALL, Published, Stage, WholeFamily, layout_of
from whole_source import TransformersSource

FITTED = {"kind": "fit", "fill": "mean", "min_side": 14, "resample": "bicubic"}


def deepseek_rows(
    built: Callable[[str], Any], header: str, targets: tuple[str, ...], planner: Mapping[str, float]
) -> dict[str, WholeFamily]:
    """Return the rows; arguments are what rows share: what builds a class, ``headers``, ``lora``, ``planner``."""
    odd = {"num_attention_heads": 3, "intermediate_size": 75}
    return {
        "deepseek_vl": WholeFamily(
            checkpoints=("deepseek_vl", "deepseek_vl_tied", "deepseek_vl_hub"),
            template="checkpoint",
            image=FITTED,
            source=TransformersSource("deepseek_vl", deepseek_vl, files=DEEPSEEK_FILES),
            uneven=TransformersSource(
                "deepseek_vl",
                lambda: deepseek_vl(LlamaConfig(**{**_TEXT, "num_key_value_heads": 1}), **odd),
                files=DEEPSEEK_FILES,
            ),
            others={"tied": TransformersSource("deepseek_vl", partial(deepseek_vl, tied=True), files=DEEPSEEK_FILES)},
            answers=deepseek_answers,
            lora=targets,
            # deepseek-community/deepseek-vl-1.3b-{base,chat}, without the pooling head of the authors' files.
            presets={"deepseek_vl_1_3b": Published("1.96B")},
            built=built("deepseek_vl"),
            recipes={
                "deepseek_vl_1_3b/align": Stage(
                    ("connector",), 1e-3, 15_000, 256, 2048, 576, warmup=128, adam=(0.9, 0.95, 1e-8, 1)
                ),
                "deepseek_vl_1_3b/sft": Stage(
                    ALL, 2e-5, 10_000, 256, 4096, 576, "deepseek_vl_1_3b/align", 256, adam=(0.9, 0.95, 1e-8, 1)
                ),
            },
            headers=header,
            planner=planner,
        ),
        "deepseek_vl_hybrid": WholeFamily(
            checkpoints=("deepseek_vl_hybrid", "deepseek_vl_hybrid_tied"),
            template="checkpoint",
            image={**FITTED, "kind": "fit_pair"},
            source=TransformersSource("deepseek_vl_hybrid", deepseek_hybrid, files=HYBRID_FILES),
            uneven=TransformersSource(
                "deepseek_vl_hybrid",
                lambda: deepseek_hybrid(LlamaConfig(**{**_TEXT, "num_key_value_heads": 1}), **odd),
                files=HYBRID_FILES,
            ),
            others={
                "tied": TransformersSource(
                    "deepseek_vl_hybrid", partial(deepseek_hybrid, tied=True), files=HYBRID_FILES
                )
            },
            answers=partial(deepseek_answers, make=deepseek_hybrid, processor="DeepseekVLHybridProcessor"),
            lora=targets,
            # deepseek-community/deepseek-vl-7b-{base,chat}, without the pooling head of the authors' files.
            presets={"deepseek_vl_7b": Published("7.33B")},
            built=built("deepseek_vl_hybrid"),
            recipes={
                "deepseek_vl_7b/align": Stage(
                    ("connector",), 1e-3, 15_000, 256, 2048, 576, warmup=128, adam=(0.9, 0.95, 1e-8, 1)
                ),
                "deepseek_vl_7b/sft": Stage(
                    ALL, 2e-5, 10_000, 256, 4096, 576, "deepseek_vl_7b/align", 256, adam=(0.9, 0.95, 1e-8, 1)
                ),
            },
            headers=header,
            planner=planner,
        ),
        "deepseek_vl_original": layout_of(
            "deepseek_vl", ("deepseek_vl_original",), image=FITTED,
            template="deepseek",
        ),
    }  # fmt: skip
