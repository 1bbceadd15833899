"""The rows of Bunny, Imp, Mipha, LLaVA-Phi and ALLaVA in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_like_models import LLAVA_LIKE, LikeSource, bunny, like_answers, like_of, sources
from whole import Lack, Published, WholeFamily

PHI_TARGETS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
_COUNTS = {
    "bunny": {
        "bunny_phi_1_5": "1.83B", "bunny_phi_2": "3.18B", "bunny_stablelm_2": "2.06B", "bunny_qwen1_5_1_8b": "2.26B",
        "bunny_minicpm": "3.16B", "bunny_phi_3": "4.25B", "bunny_llama_3_8b": "8.48B", "bunny_v1_1_phi_3": "4.26B",
        "bunny_v1_1_llama_3_8b": "8.49B",
    },
    "imp": {"imp_v1_3b": "3.19B", "imp_v1_5_3b": "3.19B", "imp_v1_5_2b": "2.26B", "imp_v1_5_4b": "4.25B"},
    "mipha": {"mipha_1_6b": "1.84B", "mipha_2_4b": "2.94B", "mipha_3b": "3.19B"},
    "llava_phi": {"llava_phi_3b": "3.09B"},
    "allava": {"allava_3b": "3.09B", "allava_stablelm_2": "1.95B"},
}  # fmt: skip
"""Parameters of each preset, in its public checkpoint's shape; from the definition, and unchecked."""
_HEADS = {4: "36 is not divisible by parallel.tensor_model_parallel_size"}


def like_rows(header: str, planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the rows; arguments are what rows share."""
    return {
        family: _row(family, header, planner, **own)
        for family, own in {
            "bunny": {"template": "vicuna_v1_endoftext", "image": {"kind": "pad"}},
            "imp": {"template": "imp_qwen2", "image": {"kind": "squash"}},
            "mipha": {"template": "vicuna_v1_endoftext", "image": {"kind": "pad"}},
            "llava_phi": {"template": "vicuna_v1_endoftext", "image": {"kind": "pad"}},
            "allava": {"template": "allava", "image": {"kind": "pad"}},
        }.items()
    }


def _row(
    family: str, header: str, planner: Mapping[str, float], template: str, image: Mapping[str, Any]
) -> WholeFamily:
    found = sources(family)
    first = next(iter(found))
    mechanism = "one mechanism with bunny: see there; each combination at one process: test_llava_like.py"
    whole = family == "bunny"
    return WholeFamily(
        checkpoints=tuple(name for name, (its, _) in LLAVA_LIKE.items() if its == family),
        template=Lack("without a tokenizer; each combination's: test_llava_like.py")
        if family in ("mipha", "llava_phi")
        else template,
        image=image,
        source=found[first],
        uneven=LikeSource(family, lambda: bunny("phi", "bunny-phi", "BunnyPhiForCausalLM", num_attention_heads=3))
        if whole else Lack(mechanism),
        others={"minicpm, features multiplied": found["bunny_minicpm"], "phi-3, S2": found["bunny_phi3_s2"]}
        if whole else Lack(mechanism),
        answers=Lack("Transformers' LLaVA has no place for the head's bias: convert check cannot run; answers: `source`")
        if family in ("mipha", "llava_phi")
        else lambda path: like_answers({"imp": "imp_qwen2", "bunny": "bunny_phi"}.get(family, family), path),
        lora=PHI_TARGETS if whole else Lack(mechanism),
        presets={
            name: Published(count, refused={8: "36"} if name == "bunny_minicpm" else {})
            for name, count in _COUNTS[family].items()
        },
        built=lambda model: like_of(family, model),
        recipes=Lack("placeholder placeholder placeholder"),
        headers=Lack("placeholder placeholder placeholder"),
        planner=planner,
    )  # fmt: skip
