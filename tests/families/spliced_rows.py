"""The rows in :mod:`whole_rows` of families whose reference is :class:`spliced_models.Spliced`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llava_connectors_models import CONNECTORS, dense, mobilevlm
from pieces_models import PIECES, hpt, xtuner
from spliced_models import SplicedSource
from tinyllava_models import TINYLLAVA, tinyllava
from whole import ALL, Lack, Published, Stage, WholeFamily

NO_CLASS = Lack("Transformers has no class for it: answers are held against the written-out one, in `source`")
COUNTED = Lack("no class to build: counted from its parts' classes in test_spliced_families.py")
BY_LANGUAGE = Lack("by language model and tokenizer: test_spliced_families.py")
HEADS = "is not divisible by parallel.tensor_model_parallel_size"
_ALIGN = Stage(("connector",), 1e-3, 2179, 256, 2048, 728, template="llava_plain")
_SFT = Stage(("connector", "language"), 2e-5, 5195, 128, 2048, 728)


def staged(preset: str, names: tuple[str, ...], stages: tuple[Stage, ...]) -> dict[str, Stage]:
    """Return stages, each of which starts from the one before."""
    found: dict[str, Stage] = {}
    for name, stage in zip(names, stages, strict=True):
        found[f"{preset}/{name}"] = replace(stage, after=next(reversed(found), None))
    return found


def small(stage: Stage, tokens: int) -> Stage:
    """Return a stage with another number of slots of a picture."""
    return replace(stage, tokens=tokens)


def _tinyllava(llama: tuple[str, ...], shared: Mapping[str, Any]) -> WholeFamily:
    return WholeFamily(
        checkpoints=tuple(TINYLLAVA),
        template=BY_LANGUAGE,
        image={"kind": "squash"},
        source=SplicedSource("tinyllava", tinyllava, "squash", "factory"),
        uneven=SplicedSource(
            "tinyllava",
            lambda: tinyllava(
                "llama", text_keys={"num_key_value_heads": 1},
                vision_keys={"num_attention_heads": 3, "intermediate_size": 75},
            ),
            "squash", "factory",
        ),
        others={
            "stablelm, clip, padded": SplicedSource(
                "tinyllava", lambda: tinyllava("stablelm", clip=True, image_aspect_ratio="pad"), "pad", "factory"
            ),
            "all patches": SplicedSource(
                "tinyllava", lambda: tinyllava("llama", vision_feature_select_strategy="cls_patch"), "squash",
                "factory",
            ),
            "gemma, features multiplied": SplicedSource("tinyllava", lambda: tinyllava("gemma"), "squash", "factory"),
            "qwen2, tied": SplicedSource("tinyllava", lambda: tinyllava("qwen2"), "squash", "factory"),
        },
        answers=NO_CLASS,
        lora=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        presets={
            "tinyllava_1_5b": Published(1_504_351_520),
            "tinyllava_2_0b": Published(2_048_818_464),
            "tinyllava_3_1b": Published(3_186_937_120),
            "tinyllava_gemma_2_4b": Published(2_910_475_552),
            "tinyllava_qwen2_0_5b": Published(893_615_008, refused={4: f"14 {HEADS} (4)", 8: f"14 {HEADS} (8)"}),
            "tinyllava_qwen2_5_3b": Published(3_490_241_824),
        },
        built=COUNTED,
        recipes={
            **staged("tinyllava_1_5b", ("pretrain", "sft"), (_ALIGN, _SFT)),
            **staged(
                "tinyllava_2_0b", ("pretrain", "sft"),
                (replace(_ALIGN, template="llava_plain_no_bos"), _SFT),
            ),
            **staged(
                "tinyllava_3_1b", ("pretrain", "share", "sft"),
                (
                    replace(_ALIGN, length=3072, template="llava_plain_no_bos"),
                    Stage(("connector", "language"), 2e-5, 4867, 256, 3072, 728, template="llava_plain_no_bos"),
                    replace(_SFT, length=3072),
                ),
            ),
            **staged(
                "tinyllava_gemma_2_4b", ("pretrain", "sft"), (replace(_ALIGN, template="llava_plain_gemma"), _SFT)
            ),
            **{
                name: stage
                for size in ("qwen2_0_5b", "qwen2_5_3b")
                for name, stage in staged(
                    f"tinyllava_{size}", ("pretrain", "sft"), (replace(_ALIGN, template="llava_plain_no_bos"), _SFT)
                ).items()
            },
        },
        **shared,
    )  # fmt: skip


def _mobilevlm(llama: tuple[str, ...], shared: Mapping[str, Any]) -> WholeFamily:
    return WholeFamily(
        checkpoints=("mobilevlm", "mobilevlm_v2"),
        template=BY_LANGUAGE,
        image={"kind": "pad"},
        source=SplicedSource("mobilevlm", mobilevlm, "pad", "published"),
        uneven=SplicedSource(
            "mobilevlm",
            lambda: mobilevlm(
                vision_keys={"num_attention_heads": 3, "intermediate_size": 75}, num_key_value_heads=1
            ),
            "pad", "published",
        ),
        others={"v2": SplicedSource("mobilevlm", lambda: mobilevlm(2), "pad", "published", 98)},
        answers=NO_CLASS,
        lora=llama,
        presets={
            "mobilevlm_1_7b": Published(1_674_143_744),
            "mobilevlm_3b": Published(3_021_383_424),
            "mobilevlm_v2_1_7b": Published(1_661_522_944),
            "mobilevlm_v2_3b": Published(3_001_675_264),
            "mobilevlm_v2_7b": Published(7_050_345_472),
        },
        built=COUNTED,
        recipes={
            **staged("mobilevlm_1_7b", ("pretrain", "sft"), (small(_ALIGN, 144), small(_SFT, 144))),
            **staged("mobilevlm_3b", ("pretrain", "sft"), (small(_ALIGN, 144), replace(small(_SFT, 144), lr=4e-5))),
            **{
                name: stage
                for size in ("1_7b", "3b", "7b")
                for name, stage in staged(
                    f"mobilevlm_v2_{size}", ("pretrain", "sft"),
                    (
                        Stage(
                            ("connector", "language"), 2e-5, 4867, 256, 2048, 144, connector=50,
                            template="llava_plain",
                        ),
                        Stage(("connector", "language"), 4e-5, 18_750, 128, 2048, 144),
                    ),
                ).items()
            },
        },
        **shared,
    )  # fmt: skip


def _dense_connector(llama: tuple[str, ...], shared: Mapping[str, Any]) -> WholeFamily:
    return WholeFamily(
        checkpoints=tuple(name for name, (family, _) in CONNECTORS.items() if family == "dense_connector"),
        template=BY_LANGUAGE,
        image={"kind": "pad"},
        source=SplicedSource("dense_connector", dense, "pad", "published"),
        uneven=Lack("the tower of mobilevlm, and linear layers, which the ranks cut as LLaVA's"),
        others={
            "sci, clip": SplicedSource("dense_connector", lambda: dense("sci", clip=True), "pad", "published"),
            "sti": SplicedSource("dense_connector", lambda: dense("sti"), "pad", "published"),
        },
        answers=NO_CLASS,
        lora=llama,
        presets={
            "dense_connector_7b": Published(7_167_102_240),
            "dense_connector_8b": Published(8_458_947_872),
            "dense_connector_clip_7b": Published(7_058_693_120),
        },
        built=COUNTED,
        recipes={
            **staged("dense_connector_7b", ("pretrain", "sft"), (small(_ALIGN, 729), small(_SFT, 729))),
            **staged(
                "dense_connector_8b", ("pretrain", "sft"),
                (replace(small(_ALIGN, 729), template="llava_plain_llama_3"), small(_SFT, 729)),
            ),
            **staged("dense_connector_clip_7b", ("pretrain", "sft"), (small(_ALIGN, 576), small(_SFT, 576))),
        },
        **shared,
    )  # fmt: skip


def _xtuner(llama: tuple[str, ...], shared: Mapping[str, Any]) -> WholeFamily:
    return WholeFamily(
        checkpoints=tuple(name for name, (family, _) in PIECES.items() if family == "xtuner"),
        template=BY_LANGUAGE,
        image={"kind": "pad"},
        source=SplicedSource("xtuner", xtuner, "pad", "published"),
        uneven=Lack("the parts of tinyllava and mobilevlm, see there"),
        others={"llama, siglip": SplicedSource("xtuner", lambda: xtuner("llama", clip=False), "pad", "published")},
        answers=NO_CLASS,
        lora=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        presets={"llava_phi3_mini": Published(4_124_577_792)},
        built=COUNTED,
        recipes=staged(
            "llava_phi3_mini", ("pretrain", "sft"),
            (Stage(("connector",), 1e-3, 4871, 256, 4096, 576), Stage(ALL, 2e-5, 19_810, 128, 4096, 576)),
        ),
        **shared,
    )  # fmt: skip


def _hpt(llama: tuple[str, ...], shared: Mapping[str, Any]) -> WholeFamily:
    captions = Stage(("connector",), 1e-3, 4871, 256, 4096, 1024)
    return WholeFamily(
        checkpoints=tuple(name for name, (family, _) in PIECES.items() if family == "hpt"),
        template=BY_LANGUAGE,
        image={"kind": "squash"},
        source=SplicedSource("hpt", hpt, "squash", "published", 448),
        uneven=SplicedSource(
            "hpt",
            lambda: hpt(text_keys={"num_key_value_heads": 1}, num_attention_heads=3, intermediate_size=75),
            "squash", "published", 448,
        ),
        others={"edge": SplicedSource("hpt", lambda: hpt("phi3"), "squash", "published", 448)},
        answers=NO_CLASS,
        lora=Lack("adapters are those of llm/ alone: there and back, and in the whole: test_spliced_families.py"),
        presets={"hpt_1_5_air": Published(8_449_510_688), "hpt_1_5_edge": Published(4_231_807_264)},
        built=COUNTED,
        recipes={
            **staged(
                "hpt_1_5_air", ("pretrain", "sft"),
                (captions, Stage(("connector", "language"), 2e-5, 9905, 128, 4096, 1024)),
            ),
            **staged("hpt_1_5_edge", ("pretrain", "sft"), (captions, Stage(ALL, 2e-5, 19_810, 128, 4096, 1024))),
        },
        **shared,
    )  # fmt: skip


def spliced_rows(header: str, llama: tuple[str, ...], planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the rows; arguments are what rows share: ``headers``, ``lora``, ``planner``."""
    rows = {
        "tinyllava": _tinyllava,
        "mobilevlm": _mobilevlm,
        "dense_connector": _dense_connector,
        "xtuner": _xtuner,
        "hpt": _hpt,
    }
    return {name: row(llama, {"headers": header, "planner": planner}) for name, row in rows.items()}
