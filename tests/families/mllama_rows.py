"""The row of Llama 3.2 Vision in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllama_models import MllamaSource
from whole import ALL, Lack, Published, Stage, WholeFamily


def mllama_rows(built: Any, header: str, planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the row; arguments are what rows share: what builds the class, ``headers``, ``planner``."""
    same, adam = (5190, 2, 2048, 1), (0.9, 0.95, 1e-5, 1.0)
    return {
        "mllama": WholeFamily(
            checkpoints=("mllama", "mllama_other_names"),
            template="mllama",
            image={"kind": "canvas_tiles", "resample": "bilinear"},
            source=MllamaSource(),
            uneven=MllamaSource(vision={"attention_heads": 5, "intermediate_size": 75}),
            others=Lack("it is published with one tower, in two sizes of language model"),
            answers=Lack("convert check is not tried on it: no tokenizer of its kind here; answers are in `source`"),
            # By their ends, of attention to text and of attention to pictures.
            lora=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            # meta-llama/Llama-3.2-{11B,90B}-Vision-Instruct.
            presets={
                "llama3_2_vision_11b": Published(10_670_220_835),
                "llama3_2_vision_90b": Published("88.6B"),
            },
            built=built,
            # NeMo's, as its authors published none.
            recipes={
                "llama3_2_vision_11b/sft": Stage(ALL, 2e-5, *same, warmup=150, decay=0.1, least=2e-7, adam=adam),
                "llama3_2_vision_11b/lora": Stage(
                    ("language",), 1e-4, *same, warmup=150, decay=0.1, least=2e-7, adam=adam, lora=(8, 32)
                ),
            },
            headers=header,
            # Every token is taken to see one picture.
            planner={**planner, "operations": 0.05},
        )
    }  # fmt: skip
