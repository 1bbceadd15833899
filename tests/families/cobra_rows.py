"""The row of Cobra in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping

from cobra_models import COBRA, Cobra, CobraSource
from whole import Lack, Published, Stage, WholeFamily


def cobra_rows(header: str, planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the row; arguments are what rows share: ``headers``, ``planner``."""
    return {
        "cobra": WholeFamily(
            checkpoints=tuple(COBRA),
            template="zephyr",
            image={"kind": "squash_pair", "resample": "bicubic"},
            source=CobraSource(),
            uneven=CobraSource(lambda: Cobra(heads=(3, 1))),
            others=Lack("its code's other towers and projectors are refused by name: test_cobra.py"),
            answers=Lack("Transformers has no class for it: answers are held against the written-out one, in `source`"),
            lora=Lack("Transformers has no class for it, so PEFT has none; Mamba's own adapters: test_cobra.py"),
            presets={"cobra_3b": Published(3_505_650_976)},
            built=Lack("no class to build: counted from its parts, each held against Transformers' class"),
            recipes={
                "cobra_3b/sft": Stage(("connector", "language"), 2e-5, 19_236, 128, 2816, 729, warmup=577, decay=0.1)
            },
            headers=header,
            planner=planner,
        )
    }
