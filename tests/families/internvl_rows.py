"""The row of InternVL in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from internvl_models import internvl, internvl_6b, internvl_answers, internvl_moe, internvl_uneven
from processor_files import TILE_FILES
from whole import ALL, Published, Stage, WholeFamily
from whole_source import ExpertsSource, TransformersSource

from megavlm.config.schema import ModelConfig

HEADS = "is not divisible by parallel.tensor_model_parallel_size"
_OF_USERS = Stage(("connector", "language"), 2e-5, 1000, 128, 16384, 3328, decay=0.05)
_SFT_3_5 = Stage(ALL, 8e-5, 8000, 512, 32768, 3328, decay=0.05)


def _internvl2_5(size: str, lr: float, decay: float, steps: int) -> dict[str, Stage]:
    first = Stage(("connector",), 2e-4, 100_000, 512, 16384, 3328, warmup=100, decay=decay)
    second = Stage(ALL, lr, steps, 512, 16384, 3328, decay=decay)
    one, two = f"internvl2_5_{size}/stage1", f"internvl2_5_{size}/stage2"
    return {one: first, two: replace(second, after=one)}


def internvl_rows(
    built: Callable[[ModelConfig], Any], header: str, targets: tuple[str, ...], planner: Mapping[str, float]
) -> dict[str, WholeFamily]:
    """Return the row; arguments are what rows share: what builds a class, ``headers``, ``lora``, ``planner``."""
    return {
        "internvl": WholeFamily(
            checkpoints=("internvl", "internvl_6b", "internvl_modules", "internvl_moe"),
            template="internvl2_5",
            image={"kind": "dynamic_tiles", "min_tiles": 1, "max_tiles": 6, "thumbnail": True},
            source=TransformersSource("internvl", internvl_6b, files=TILE_FILES),
            uneven=TransformersSource("internvl", internvl_uneven, files=TILE_FILES),
            others={
                "300m, tied": TransformersSource("internvl", partial(internvl, tied=True), files=TILE_FILES),
                "300m, qwen2": TransformersSource("internvl", internvl, files=TILE_FILES),
                "300m, qwen3_moe": ExpertsSource("internvl", internvl_moe, files=TILE_FILES),
            },
            answers=internvl_answers,
            lora=targets,
            # OpenGVLab/InternVL2_5-1B, InternVL3-1B, .., InternVL3.5.
            presets={
                "internvl2_5_1b": Published(938_193_024, refused={4: f"14 {HEADS} (4)", 8: f"14 {HEADS} (8)"}),
                "internvl2_5_4b": Published(3_712_637_952),
                "internvl2_5_38b": Published(38_388_164_992),
                "internvl2_5_78b": Published(78_408_318_336),
                "internvl3_1b": Published(938_193_024, refused={4: f"14 {HEADS} (4)", 8: f"14 {HEADS} (8)"}),
                "internvl3_2b": Published(2_088_957_440, refused={8: f"12 {HEADS} (8)"}),
                "internvl3_8b": Published(7_944_373_760, refused={8: f"28 {HEADS} (8)"}),
                "internvl3_14b": Published("15.12B"),
                "internvl3_38b": Published(38_388_164_992),
                "internvl3_78b": Published(78_408_318_336),
                "internvl3_5_1b": Published(1_060_897_792),
                "internvl3_5_2b": Published("2.35B"),
                "internvl3_5_4b": Published("4.73B"),
                "internvl3_5_8b": Published(8_528_318_464),
                "internvl3_5_14b": Published("15.12B"),
                "internvl3_5_38b": Published("38.4B"),
                "internvl3_5_30b_a3b": Published("30.8B"),
                "internvl3_5_241b_a28b": Published("240.7B"),
            },
            built=built,
            recipes={
                **_internvl2_5("1b", 4e-5, 0.01, 22_000),
                **_internvl2_5("4b", 4e-5, 0.01, 11_000),
                **_internvl2_5("38b", 2e-5, 0.05, 5500),
                **_internvl2_5("78b", 2e-5, 0.05, 5500),
                **{f"internvl3_{size}/sft": _OF_USERS for size in ("2b", "8b", "14b", "38b", "78b")},
                "internvl3_1b/sft": replace(_OF_USERS, lr=1e-5),
                **{f"internvl3_5_{size}/sft": _SFT_3_5 for size in ("1b", "2b", "4b", "8b", "14b", "38b")},
                "internvl3_5_30b_a3b/sft": _SFT_3_5,
                "internvl3_5_241b_a28b/sft": replace(_SFT_3_5, lr=2e-5),
            },
            headers=header,
            planner=planner,
        ),
    }
