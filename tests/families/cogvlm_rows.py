"""The row of CogVLM in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping

from cogvlm_models import COGVLM, CogSource, CogVLM
from whole import Lack, Published, Stage, WholeFamily

_COUNT = 17_639_685_376
_TABLE = (35**2 - 16**2) * 1792
"""What the tower of 490 pixels has more than that of 224: rows of its table."""
_TRAINS = ("connector", "language")


def _sft(length: int, tokens: int) -> Stage:
    return Stage(
        _TRAINS, 1e-5, 800, 256, length, tokens, warmup=16, decay=0.05, adam=(0.9, 0.95, 1e-8, 0.1)
    )  # fmt: skip


def cogvlm_rows(header: str, planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the row; arguments are what rows share: ``headers``, ``planner``."""
    return {
        "cogvlm": WholeFamily(
            checkpoints=tuple(COGVLM),
            template="cogvlm",
            image={"kind": "squash", "resample": "bicubic"},
            source=CogSource(CogVLM),
            uneven=CogSource(lambda: CogVLM(heads=3, inner=75)),
            others=Lack("it is published with one tower and one language model; other templates: test_cogvlm.py"),
            answers=Lack("Transformers has no class for it: answers are held against the written-out one, in `source`"),
            lora=Lack("adapters stand beside layers of one weight, and each here has two: refused by name"),
            presets={
                "cogvlm_base_224": Published(_COUNT - _TABLE),
                "cogvlm_base_490": Published(_COUNT),
                "cogvlm_chat": Published(_COUNT),
                "cogvlm_grounding_generalist": Published(_COUNT),
            },
            built=Lack("no class to build: the counts are those of the published definition, at published sizes"),
            recipes={"cogvlm_base_490/sft": _sft(1288, 1227), "cogvlm_base_224/sft": _sft(320, 258)},
            headers=header,
            planner=planner,
        )
    }
