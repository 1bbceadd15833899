"""Presets have the published sizes, and the registry takes new parts without a change elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state as mpu
from pydantic import Field, TypeAdapter, ValidationError
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe

from megavlm.architectures.connectors.mlp import MLP
from megavlm.architectures.context import BuildContext
from megavlm.architectures.cost import decoder_cost, final_parameters
from megavlm.architectures.decoders.decoder import build
from megavlm.config import architecture as registry
from megavlm.config.architecture import (
    CONNECTORS,
    LANGUAGE,
    VISION,
    Architecture,
    Preset,
    Registry,
)
from megavlm.config.errors import UserError
from megavlm.config.fields import config_class
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig, VisionConfig
from megavlm.data.device_batch import make_batch
from megavlm.families import presets
from megavlm.families.presets import expand_presets, load_presets
from megavlm.families.registry import FAMILIES
from megavlm.layers.specs import LayerKind
from megavlm.models.build import MODULES
from megavlm.models.vlm import VisionLanguageModel
from megavlm.training.build import build_training
from megavlm.training.step import train_step

# Facts page, A to C.
TOWER = 1_842_770_688
SIZES = {
    "qwen_vl_7b": {"vision": TOWER, "connector": 92_839_936, "language": 7_721_324_544},
    "codefuse_vl_14b": {"vision": TOWER, "connector": 142_264_320, "language": 14_167_290_880},
}
# The public figures of the checkpoints.
LANGUAGE_SIZES = {
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "mistral_7b": 7_241_732_096,
    "yi_6b": 6_061_035_520,
    "tinyllama_1_1b": 1_100_048_384,
    "deepseek_llm_7b": 6_910_365_696,
    "qwen1_5_0_5b": 463_987_712,
    "qwen1_5_1_8b": 1_836_828_672,
    "phi_1_5": 1_418_270_720,
    "phi_2": 2_779_683_840,
    "phi_3_mini_4k": 3_821_079_552,
    "gemma_2b": 2_506_172_416,
    "gemma_3_1b": 999_885_952,
    # The whole models less SigLIP's tower and the connector.
    "gemma_3_4b": 4_300_079_472 - 416_866_032 - (1152 * 2560 + 1152),
    "gemma_3_27b": 27_432_406_640 - 416_866_032 - (1152 * 5376 + 1152),
    "glm_4_9b": 9_400_279_040,
    "stablelm_2_1_6b": 1_644_515_328,
    "minicpm_2b": 2_724_880_896,
    "internlm2_5_1_8b": 1_889_110_016,
    "internlm2_5_7b": 7_737_708_544,
    "internlm2_5_20b": 19_861_149_696,
    # What MambaForCausalLM has of the public configurations.
    "mamba_130m": 129_135_360,
    "mamba_2_8b": 2_768_345_600,
    # What T5ForConditionalGeneration has of google/t5-v1_1-xl's configuration, with an output layer of its own.
    "t5_xl": 2_849_757_184,
}


def vit_layer(width: int, ffn: int) -> int:
    """Return the parameters of one layer: four projections, the MLP, two norms."""
    return 4 * (width**2 + width) + 2 * width * ffn + ffn + width + 4 * width


TOWER_SIZES = {
    # CLIPVisionModel has 303,507,456: less the last layer and the norm behind it.
    "clip_vit_l_14_336": 303_507_456 - vit_layer(1024, 4096) - 2 * 1024,
    # SiglipVisionModel has 428,225,600: less the pooling head (a probe, attention, a norm, an MLP).
    "siglip_so400m_14_384": 428_225_600 - vit_layer(1152, 4304) + 2 * 1152 - 1152,
}
# llava-hf/llava-1.5-7b-hf has 7,063,427,072 with the whole CLIPVisionModel.
LLAVA = 7_063_427_072 - 303_507_456


def whole(preset: str) -> ModelConfig:
    """Return the ``model`` branch of a recipe that names nothing but a whole model."""
    return TypeAdapter(ModelConfig).validate_python(expand_presets({"model": {"preset": preset}})["model"])


def build_on_meta(model: ModelConfig, parallel: ParallelConfig, **stage: bool) -> VisionLanguageModel:
    """Build a chunk that has shapes and no memory."""
    with torch.device("meta"):
        return VisionLanguageModel(model, BuildContext(parallel, initialize=False), 0, **stage)


def count(module: torch.nn.Module | None) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


@pytest.fixture
def clean_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a test registers."""
    load_presets()
    for one in (VISION, CONNECTORS, LANGUAGE, registry.MODELS):
        monkeypatch.setattr(one, "_presets", dict(one._presets))
    monkeypatch.setattr(FAMILIES, "_places", list(FAMILIES._places))
    monkeypatch.setattr(FAMILIES, "_families", dict(FAMILIES._families))
    yield


@pytest.mark.parametrize("preset", SIZES)
def test_presets_have_the_published_sizes(preset: str) -> None:
    model = build_on_meta(whole(preset), ParallelConfig())
    assert {name: count(getattr(model, name)) for name in MODULES} == SIZES[preset]
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("preset", LANGUAGE_SIZES)
def test_language_models_have_the_published_sizes(preset: str) -> None:
    load_presets()
    found = LANGUAGE.find(preset)
    assert found.architecture is not None
    values = {"preset": preset, **found.values, "vocab_divisor": 1}  # no rows that pad it
    language = TypeAdapter(found.architecture.config).validate_python(values)
    with torch.device("meta"):
        model = found.build(language, BuildContext(ParallelConfig(), initialize=False))
    assert count(model) == LANGUAGE_SIZES[preset]
    if found.architecture.cost is None:
        return
    cost = decoder_cost(language)
    parts = [*cost.layer_parameters(language, 1) * language.num_layers, *final_parameters(language, 1)]
    tables = (2 - language.tie_word_embeddings) * language.vocab_size * language.hidden_size
    assert tables + sum(getattr(one, "elements", one) for one in parts) == LANGUAGE_SIZES[preset]


@pytest.mark.parametrize("preset", TOWER_SIZES)
def test_towers_have_the_published_sizes(preset: str) -> None:
    found = VISION.find(preset)
    assert found.architecture is not None
    vision = TypeAdapter(found.architecture.config).validate_python({"preset": preset, **found.values})
    with torch.device("meta"):
        tower = found.build(vision, BuildContext(ParallelConfig(), initialize=False))
    assert count(tower) == TOWER_SIZES[preset]
    with torch.device("meta"):
        features = tower(torch.empty(2, 3, vision.image_size, vision.image_size))
    assert features.shape == (vision.patches_per_image, 2, vision.hidden_size)


def test_llava_has_the_published_size() -> None:
    tree = {"model": {"preset": "llava_1_5_7b", "language": {"vocab_divisor": 64}}}  # 32064 rows without padding
    model = build_on_meta(TypeAdapter(ModelConfig).validate_python(expand_presets(tree)["model"]), ParallelConfig())
    assert count(model.vision) == TOWER_SIZES["clip_vit_l_14_336"]
    assert count(model.connector) + count(model.language) == LLAVA


@pytest.mark.parametrize("first", [None, 2])
def test_pipeline_stages_add_up_to_the_whole_model(first: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = 4 if first is None else 3
    parallel = ParallelConfig(pipeline_model_parallel_size=stages, num_layers_in_first_pipeline_stage=first)
    monkeypatch.setattr(mpu, "_MPU_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", stages)
    layers, sums = [], dict.fromkeys(MODULES, 0)
    for stage in range(stages):
        monkeypatch.setattr(mpu, "_MPU_PIPELINE_MODEL_PARALLEL_RANK", stage)
        ends = {"pre_process": stage == 0, "post_process": stage == stages - 1}
        chunk = build_on_meta(whole("qwen_vl_7b"), parallel, **ends)
        assert (chunk.vision is not None) == (chunk.connector is not None) == (stage == 0)
        layers.append(len(chunk.language.decoder.layers))
        for name in MODULES:
            sums[name] += count(getattr(chunk, name))
    assert sums == SIZES["qwen_vl_7b"]
    assert layers == ([8] * 4 if first is None else [2, 15, 15])


def test_each_stage_has_its_own_layers_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = whole("tiny"), LayerKind("causal")
    assert set(build.layer_plan(model.language)) == {LayerKind("causal", head_dim=model.language.kv_channels)}
    plan = (plain, LayerKind("full"), plain, LayerKind("causal", qk_layernorm=True))
    monkeypatch.setattr(build, "layer_plan", lambda _language: plan)
    parallel = ParallelConfig(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=1)
    monkeypatch.setattr(mpu, "_MPU_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", 2)
    found = []
    for stage in range(2):
        monkeypatch.setattr(mpu, "_MPU_PIPELINE_MODEL_PARALLEL_RANK", stage)
        chunk = build_on_meta(model, parallel, pre_process=stage == 0, post_process=stage == 1)
        attention = [layer.self_attention for layer in chunk.language.decoder.layers]
        found.append([(one.attn_mask_type.name, type(one.q_layernorm).__name__ != "IdentityOp") for one in attention])
    assert found == [[("causal", False)], [("no_mask", False), ("causal", False), ("causal", True)]]


def test_unknown_names_are_answered_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"no vision preset 'vit_huge'; there are .*openclip_vit_bigg.*, tiny_vit"):
        VISION.find("vit_huge")
    with pytest.raises(ValueError, match=r"^model\.language\.preset: no language preset 'gpt'; .*qwen_7b"):
        expand_presets({"model": {"preset": "tiny", "language": {"preset": "gpt"}}})
    with pytest.raises(ValueError, match=r"^model\.preset: no model preset 'huge'; .*codefuse_vl_14b"):
        expand_presets({"model": {"preset": "huge"}})


def test_a_name_is_registered_once() -> None:
    names = Registry("vision")
    one = Architecture("one", VisionConfig, "somewhere:build")
    names.register("one", one)
    with pytest.raises(UserError, match="vision preset 'one' is registered twice"):
        names.register("one", Architecture("other", VisionConfig, "elsewhere:build"))
    with pytest.raises(UserError, match="vision architecture 'one' is registered twice"):
        names.register("two", Architecture("one", VisionConfig, "elsewhere:build"))
    with pytest.raises(UserError, match="registered with 'somewhere'; give an Architecture"):
        names.register("two", "somewhere")  # type: ignore[arg-type]
    assert names.find("one").architecture is one


@pytest.mark.parametrize("name", ["mlp1x_gelu", "mlp2x_gelu", "mlp12x_gelu"])
def test_a_number_stands_for_n(name: str) -> None:
    assert CONNECTORS.find(name).architecture is MLP


@pytest.mark.parametrize("name", ["mlpx_gelu", "mlp0x_gelu", "mlp-1x_gelu", "mlp<N>x_gelux", "amlp2x_gelu"])
def test_only_a_number_stands_for_n(name: str) -> None:
    with pytest.raises(ValueError, match=r"mlp<N>x_gelu"):
        CONNECTORS.find(name)


def test_the_recipe_wins_over_the_preset_and_another_preset_drops_adjustments() -> None:
    tree = {"model": {"preset": "tiny", "language": {"num_layers": 2}, "connector": {"preset": "linear"}}}
    model = expand_presets(tree)["model"]
    assert model["language"]["num_layers"] == 2
    assert model["language"]["hidden_size"] == 128  # tiny_qwen's
    assert "num_queries" not in model["connector"]  # was the resampler's
    assert tree["model"]["language"] == {"num_layers": 2}


_NEW_CONNECTOR = '''
"""A connector that averages the patches of each of some stripes, and its own key."""
import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class Mean(MegatronModule):
    def __init__(self, model, context):
        width = model.language.hidden_size
        config = TransformerConfig(
            num_layers=1, hidden_size=width, num_attention_heads=1, **context.transformer_settings()
        )
        super().__init__(config=config)
        self.stripes = model.connector.stripes
        self.project = torch.nn.Linear(model.vision.hidden_size, width)

    def forward(self, features_PNW):
        return self.project(features_PNW.unflatten(0, (self.stripes, -1)).mean(1))


def build(model, context):
    return Mean(model, context)
'''


@config_class
class MeanConfig(ConnectorConfig):
    """Means of stripes."""

    stripes: int = Field(default=1, gt=0)
    """Stripes of a picture: the tokens that it becomes."""

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return the stripes."""
        return self.stripes


@pytest.mark.usefixtures("clean_registries")
def test_a_new_connector_brings_its_keys_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mean_connector.py").write_text(_NEW_CONNECTOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    CONNECTORS.register("mean", Architecture("mean", MeanConfig, "mean_connector:build"), stripes=2)

    own = {"preset": "tiny", "vision": {"image_size": 32}}
    recipe = tiny_recipe(model={**own, "connector": {"preset": "mean"}})
    assert recipe.model.tokens_per_view == 2
    recipe = tiny_recipe(model={**own, "connector": {"preset": "mean", "stripes": 1, "num_queries": None}})
    assert recipe.model.tokens_per_view == 1
    with pytest.raises(ValidationError, match="num_queries"):
        tiny_recipe(model={**own, "connector": {"preset": "mean", "num_queries": 4}})
    with pytest.raises(ValidationError, match="stripes"):
        tiny_recipe(model={**own, "connector": {"preset": "linear", "stripes": 4}})
    training = build_training(recipe, IMAGE_TOKEN)
    (module,) = training.modules
    before = module.connector.project.weight.detach().clone()
    pack, pixels = random_packs(1, seed=3)[0]
    slots = (pack.tokens == IMAGE_TOKEN).nonzero()[0]
    pack.tokens[slots[len(pixels) :]] = 0  # one slot per image
    training.scheduler.step(1)
    result = train_step(
        training.chunks,
        training.optimizer,
        [make_batch(pack, torch.from_numpy(pixels), torch.device("cpu"))],
        num_sources=1,
    )
    assert len(pixels) > 0
    assert result.loss > 0
    assert not torch.equal(before, module.connector.project.weight)
    sys.modules.pop("mean_connector")


@pytest.mark.usefixtures("clean_registries")
def test_other_packages_bring_presets_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Architecture("theirs", ConnectorConfig, "their.module:build")

    class Entry:
        def load(self) -> Any:
            return lambda: CONNECTORS.register("theirs", theirs, num_queries=9)

    asked: list[str] = []

    def entry_points(*, group: str) -> list[Entry]:
        asked.append(group)
        return [Entry()]

    monkeypatch.setattr(presets, "entry_points", entry_points)
    for one in (VISION, CONNECTORS, LANGUAGE, registry.MODELS):  # as in a new process
        one._presets.clear()
    FAMILIES._places.clear()
    FAMILIES._families.clear()
    model = expand_presets({"model": {"preset": "tiny", "connector": {"preset": "theirs"}}})["model"]
    assert asked == ["megavlm.presets"]
    assert model["connector"] == {"preset": "theirs", "num_queries": 9}
    assert CONNECTORS.find("theirs") == Preset("theirs", theirs, {"num_queries": 9})
    expand_presets({"model": {"preset": "tiny"}})
    assert asked == ["megavlm.presets"], "entry points are asked once"
