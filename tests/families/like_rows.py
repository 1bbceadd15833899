"""The rows of Bunny, Imp, Mipha, LLaVA-Phi and ALLaVA in :mod:`whole_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llava_like_models import LLAVA_LIKE, LikeSource, bunny, like_answers, like_of, sources
from whole import ALL, Lack, Published, Stage, WholeFamily

_COUNTS = {
    "bunny": {
        "bunny_phi_1_5": 1_849_295_936, "bunny_phi_2": 3_212_732_480, "bunny_stablelm_2": 2_079_040_576,
        "bunny_qwen1_5_1_8b": 2_270_424_128, "bunny_minicpm": 3_161_073_728, "bunny_phi_3": 4_261_961_792,
        "bunny_llama_3_8b": 8_479_990_848, "bunny_v1_1_phi_3": 4_269_039_680, "bunny_v1_1_llama_3_8b": 8_489_428_032,
        "bunny_eva_phi_1_5": 1_724_453_824, "bunny_eva_stablelm_2": 1_954_198_464, "bunny_eva_phi_2": 3_087_824_832,
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
_PLAIN = {"minicpm": "llava_plain", "phi_3": "llava_plain", "v1_5_4b": "llava_plain", "2_4b": "llava_plain_gemma",
          "llama_3_8b": "llava_plain_llama_3"}  # fmt: skip
"""Templates of stage 1, where texts begin with a BOS, by language model or size."""
_CAPTIONS = Stage(("connector",), 1e-3, 558_000 // 256, 256, 2048, 729, template="llava_plain_no_bos")
_PHI_TARGETS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
_MIPHA_ADAM = (0.9, 0.98, 1e-7, 1)


def _staged(preset: str, first: Stage, **later: Stage) -> dict[str, Stage]:
    """Return stage 1, and others that start from it."""
    one = f"{preset}/pretrain"
    return {one: first, **{f"{preset}/{name}": replace(stage, after=one) for name, stage in later.items()}}


def _bunny() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for preset in _COUNTS["bunny"]:
        s2, eva = preset.startswith("bunny_v1_1"), preset.startswith("bunny_eva")
        language = preset.removeprefix("bunny_").removeprefix("v1_1_").removeprefix("eva_")
        rates = {"bunny_eva_phi_2": 5e-5, "bunny_eva_phi_1_5": 1e-3, "bunny_eva_stablelm_2": 1e-3}
        tokens = 576 if eva else 729
        first = replace(
            _CAPTIONS, lr=rates.get(preset, 1e-3 if language in ("phi_3", "llama_3_8b") else 5e-4), tokens=tokens,
            steps=2_000_000 // 256, template=_PLAIN.get(language, "llava_plain_no_bos"),
        )  # fmt: skip
        both = ("connector", "language")
        llama = s2 and language == "llama_3_8b"
        lora = Stage(
            both, 1e-4 if llama else 2e-4, (1_300_000 if s2 else 695_000) // 128, 128,
            4096 if s2 or language == "phi_3" else 2048, tokens, connector=0.1, lora=(256 if llama else 128, 256),
        )  # fmt: skip
        full = {"sft": Stage(both, 2e-5, 695_000 // 128, 128, 2048, 729)} if preset == "bunny_phi_2" else {}
        found |= _staged(preset, first, lora=lora, **full)
    return found


def _imp() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for preset in _COUNTS["imp"]:
        plain = _PLAIN.get(preset.removeprefix("imp_"), "llava_plain_no_bos")
        samples = 665_000 if preset == "imp_v1_3b" else 1_000_000
        lora = Stage(
            ("connector", "language"), 2e-4, 2 * samples // 128, 128, 3072, 729, connector=0.1, lora=(256, 256)
        )
        found |= _staged(preset, replace(_CAPTIONS, length=3072, template=plain), lora=lora)
    return found


def _mipha() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for preset in _COUNTS["mipha"]:
        plain = _PLAIN.get(preset.removeprefix("mipha_"), "llava_plain_no_bos")
        sft = Stage(ALL, 2e-5, 2 * 665_000 // 128, 128, 2048, 729, adam=_MIPHA_ADAM)
        found |= _staged(preset, replace(_CAPTIONS, template=plain, adam=_MIPHA_ADAM), sft=sft)
    return found


def _allava(preset: str) -> dict[str, Stage]:
    first = Stage(("connector", "language"), 2e-5, 1_000_000 // 256, 256, 2048, 576, least=2e-6, warmup=0)
    sft = replace(first, steps=1_500_000 // 128, batch=128)
    longer = {"longer": replace(sft, steps=3_000_000 // 128)} if preset == "allava_3b" else {}
    return _staged(preset, first, sft=sft, **longer)


_RECIPES: dict[str, dict[str, Stage]] = {
    "bunny": _bunny(),
    "imp": _imp(),
    "mipha": _mipha(),
    "llava_phi": _staged(
        "llava_phi_3b",
        replace(_CAPTIONS, tokens=576, adam=_MIPHA_ADAM),
        sft=Stage(ALL, 2e-5, 665_000 // 128, 128, 2048, 576, adam=_MIPHA_ADAM),
    ),
    "allava": {**_allava("allava_3b"), **_allava("allava_stablelm_2")},
}


def like_rows(header: str, planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the rows; arguments are what rows share."""
    pad, endoftext = {"kind": "pad"}, "vicuna_v1_endoftext"
    shared = {"headers": header, "planner": planner}
    return {
        "bunny": _row("bunny", endoftext, pad, _PHI_TARGETS, shared),
        "imp": _row("imp", "imp_qwen2", {"kind": "squash"}, _PHI_TARGETS, shared),
        "mipha": _row("mipha", endoftext, pad, _PHI_TARGETS, shared),
        "llava_phi": _row("llava_phi", endoftext, pad, _PHI_TARGETS, shared),
        "allava": _row("allava", "allava", pad, _PHI_TARGETS, shared),
    }


def _row(
    family: str, template: str, image: Mapping[str, Any], targets: tuple[str, ...], shared: Mapping[str, Any]
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
        answers=Lack("convert check cannot run: Transformers' LLaVA has no place for a head's bias; answers: `source`")
        if family in ("mipha", "llava_phi")
        else lambda path: like_answers({"imp": "imp_qwen2", "bunny": "bunny_phi"}.get(family, family), path),
        lora=targets,
        presets={
            name: Published(count, refused={8: "36"} if name == "bunny_minicpm" else {})
            for name, count in _COUNTS[family].items()
        },
        built=lambda model: like_of(family, model),
        recipes=_RECIPES[family],
        **shared,
    )  # fmt: skip
