"""The rows of :mod:`whole`: one for each registered family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from deepseek_rows import deepseek_rows
from family_cases import (
    _TEXT,
    _VISION,
    CODEFUSE,
    QWEN_VL,
    codefuse,
    codefuse_name,
    llava,
    qwen_vl,
)
from fused_rows import fused_rows
from gemma_rows import gemma_rows
from glm4v_models import FILES as GLM4V_FILES
from glm4v_models import GLM4V, Glm4vMoeSource, glm4v, glm4v_moe
from glm4v_models import publish as glm4v_publish
from idefics3_rows import idefics3_rows
from internvl_rows import internvl_rows
from like_rows import like_rows
from llava_next_models import (
    NEXT_PINPOINTS,
    ONEVISION_PINPOINTS,
    llava_next,
    llava_next_mistral,
    llava_onevision,
    next_files,
    onevision_files,
    tiles_answers,
)
from llava_published import llava_answers, llava_original_answers
from minicpm_rows import minicpm_rows
from mllama_rows import mllama_rows
from moe_llava_rows import moe_llava_rows
from processor_files import CROP_FILES, NATIVE_FILES, THIRD_FILES
from qwen2_vl_models import QWEN2_VL, publish, qwen2_5_vl, qwen2_vl
from qwen2_vl_models import save as save_second
from qwen3_vl_models import QWEN3_VL, qwen3_vl, qwen3_vl_moe
from qwen3_vl_models import save as save_third
from rice_models import FILES as RICE_FILES
from rice_models import RICE, LlavaOnevision15
from spliced_rows import spliced_rows
from text_cases import ROWS as TEXT_ROWS
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)
from whole import ALL, Lack, Published, Stage, WholeFamily, layout_of, part
from whole_source import NativeSource, PlainQwenSource, TransformersSource

from megavlm.config.schema import ModelConfig
from megavlm.families.known import FAMILIES

LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GLM_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
PLANNED = {"weights": 0.0, "gradients": 0.0, "operations": 0.0, "activations": 0.06}
"""Lists of segments, and rows that pad a vocabulary, count in models so small."""
ODD_TEXT = {**_TEXT, "num_key_value_heads": 1}
"""One key/value head, which two ranks share."""
ODD_VISION = {**_VISION, "num_attention_heads": 3, "intermediate_size": 75}
"""Three heads, and an odd width: each rank holds the whole tower."""


def published(family: str, config: type[PretrainedConfig], layers: Mapping[int, int]) -> Callable[[ModelConfig], Any]:
    """Return what builds the published class of a preset; ``layers``: of the published tower, by those built here."""

    def build(model: ModelConfig) -> tuple[nn.Module, list[nn.Module]]:
        tree = FAMILIES[family].config(model, {})
        whole = layers.get(model.vision.num_layers, model.vision.num_layers)
        tree["vision_config"]["num_hidden_layers"] = whole
        theirs = AutoModelForImageTextToText.from_config(config(**tree))
        if not layers:
            return theirs, []
        tower = theirs.model.vision_tower
        return theirs, [tower.post_layernorm, *tower.encoder.layers[model.vision.num_layers :]]

    return build


HEADER = (
    r"Layout predicted, not run: (?P<gpus>\d+) H100s of 80 GB \((?P<memory>\d+) GiB of it\), "
    r"(?P<seconds>[\d.]+) s a step, (?P<hours>[\d.]+) GPU hours(?: for \d+ steps)?\. "
    r"TP (?P<tensor>\d+)(?: x PP (?P<pipeline>\d+))?"
)
_ALIGN = Stage(("connector",), 1e-3, 558_000 // 256, 256, 2048, 576, template="llava_plain")


def _llava(preset: str, first: Stage, second: Stage, names: tuple[str, str] = ("pretrain", "sft")) -> dict[str, Stage]:
    """Return two stages, the second of which starts from the first."""
    one, two = (f"{preset}/{name}" for name in names)
    return {one: first, two: replace(second, after=one)}


def _onevision(preset: str) -> dict[str, Stage]:
    found, before = dict[str, Stage](), None
    learns = Stage(ALL, 1e-5, 15_625, 256, 32768, 2929, tower=0.2)
    stages = {
        "align": Stage(("connector",), 1e-3, 1089, 512, 8192, 729, template="llava_plain_no_bos"),
        "mid": learns, "single_image": replace(learns, steps=12_500), "onevision": replace(learns, steps=6250),
    }  # fmt: skip
    for name, stage in stages.items():
        found[f"{preset}/{name}"] = replace(stage, after=before)
        before = f"{preset}/{name}"
    return found


def _onevision1_5(size: str) -> dict[str, Stage]:
    adam, rates = (0.9, 0.99, 1e-5, 1), {"least": 1e-6}
    first = Stage(("connector",), 1e-4, 2500, 8, 32768, 391, warmup=5, adam=adam, **rates)
    names = [f"llava_onevision1_5_{size}/{stage}" for stage in ("align", "mid", "sft")]
    second = Stage(ALL, 1e-5, 20_000, 16, 32768, 391, names[0], 40, 0.01, adam=(0.9, 0.95, 1e-5, 1), **rates)
    third = replace(second, steps=3500, batch=224, after=names[1], warmup=7, decay=0.0, adam=adam)
    return dict(zip(names, (first, second, third), strict=True))


_QWEN_SFT = Stage(("connector", "language"), 2e-7, 1000, 128, 8192, 54)
_QWEN3_SFT = replace(_QWEN_SFT, lr=1e-5, tokens=48)
HEADS = "is not divisible by parallel.tensor_model_parallel_size"


def _qwen2_vl(
    family: str,
    make: Callable[[], PreTrainedModel],
    presets: Mapping[str, Published],
    uneven: NativeSource | Lack,
    files: Mapping[str, Any] = NATIVE_FILES,
    recipes: Mapping[str, Stage] | Lack = Lack("none yet: no scripts of its stages were found"),  # noqa: B008 - frozen
) -> WholeFamily:
    """Return the row of a family of pictures in their own resolution."""
    names = {"qwen2_vl": QWEN2_VL, "qwen2_5_vl": QWEN2_VL, "qwen3_vl": QWEN3_VL, "qwen3_vl_moe": QWEN3_VL,
             "glm4v": GLM4V, "glm4v_moe": GLM4V}[family]  # fmt: skip
    third = family.startswith("qwen3_vl")
    glm = family.startswith("glm4v")
    where = "test_qwen3_vl.py" if third else "test_glm4v.py" if glm else "test_qwen2_vl.py"
    own = f"what is published differs in size alone; bad input, and other levels: tests/families/{where}"
    return WholeFamily(
        checkpoints=tuple(name for name, (its, _) in names.items() if its == family),
        # Else ``answers`` has one of its own.
        template={"glm4v": "glm4v", "glm4v_moe": "glm4_5v"}.get(family, "checkpoint"),
        image={"kind": "native", "min_pixels": 256, "max_pixels": 4096, "enlarge_to_block": glm},
        source=(Glm4vMoeSource if family == "glm4v_moe" else NativeSource)(family, make, files=files, vocab=128),
        uneven=uneven,
        others=Lack(own),
        answers=partial(glm4v_publish, make=make)
        if glm
        else partial(publish, make=make, save=save_third if third else save_second),
        # Experts take no adapters.
        lora=LLAMA_TARGETS[:4] if family.endswith("_moe") else GLM_TARGETS if glm else LLAMA_TARGETS,
        presets=presets,
        built=_from_config(family),
        recipes=recipes,
        headers=Lack("there are no recipes yet") if isinstance(recipes, Lack) else HEADER,
        # Windows at the edges of a picture are counted whole.
        planner=PLANNED if family != "qwen2_5_vl" else {**PLANNED, "operations": 0.02},
    )


def _from_config(family: str) -> Callable[[ModelConfig], Any]:
    """Return what builds the class of a preset, all of which is built here."""

    def build(model: ModelConfig) -> tuple[nn.Module, list[nn.Module]]:
        tree = FAMILIES[family].config(model, {})
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(**tree)), []

    return build


ROWS: dict[str, WholeFamily] = {
    "llava": WholeFamily(
        checkpoints=(
            "llava", "llava_hub", "llava_modules", "llava_qwen_siglip", "llava_qwen3", "llava_layers",
        ),
        template="vicuna_v1",
        image={"kind": "crop"},
        source=TransformersSource("llava", llava, files=CROP_FILES),
        uneven=TransformersSource(
            "llava", lambda: llava(LlamaConfig(**ODD_TEXT), CLIPVisionConfig(**ODD_VISION)), files=CROP_FILES
        ),
        others=Lack("towers, feature layers and language models in combination: test_transformers_models.py"),
        answers=llava_answers,
        lora=LLAMA_TARGETS,
        # llava-hf/llava-1.5-{7b,13b}-hf.
        presets={"llava_1_5_7b": Published(7_063_427_072), "llava_1_5_13b": Published("13.4B")},
        built=published("llava", LlavaConfig, {23: 24}),
        recipes={
            preset: stage
            for size in ("7b", "13b")
            for preset, stage in _llava(
                f"llava_1_5_{size}", _ALIGN, Stage(("connector", "language"), 2e-5, 665_000 // 128, 128, 2048, 576)
            ).items()
        },
        headers=HEADER,
        planner=PLANNED,
    ),
    "llava_next": WholeFamily(
        checkpoints=("llava_next", "llava_next_mistral", "llava_next_hub", "llava_next_modules"),
        template="vicuna_v1",
        image={"kind": "anyres", "pinpoints": tuple(map(tuple, NEXT_PINPOINTS))},
        source=TransformersSource("llava_next", llava_next, files=next_files()),
        uneven=TransformersSource(
            "llava_next",
            lambda: llava_next(LlamaConfig(**ODD_TEXT), CLIPVisionConfig(**ODD_VISION)),
            files=next_files(),
        ),
        others={"mistral": TransformersSource("llava_next", llava_next_mistral, files=next_files())},
        answers=lambda path: tiles_answers("next", path),
        lora=LLAMA_TARGETS,
        # llava-hf/llava-v1.6-{vicuna-7b,vicuna-13b,mistral-7b,34b}-hf, llama3-llava-next-8b-hf.
        presets={
            "llava_1_6_vicuna_7b": Published("7.06B"),
            "llava_1_6_vicuna_13b": Published("13.4B"),
            "llava_1_6_mistral_7b": Published(7_566_747_648),
            "llava_1_6_34b": Published("34.8B"),
            "llava_next_llama3_8b": Published(8_355_276_800),
        },
        built=published("llava_next", LlavaNextConfig, {23: 24}),
        recipes={
            **{
                preset: stage
                for size in ("vicuna_7b", "vicuna_13b", "mistral_7b", "34b")
                for preset, stage in _llava(
                    f"llava_1_6_{size}",
                    replace(_ALIGN, template="llava_plain_no_bos" if size == "34b" else "llava_plain"),
                    Stage(ALL, 2e-5, 760_000 // 128, 128, 4096, 2340, tower=0.1),
                ).items()
            },
            **_llava(
                "llava_next_llama3_8b",
                replace(_ALIGN, length=8192, template="llava_plain_llama_3"),
                Stage(ALL, 1e-5, 790_000 // 128, 128, 8192, 2340, tower=0.2),
            ),
        },
        headers=HEADER,
        planner=PLANNED,
    ),
    "llava_onevision": WholeFamily(
        checkpoints=("llava_onevision", "llava_onevision_tied"),
        template="qwen2",
        image={"kind": "anyres_max", "max_tiles": 2, "pinpoints": tuple(map(tuple, ONEVISION_PINPOINTS))},
        source=TransformersSource("llava_onevision", llava_onevision, files=onevision_files()),
        uneven=TransformersSource(
            "llava_onevision",
            lambda: llava_onevision(Qwen2Config(**ODD_TEXT), SiglipVisionConfig(**ODD_VISION, vision_use_head=False)),
            files=onevision_files(),
        ),
        others={
            "tied": TransformersSource("llava_onevision", partial(llava_onevision, tied=True), files=onevision_files())
        },
        answers=lambda path: tiles_answers("onevision", path),
        lora=LLAMA_TARGETS,
        # llava-hf/llava-onevision-qwen2-{0.5b,7b,72b}-ov-hf.
        presets={
            "llava_onevision_0_5b": Published("894M", refused={4: f"14 {HEADS} (4)", 8: f"14 {HEADS} (8)"}),
            "llava_onevision_7b": Published(8_030_807_584, refused={8: f"28 {HEADS} (8)"}),
            "llava_onevision_72b": Published("73.2B"),
        },
        built=published("llava_onevision", LlavaOnevisionConfig, {26: 26}),
        recipes={**_onevision("llava_onevision_0_5b"), **_onevision("llava_onevision_7b")},
        headers=HEADER,
        planner=PLANNED,
    ),
    **gemma_rows(published("paligemma", PaliGemmaConfig, {}), _from_config("gemma3"), HEADER, LLAMA_TARGETS, PLANNED),
    **mllama_rows(_from_config("mllama"), HEADER, PLANNED),
    **deepseek_rows(_from_config, HEADER, LLAMA_TARGETS, PLANNED),
    **idefics3_rows(_from_config, HEADER, LLAMA_TARGETS, PLANNED),
    **like_rows(HEADER, PLANNED),
    **moe_llava_rows(HEADER, LLAMA_TARGETS[:4], PLANNED),
    **spliced_rows(HEADER, LLAMA_TARGETS, PLANNED),
    **fused_rows(HEADER, LLAMA_TARGETS, PLANNED),
    **minicpm_rows(HEADER, LLAMA_TARGETS, PLANNED),
    **internvl_rows(published("internvl", InternVLConfig, {}), HEADER, LLAMA_TARGETS, PLANNED),
    "qwen_vl": WholeFamily(
        checkpoints=("qwen_vl", "qwen_vl_bf16"),
        template="qwen_vl",
        image={"kind": "squash"},
        source=PlainQwenSource(QWEN_VL, 1, qwen_vl),
        uneven=Lack("five heads of the tower at one process: tests/models/test_reference.py; a published one has 16"),
        others=Lack("it is published with one tower and one kind of language model"),
        answers=Lack("Transformers has no class for it: answers are held against the plain reference, in `source`"),
        lora=Lack("c_attn, attn.c_proj, w1, w2 are written and held against the merge: tests/checkpoint/test_peft.py"),
        presets={"qwen_vl_7b": Published(9_656_935_168)},
        built=Lack("no class to build: the counts are those of the published tensors (tests/training/test_recipes.py)"),
        recipes=Lack("qwen_vl_7b/{pretrain,multitask,sft,lora,qlora}: tests/training/test_recipes.py"),
        headers=Lack("written before there was a planner: a number of GPUs, by hand"),
        planner=PLANNED,
    ),
    "codefuse_vlm": WholeFamily(
        checkpoints=("codefuse", "codefuse_mlp"),
        template="qwen_vl",
        image={"kind": "squash"},
        source=PlainQwenSource(CODEFUSE, 3, codefuse, codefuse_name),
        uneven=Lack("the parts of Qwen-VL, see there"),
        others=Lack("it is published with one tower and one kind of language model"),
        answers=Lack("Transformers has no class for it: answers are held against the plain reference, in `source`"),
        lora=Lack("the language model of Qwen-VL, see there"),
        presets={"codefuse_vl_14b": Published(16_152_325_888)},
        built=Lack("no class to build: the counts are those of the published tensors (tests/training/test_recipes.py)"),
        recipes=Lack("codefuse_vl_14b/{align,sft}, belle_vl_14b/{align,sft}: tests/training/test_recipes.py"),
        headers=Lack("written before there was a planner: a number of GPUs, by hand"),
        planner={**PLANNED, "activations": 0.12},  # a tenth of it are 256 queries

    ),
    "qwen2_vl": _qwen2_vl(
        "qwen2_vl",
        qwen2_vl,
        {
            "qwen2_vl_2b": Published(2_208_985_600, refused={8: f"12 {HEADS} (8)"}),
            "qwen2_vl_7b": Published(8_291_375_616, refused={8: f"28 {HEADS} (8)"}),
            "qwen2_vl_72b": Published(73_405_560_320),
        },
        Lack("see qwen2_5_vl, whose tower has three heads there"),
        recipes={f"qwen2_vl_{size}/sft": _QWEN_SFT for size in ("2b", "7b", "72b")},
    ),
    "qwen2_5_vl": _qwen2_vl(
        "qwen2_5_vl",
        qwen2_5_vl,
        {
            "qwen2_5_vl_3b": Published(3_754_622_976),
            "qwen2_5_vl_7b": Published(8_292_166_656, refused={8: f"28 {HEADS} (8)"}),
            "qwen2_5_vl_32b": Published(33_452_718_336),
            "qwen2_5_vl_72b": Published(73_410_777_344),
        },
        NativeSource("qwen2_5_vl", partial(qwen2_5_vl, heads=3), files=NATIVE_FILES, vocab=128),
        recipes={f"qwen2_5_vl_{size}/sft": _QWEN_SFT for size in ("3b", "7b", "32b", "72b")},
    ),
    "qwen3_vl": _qwen2_vl(
        "qwen3_vl",
        qwen3_vl,
        {
            "qwen3_vl_2b": Published(2_127_532_032),
            "qwen3_vl_4b": Published(4_437_815_808),
            "qwen3_vl_8b": Published(8_767_123_696),
            "qwen3_vl_32b": Published(33_357_390_064),
        },
        Lack("see qwen2_5_vl, whose tower has three heads there"),
        THIRD_FILES,
        recipes={f"qwen3_vl_{size}/sft": _QWEN3_SFT for size in ("2b", "4b", "8b", "32b")},
    ),
    "qwen3_vl_moe": _qwen2_vl(
        "qwen3_vl_moe",
        qwen3_vl_moe,
        {"qwen3_vl_30b_a3b": Published(31_070_754_032), "qwen3_vl_235b_a22b": Published(235_670_022_896)},
        Lack("see qwen2_5_vl, whose tower has three heads there"),
        THIRD_FILES,
        recipes={f"qwen3_vl_{size}/sft": _QWEN3_SFT for size in ("30b_a3b", "235b_a22b")},
    ),
    "glm4v": _qwen2_vl(
        "glm4v",
        glm4v,
        {"glm4_1v_9b": Published(10_292_777_472)},
        NativeSource("glm4v", partial(glm4v, heads=3), files=GLM4V_FILES, vocab=128),
        GLM4V_FILES,
        recipes={"glm4_1v_9b/sft": Stage(("language",), 1e-5, 1000, 32, 32768, 315, warmup=100)},
    ),
    "glm4v_moe": _qwen2_vl(
        "glm4v_moe",
        glm4v_moe,
        {f"glm4_{version}v_106b": Published(107_710_927_360) for version in (5, 6)},
        Lack("see glm4v, whose tower has three heads there"),
        GLM4V_FILES,
        recipes={
            f"glm4_{version}v_106b/sft": Stage(
                ALL, 5e-6, 1000, 32, 8192, 315, warmup=100, decay=0.1, adam=(0.9, 0.95, 1e-5, 1), least=5e-7
            )
            for version in (5, 6)
        },
    ),
    "llava_onevision1_5": replace(
        _qwen2_vl(
            "qwen3_vl",
            qwen3_vl,
            {
                "llava_onevision1_5_4b": Published(4_741_610_528),
                "llava_onevision1_5_8b": Published(8_527_214_624),
            },
            Lack("see qwen2_5_vl, whose tower has three heads there"),
            recipes={**_onevision1_5("4b"), **_onevision1_5("8b")},
        ),
        checkpoints=tuple(RICE),
        template="qwen2_vl",
        source=NativeSource("llava_onevision1_5", LlavaOnevision15, files=RICE_FILES, vocab=128),
        others=Lack("what is published differs in size alone; bad input: tests/families/test_llava_onevision1_5.py"),
        answers=Lack("Transformers has no class for it: answers are held against the written-out one, in `source`"),
        built=Lack("no class to build: counted from the published definition in test_llava_onevision1_5.py"),
    ),
    "internvl_chat": layout_of("internvl", ("internvl_chat", "internvl_chat_moe"), template="internvl2_5",
                               image={"kind": "dynamic_tiles", "max_tiles": 12}),
    "llava_original": layout_of(
        "llava",
        tuple(
            f"llava_original{kind}"
            for kind in ("", "_bin", "_layers", "_linear", "_mlp3_qwen2", "_siglip", "_mistral")
        ),
        template="vicuna_v1", image={"kind": "pad"}, answers=llava_original_answers,
    ),
    "llava_original_apart": layout_of("llava_original", Lack("in two directories: test_llava_original.py")),
    "intern_vit": part(("intern_vit",), "the tower of internvl alone; numbers are those of internvl"),
    "clip": part(("clip", "clip_vision"), "a tower alone; features against Transformers: test_transformers_models.py"),
    "siglip": part(("siglip", "siglip_vision"), "a tower alone; features against it: test_transformers_models.py"),
    "siglip2": part(("siglip2", "siglip2_vision"), "a tower alone; features against it: test_tower_families.py"),
    "dinov2": part(
        ("dinov2_reg", "dinov2_swiglu", "dinov2_plain"), "a tower alone; features against it: test_tower_families.py"
    ),
    "eva02": part(
        ("eva02_timm", "eva02_authors", "eva02_authors_tower"),
        "a tower alone; features against timm's definition: test_tower_families.py",
    ),
    "qwen_visual": part(("codefuse_tower",), "the tower of codefuse_vlm alone; numbers are those of codefuse_vlm"),
    "qwen": part(("qwen",), "a language model alone; numbers are those of qwen_vl"),
    "llama": part(
        ("llama", "vicuna", "qwen2", "qwen3", "mistral"),
        "a language model alone; numbers are those of llava, by language model: test_transformers_models.py",
    ),
    **{
        family: part(
            tuple(name for name, row in TEXT_ROWS.items() if row.family == family),
            "a language model alone; loss, gradients and answers at two layouts: test_text_kinds.py",
        )
        for family in (
            "phi", "phi3", "gemma", "gemma3_text", "glm4", "stablelm", "minicpm", "internlm2", "qwen3_moe", "mixtral",
            "glm4_moe", "deepseek_v2", "mamba",
        )
    },
    "t5": part(("t5", "ul2"), "a language model alone; loss, logits and gradients at two layouts: test_t5.py"),
    "mm_projector": part(Lack("one file: test_llava_original.py"), "a connector alone; numbers are those of llava"),
}  # fmt: skip
