"""The rows of Bunny, Imp, Mipha, LLaVA-Phi and ALLaVA in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_like_models import LLAVA_LIKE, LikeSource, bunny, like_answers, like_of, sources
from whole import Lack, Published, WholeFamily

PHI_TARGETS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
_COUNTS = {
    "bunny": {
        "bunny_phi_1_5": 1_849_295_936, "bunny_phi_2": 3_212_732_480, "bunny_stablelm_2": 2_079_040_576,
        "bunny_qwen1_5_1_8b": 2_270_424_128, "bunny_minicpm": 3_161_073_728, "bunny_phi_3": 4_261_961_792,
        "bunny_llama_3_8b": 8_479_990_848, "bunny_v1_1_phi_3": 4_269_039_680, "bunny_v1_1_llama_3_8b": 8_489_428_032,
    },
    "imp": {
        "imp_v1_3b": 3_217_417_280, "imp_v1_5_3b": 3_217_417_280, "imp_v1_5_2b": 2_271_611_968,
        "imp_v1_5_4b": 4_262_287_424,
    },
    "mipha": {"mipha_1_6b": 1_853_054_016, "mipha_2_4b": 2_940_955_712, "mipha_3b": 3_217_417_280},
    "llava_phi": {"llava_phi_3b": 3_092_371_456},
    "allava": {"allava_3b": 3_092_320_256, "allava_stablelm_2": 1_954_318_336},
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
