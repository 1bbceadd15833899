"""The rows of Idefics3 and SmolVLM in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from family_cases import _TEXT
from idefics3_models import TilesSource, idefics3, idefics3_answers, idefics3_files
from transformers import LlamaConfig
from whole import Lack, Published, Stage, WholeFamily

_SPLIT = {"kind": "split_tiles", "longest_edge": 56, "image_splitting": True, "resample": "lanczos"}
HEADS = "is not divisible by parallel.tensor_model_parallel_size"


def idefics3_rows(
    built: Callable[[str], Any], header: str, targets: tuple[str, ...], planner: Mapping[str, float]
) -> dict[str, WholeFamily]:
    """Return the rows; arguments are what rows share: what builds a class, ``headers``, ``lora``, ``planner``."""
    odd = {"num_attention_heads": 3, "intermediate_size": 75}
    sft = partial(Stage, ("connector", "language"), 1e-4, 670, 16, warmup=50, decay=0.01)
    smol = partial(TilesSource, "smolvlm", files=idefics3_files("SmolVLM"))
    return {
        "idefics3": WholeFamily(
            checkpoints=("idefics3", "idefics3_tied", "idefics3_hub"),
            template="idefics3",
            image=_SPLIT,
            source=TilesSource("idefics3", idefics3, files=idefics3_files()),
            uneven=TilesSource(
                "idefics3",
                lambda: idefics3(LlamaConfig(**{**_TEXT, "num_key_value_heads": 1}), **odd),
                files=idefics3_files(),
            ),
            others={
                "tied, one token a tile": TilesSource(
                    "idefics3", partial(idefics3, tied=True, factor=4), files=idefics3_files()
                ),
            },
            answers=idefics3_answers,
            lora=targets,
            # HuggingFaceM4/Idefics3-8B-Llama3.
            presets={"idefics3_8b_llama3": Published("8.46B")},
            built=built("idefics3"),
            # 640 x 480 becomes 4 x 3 tiles and the whole picture.
            recipes={"idefics3_8b_llama3/sft": sft(4096, 13 * 169)},
            headers=header,
            planner=planner,
        ),
        "smolvlm": WholeFamily(
            checkpoints=("smolvlm",),
            template="smolvlm",
            image=_SPLIT,
            source=smol(partial(idefics3, kind="SmolVLM")),
            uneven=Lack("see idefics3, whose parts these are"),
            others=Lack("see idefics3, whose parts these are"),
            # Its processor needs num2words and torchvision: where they are not, pixels and ids are not compared.
            answers=partial(idefics3_answers, kind="SmolVLM", begin="<|im_start|>"),
            lora=targets,
            # HuggingFaceTB/SmolVLM-{256M,500M,}-Instruct, SmolVLM2-{256M,500M,2.2B}-Video-Instruct.
            presets={
                "smolvlm_256m": Published(
                    256_484_928, refused={size: f"9 {HEADS} ({size})" for size in (2, 4, 8)}
                ),
                "smolvlm_500m": Published(
                    507_482_304, refused={size: f"15 {HEADS} ({size})" for size in (2, 4, 8)}
                ),
                "smolvlm_2_2b": Published(2_246_272_880),
            },
            built=built("smolvlm"),
            recipes={
                "smolvlm_256m/sft": sft(4096, 13 * 64),
                "smolvlm_500m/sft": sft(4096, 13 * 64),
                "smolvlm_2_2b/sft": sft(4096, 13 * 81),
            },
            headers=header,
            planner=planner,
        ),
    }  # fmt: skip
