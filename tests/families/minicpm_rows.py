"""The rows of MiniCPM-V in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from minicpm_v_models import MINICPM_V, MiniCPMLlama3V25, MiniCPMV1, MiniCPMV2, SlicedSource
from whole import ALL, Lack, Published, Stage, WholeFamily

_ANSWERS = Lack("Transformers has no class for it: answers are held against the written-out one, in `source`")
_BUILT = Lack("no class to build: the counts are those of the published tensors (model.safetensors.index.json)")
_STAGE = Stage(ALL, 1e-6, 10_000, 16, 2048, 288, warmup=100, decay=0.1, adam=(0.9, 0.95, 1e-8, 1))


def minicpm_rows(header: str, targets: tuple[str, ...], planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the rows; arguments are what rows share: ``headers``, ``lora``, ``planner``."""
    # What fills up the smaller slices of a micro-batch in front of the queries is not known to the planner.
    sliced = {**planner, "operations": 0.01}
    return {
        "minicpm_v": WholeFamily(
            checkpoints=("minicpm_v",),
            template="minicpm",
            image={"kind": "squash", "resample": "bicubic"},
            source=SlicedSource(MiniCPMV1),
            uneven=Lack("its tower has 16 heads; see minicpm_llama3_v_2_5, whose tower has three there"),
            others=Lack("it is published with one tower and one language model"),
            answers=_ANSWERS,
            lora=targets,
            presets={"minicpm_v": Published(3_434_965_792, refused={8: "36 is not divisible by"})},
            built=Lack("no class to build, and its files were not at hand: the count is that of 2.0"),
            recipes={"minicpm_v/sft": replace(_STAGE, tokens=64)},
            headers=header,
            planner=planner,
        ),
        "minicpm_v_2": WholeFamily(
            checkpoints=tuple(name for name, (family, _) in MINICPM_V.items() if family == "minicpm_v_2"),
            template="minicpm",
            image={"kind": "slices", "max_tiles": 9, "slice_markup": "nested"},
            source=SlicedSource(MiniCPMV2),
            uneven=Lack("its tower has 16 heads; see minicpm_llama3_v_2_5, whose tower has three there"),
            others=Lack("it is published with one tower and one language model; tied: test_minicpm_v.py"),
            answers=_ANSWERS,
            lora=targets,
            presets={"minicpm_v_2": Published(3_434_965_792, refused={8: "36 is not divisible by"})},
            built=_BUILT,
            recipes={"minicpm_v_2/sft": replace(_STAGE, tokens=192)},
            headers=header,
            planner=sliced,
        ),
        "minicpm_llama3_v_2_5": WholeFamily(
            checkpoints=tuple(name for name, (family, _) in MINICPM_V.items() if family == "minicpm_llama3_v_2_5"),
            template="minicpm_llama_3",
            image={"kind": "slices", "max_tiles": 9, "slice_markup": "nested"},
            source=SlicedSource(MiniCPMLlama3V25),
            uneven=SlicedSource(lambda: MiniCPMLlama3V25(heads=3, inner=75)),
            others=Lack("it is published with one tower and one language model"),
            answers=_ANSWERS,
            lora=targets,
            presets={"minicpm_llama3_v_2_5": Published(8_537_092_336)},
            built=_BUILT,
            recipes={"minicpm_llama3_v_2_5/sft": _STAGE},
            headers=header,
            planner=sliced,
        ),
    }  # fmt: skip
